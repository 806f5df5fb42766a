"""How long a newcomer waits: `import mainstem` and `mainstem papers`, neither of which may load torch."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from common import arguments, show

LOADED = "import sys; print('torch' in sys.modules)"
COMMANDS: list[tuple[str, list[str], str, float | None]] = [  # name, arguments, code that says if torch was loaded, bar
    ("python -c 'pass'", ["-c", "pass"], "", None),
    ("python -c 'import mainstem'", ["-c", "import mainstem"], f"import mainstem; {LOADED}", 0.5),
    (
        "mainstem papers",
        ["-c", "from mainstem.cli import main; main()", "papers"],
        f"import atexit; atexit.register(lambda: exec({LOADED!r})); from mainstem.cli import main; main()",
        0.5,
    ),
    ("python -c 'import torch'", ["-c", "import torch"], "", None),
]


def seconds(arguments: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def loads_torch(code: str, rest: list[str]) -> str:
    if not code:
        return ""
    done = subprocess.run([sys.executable, "-c", code, *rest], check=True, capture_output=True, text=True)
    return "yes" if done.stdout.split()[-1] == "True" else "no"


def main() -> None:
    told = arguments(__doc__, rounds=10)
    times: dict[str, list[float]] = {name: [] for name, *_ in COMMANDS}
    for _ in range(told.rounds):
        for name, rest, _, _ in COMMANDS:
            times[name].append(seconds(rest))
    rows = []
    for name, rest, code, at_most in COMMANDS:
        middle = statistics.median(times[name])
        loaded = loads_torch(code, rest[2:])
        asked = "" if at_most is None else f"≤ {at_most:g} s, no torch: "
        asked += "" if at_most is None else "met" if middle <= at_most and loaded == "no" else "short"
        rows.append([name, f"{middle:.3f}", f"{min(times[name]):.3f}", loaded, asked])
    show("From command to answer", ["command", "median (s)", "fastest (s)", "loads torch", "bar"], rows)


if __name__ == "__main__":
    main()
