"""A comparison that is killed and started again ends as one that was not."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import bench_jobs
import bench_study
import psutil
import pytest

SCRIPT = Path(bench_study.__file__)


def start(folder, workers, log, seconds):
    environment = {**os.environ, "BENCH_LOG": str(log), "BENCH_SECONDS": str(seconds)}
    command = [sys.executable, str(SCRIPT), str(folder), str(workers)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        pytest.fail(process.communicate()[1])
    return process


def recorded(folder):
    """What the table holds, by key; seconds are the time at which a run ended, so a repeated run would differ."""
    with sqlite3.connect(folder / "runs.sqlite") as database:
        rows = database.execute("select arm, kind, number, status, value, seconds, cost from runs").fetchall()
    return {row[:3]: row[3:] for row in rows}


def trials(log):
    """The tuning and final runs that have started."""
    return [line for line in log.read_text().splitlines() if " cost " not in line]


def running(process):
    """Whether a process is still there; one that has ended may wait for init to notice."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return bench_study.study(tmp_path_factory.mktemp("unbroken"), 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_eight_kills_change_nothing(tmp_path, unbroken, workers):
    folder, log = tmp_path / "study", tmp_path / "log"
    chance = random.Random(workers)
    log.touch()
    kills: list[tuple[dict, int]] = []
    for rows in sorted(chance.sample(range(46), 8)):  # of 48: costs, tuning, finals
        process = start(folder, workers, log, 0.01)
        while len(recorded(folder)) < rows:
            time.sleep(0.02)
        time.sleep(chance.uniform(0, 0.02))
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.communicate()
        kills.append((recorded(folder), len(log.read_text().splitlines())))
    stages = [sum(kind == "final" for _, kind, _ in known) for known, _ in kills]
    assert stages[0] == 0 < stages[-1], "some in tuning, some among the finals"
    process = start(folder, workers, log, 0)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors

    final = recorded(folder)
    started = [tuple(line.split()) for line in log.read_text().splitlines()]
    for known, lines in kills:
        assert all(final[key] == row for key, row in known.items())
        assert not {(a, k, str(n)) for a, k, n in known} & set(started[lines:])
    assert bench_study.study(folder, workers) == unbroken


@pytest.mark.parametrize("workers", [0, 1])
def test_the_number_of_workers_changes_nothing(tmp_path, unbroken, workers):
    arms = [arm for arm in bench_jobs.ARMS if workers or arm not in ("dies", "fragile")]  # this process would die
    result = bench_study.study(tmp_path, workers, arms=arms)
    expected = {arm["name"]: arm for arm in unbroken["arms"]}
    for arm in result["arms"]:
        for part in ("trials", "finals", "setting", "status", "reason", "mean", "low", "high"):
            assert arm[part] == expected[arm["name"]][part]


def test_failures_are_results_and_the_others_finish(unbroken):
    arms = {arm["name"]: arm for arm in unbroken["arms"]}
    assert {name: arm["status"] for name, arm in arms.items()} == {
        "plain": "ok", "better": "ok", "diverges": "failed", "raises": "failed", "dies": "failed", "fragile": "partial",
    }  # fmt: skip
    assert "the loss became nan at step 7" in arms["diverges"]["reason"]
    assert arms["diverges"]["finals"] == [] and len(arms["diverges"]["trials"]) == 5
    assert "ValueError: no such shape" in arms["raises"]["reason"]
    assert [run["status"] for run in arms["raises"]["finals"]] == ["error"] * 3
    assert "killed by SIGKILL" in arms["dies"]["reason"]
    assert [trial["status"] for trial in arms["fragile"]["trials"]] == ["ok", "lost", "ok", "lost", "ok"]
    assert [run["status"] for run in arms["fragile"]["finals"]] == ["ok", "lost", "ok"]
    assert arms["better"]["difference"]["verdict"] == "better"
    assert arms["dies"]["mean"] is None and arms["dies"]["difference"]["verdict"] == "unknown"
    assert any("fragile: 1 of 3 final runs failed" in note for note in unbroken["notes"])
    json.dumps(unbroken, allow_nan=False)


def test_every_arm_has_equal_trials_and_fresh_seeds(unbroken):
    for arm in unbroken["arms"]:
        assert [trial["k"] for trial in arm["trials"]] == [0, 1, 2, 3, 4]
        assert arm["trials"][0]["setting"] == {"lr": 0.1}
    assert [run["seed"] for run in unbroken["arms"][0]["finals"]] == [0, 1, 2]


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_worker_outlives_its_coordinator(tmp_path, kill):
    process = start(tmp_path / "study", 2, tmp_path / "log", 60)
    deadline = time.monotonic() + 30
    while not (tmp_path / "log").exists() or len(trials(tmp_path / "log")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # the server and two workers
    process.send_signal(kill)
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while any(running(child) for child in children):
        assert time.monotonic() < deadline, children
        time.sleep(0.01)
    assert {kind for _, kind, _ in recorded(tmp_path / "study")} == {"cost"}


def test_two_at_once_on_one_folder(tmp_path):
    process = start(tmp_path / "study", 1, tmp_path / "log", 60)
    second = [sys.executable, str(SCRIPT), str(tmp_path / "study"), "1"]
    refused = subprocess.run(second, capture_output=True, text=True, timeout=60)
    process.kill()
    process.communicate()
    assert refused.returncode != 0
    assert f"{tmp_path / 'study'} is in use by process {process.pid} on " in refused.stderr
