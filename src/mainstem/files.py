"""Files that are whole or absent: atomic writes, and reads that name a damaged file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ConfigurationError, DamagedFileError, UnwritableFileError


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well, and is removed when it does not.

    Raises `UnwritableFileError`, with the name of the file, where the block or the replacing meets an `OSError`.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise UnwritableFileError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as JSON, atomically; NaN and Inf are refused, since JSON has neither."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The JSON value in `path`. A file that is truncated or is not JSON raises `DamagedFileError` with its name."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigurationError(f"no such file: {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"{path} is not whole JSON ({error}); remove it or restore a copy") from None


def sha256_of(*values: Any) -> str:
    """A digest over bytes, strings, arrays and tensors, their types and shapes included."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, bytes):
            head, body = "bytes", value
        elif isinstance(value, str):
            head, body = "str", value.encode()
        else:  # an array, or a tensor
            array = value.numpy(force=True) if hasattr(value, "numpy") else value
            head, body = f"{array.dtype}{array.shape}", array.tobytes()
        digest.update(f"{head}:{len(body)};".encode())
        digest.update(body)
    return digest.hexdigest()
