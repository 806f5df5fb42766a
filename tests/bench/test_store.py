import math
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mainstem.bench.runner import Key, Outcome
from mainstem.bench.store import Store, locked
from mainstem.errors import ConfigurationError, DamagedFileError, MainstemError

STUDY = {"experiment": {"seeds": [0, 1], "arms": [{"name": "a", "recipe": {"lr": 0.1}}]}, "versions": {"torch": "2"}}
RUN = Outcome(
    value=0.5,
    loss=math.inf,
    steps=9,
    seconds=1.5,
    curve=[{"step": 1, "val_loss": math.nan}],
    scores=b"\x00\x01",
    cost={"flops": None},
)


def filled(folder, runs=1):
    store = Store(folder, STUDY)
    for k in range(runs):
        store.add(Key("a", "tune", k), {"lr": 0.1 + k, "betas": (0.9, 0.99)}, RUN)
    store.close()
    return folder / "runs.sqlite"


def test_runs_are_found_again_as_they_were_recorded(tmp_path):
    store = Store(tmp_path, STUDY)
    store.add(Key("<a>", "final", 7), {"lr": 1e-17, "betas": (0.9, 0.99)}, RUN)
    store.add(Key("<a>", "final", 2**40), {}, Outcome("lost", "its worker was killed"))
    store.close()
    again = Store(tmp_path, STUDY)
    assert again.runs == store.runs
    assert again.created == store.created
    found = again.runs[Key("<a>", "final", 7)]
    assert found.setting == {"lr": 1e-17, "betas": [0.9, 0.99]}
    assert (found.outcome.value, found.outcome.loss, found.outcome.scores) == (0.5, None, b"\x00\x01")
    assert found.outcome.curve == [{"step": 1, "val_loss": None}]


def test_a_run_is_recorded_once(tmp_path):
    store = Store(tmp_path, STUDY)
    store.add(Key("a", "tune", 0), {}, RUN)
    other = Store(tmp_path, STUDY)
    with pytest.raises(MainstemError, match="tune 0 of arm a is recorded already"):
        other.add(Key("a", "tune", 0), {}, RUN)
    assert len(Store(tmp_path, STUDY).runs) == 1


def test_another_experiment_is_refused_and_the_fields_named(tmp_path):
    filled(tmp_path)
    other = {
        "experiment": {"seeds": [0, 1], "arms": [{"name": "a", "recipe": {"lr": 0.2}}]},
        "versions": {"torch": "3"},
    }
    with pytest.raises(ConfigurationError) as error:
        Store(tmp_path, other)
    assert "experiment.arms.0.recipe.lr: 0.1 there, 0.2 now" in str(error.value)
    assert 'versions.torch: "2" there, "3" now' in str(error.value)
    assert "seeds" not in str(error.value)


@pytest.mark.parametrize("damage", ["empty", "truncated", "cut page", "text", "another database", "header"])
def test_a_damaged_file_is_named_and_never_a_new_study(tmp_path, damage):
    path = filled(tmp_path, 40)
    whole = path.read_bytes()
    if damage == "another database":
        path.unlink()
        with sqlite3.connect(path) as database:
            database.execute("create table notes (x)")
    else:
        contents = {
            "empty": b"",
            "truncated": whole[: len(whole) // 2],
            "cut page": whole[:-1000],
            "text": b"runs, as text" * 100,
            "header": whole[:50],
        }
        path.write_bytes(contents[damage])
    before = path.read_bytes()
    with pytest.raises(DamagedFileError, match=str(path)):
        Store(tmp_path, STUDY)
    assert path.read_bytes() == before


def test_studies_share_a_database_by_url(tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.sqlite'}"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        store = Store(tmp_path / name, {**STUDY, "name": name}, url)
        store.add(Key("a", "tune", 0), {}, Outcome(value=float(len(name))))
        store.close()
        assert not (tmp_path / name / "runs.sqlite").exists()
    assert len(Store(tmp_path / "one", {**STUDY, "name": "one"}, url).runs) == 1
    with pytest.raises(ConfigurationError, match='name: "two" there, "one" now'):
        Store(tmp_path / "two", {**STUDY, "name": "one"}, url)


@pytest.mark.parametrize("url", ["nonsense", "postgresql+nodriver://u:secret@host/db", "sqlite:////proc/no/such.db"])
def test_a_database_that_does_not_answer(tmp_path, url):
    with pytest.raises(MainstemError) as error:
        Store(tmp_path, STUDY, url)
    assert "secret" not in str(error.value)


SMALL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_store import RUN, STUDY, Key, MainstemError, Store
store = Store(Path(sys.argv[1]), STUDY)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    for k in range(1000):
        store.add(Key("a", "tune", k), {{"note": "x" * 500}}, RUN)
except MainstemError as error:
    print(k, error)
"""


def test_a_full_disk_is_an_error_and_leaves_the_runs_before(tmp_path):
    script = SMALL_DISK.format(here=os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    count, _, message = done.stdout.partition(" ")
    assert f"{tmp_path / 'runs.sqlite'} cannot be written" in message, done.stderr
    assert "The runs recorded before are kept" in message
    store = Store(tmp_path, STUDY)
    assert set(store.runs) == {Key("a", "tune", k) for k in range(int(count))}
    store.add(Key("a", "tune", int(count)), {}, RUN)


def test_a_disk_too_full_to_begin(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(MainstemError, match=r"runs.sqlite cannot be made"):
            Store(tmp_path, STUDY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "runs.sqlite").exists()
    assert Store(tmp_path, STUDY).runs == {}


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(ConfigurationError, match="out: /proc/here cannot be written to"), locked(Path("/proc/here")):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be written to"), locked(tmp_path / "file" / "study"):
        pass


READ_ONLY = """
import os, sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_store import RUN, STUDY, Key, MainstemError, Store, locked
folder = Path(sys.argv[1])
folder.chmod(0o555)
if os.getuid() == 0:  # root may write anywhere
    os.setuid(65534)
try:
    with locked(folder):
        Store(folder, STUDY)
except MainstemError as error:
    print(error)
try:
    Store(folder, STUDY).add(Key("a", "tune", 99), {{}}, RUN)
except MainstemError as error:
    print(error)
"""


def test_a_read_only_folder():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        filled(folder)
        script = READ_ONLY.format(here=os.path.dirname(__file__))
        done = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, timeout=60)
        folder.chmod(0o755)
        first, second = done.stdout.splitlines() or [done.stderr, ""]
        assert first == f"out: {folder} cannot be written to (Permission denied)"
        assert second.startswith(f"{folder / 'runs.sqlite'} cannot be written: ")
        assert set(Store(folder, STUDY).runs) == {Key("a", "tune", 0)}


def test_the_lock_is_released_and_names_its_holder(tmp_path):
    with locked(tmp_path):
        assert f"process {os.getpid()} on " in (tmp_path / "lock").read_text()
        with pytest.raises(MainstemError, match=f"in use by process {os.getpid()} on "), locked(tmp_path):
            pass
    with locked(tmp_path):
        pass
