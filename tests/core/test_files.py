"""Files are whole or absent, also when a write fails half-way."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch

from mainstem import files
from mainstem.errors import ConfigurationError, DamagedFileError, MainstemError, UnwritableFileError


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with files.replacing(path) as temporary:
        temporary.write_text("half")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "half"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": [1, 2.5, None]})
    assert files.read_json(path) == {"a": [1, 2.5, None]}
    for value, error in [(float("nan"), ValueError), (float("inf"), ValueError), (object(), TypeError)]:
        with pytest.raises(error):
            files.write_json(path, {"a": value})
    assert files.read_json(path) == {"a": [1, 2.5, None]}


def test_permissions_are_those_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_text_is_utf8(tmp_path):
    files.write_text(tmp_path / "a.txt", "α\n")
    assert (tmp_path / "a.txt").read_bytes() == "α\n".encode()


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"[1, 2]]"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "damaged.json"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"damaged\.json is not whole JSON"):
        files.read_json(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no such file: .*missing\.json"):
        files.read_json(tmp_path / "missing.json")


def test_a_folder_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UnwritableFileError, match=r"file/a\.txt cannot be written: ") as caught:
        files.write_text(tmp_path / "file" / "a.txt", "x")
    assert isinstance(caught.value, MainstemError) and isinstance(caught.value, OSError)
    assert caught.value.filename == str(tmp_path / "file" / "a.txt") and caught.value.errno


FULL_DISK = """
import resource, signal, sys
from mainstem import files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
files.write_text(sys.argv[1], "small")
try:
    files.write_text(sys.argv[1], "x" * 5000)
except files.UnwritableFileError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    ran = subprocess.run([sys.executable, "-c", FULL_DISK, path], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"{path} cannot be written: File too large"
    assert path.read_text() == "small"
    assert list(tmp_path.iterdir()) == [path]


def test_a_digest_tells_types_shapes_and_borders_apart():
    values = [
        (b"ab",),
        ("ab",),
        ("a", "b"),
        (np.zeros(2),),
        (np.zeros(2, np.float32),),
        (np.zeros((1, 2)),),
        (np.zeros(1), np.zeros(1)),
        (np.array([0.0, 1.0]),),
    ]
    digests = [files.sha256_of(*value) for value in values]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 for digest in digests)
    assert files.sha256_of(torch.zeros(2, dtype=torch.double)) == files.sha256_of(np.zeros(2))
    x = torch.arange(6).view(2, 3)
    assert files.sha256_of(x.T) == files.sha256_of(x.T.contiguous())


def test_json_is_readable(tmp_path):
    files.write_json(tmp_path / "a.json", {"a": {"b": 1}})
    text = (tmp_path / "a.json").read_text()
    assert text.endswith("}\n") and len(text.splitlines()) > 3 and json.loads(text) == {"a": {"b": 1}}
