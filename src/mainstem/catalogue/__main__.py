"""`python -m mainstem.catalogue`: make the index anew."""

from .build import write

if __name__ == "__main__":
    print(write())
