import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from mainstem import registry
from mainstem.bench import runner
from mainstem.bench.runner import ForkServerRunner, InProcessRunner, Job, Key, Outcome, closing
from mainstem.errors import ConfigurationError, DivergedError

PRELOAD = ["mainstem.bench.runner", "numpy"]


def jobs(n):
    return [Job(Key("arm", "tune", k), None, {"k": k}, seed=k) for k in range(n)]


def outcomes(where, given):
    with closing(where):
        for job in given:
            where.submit(job)
        return {job.key.number: outcome for job, outcome in where.results()}


def test_results_are_those_of_their_jobs_and_come_as_they_finish():
    def slow_first(job):
        time.sleep(0.3 if job.seed == 0 else 0)
        return Outcome(value=job.setting["k"] + 0.5)

    with closing(ForkServerRunner(2, slow_first, PRELOAD)) as workers:
        for job in jobs(4):
            workers.submit(job)
        found = [(job.key.number, outcome.value) for job, outcome in workers.results()]
    assert sorted(found) == [(k, k + 0.5) for k in range(4)]
    assert found[0][0] != 0


def test_jobs_may_be_submitted_while_results_are_read():
    first, *rest = jobs(5)
    for where in (ForkServerRunner(1, lambda job: Outcome(), PRELOAD), InProcessRunner(lambda job: Outcome())):
        with closing(where):
            where.submit(first)
            left, seen = list(rest), []
            for job, _ in where.results():
                seen.append(job.key.number)
                if left:
                    where.submit(left.pop(0))
        assert seen == [0, 1, 2, 3, 4]


def test_whatever_becomes_of_a_job_is_an_outcome():
    def run(job):
        match job.seed:
            case 0:
                raise DivergedError(12, float("inf"))
            case 1:
                raise KeyError("conv9")
            case 2:
                os.kill(os.getpid(), 9)
            case 3:
                os._exit(3)
            case 4:
                raise SystemExit(4)
            case 5:
                raise MemoryError
        return Outcome(value=1.0)

    found = outcomes(ForkServerRunner(2, run, PRELOAD), jobs(7))
    assert [found[k].status for k in range(7)] == ["diverged", "error", "lost", "lost", "lost", "error", "ok"]
    assert found[0].reason == "the loss became inf at step 12" and found[0].steps == 12
    assert found[1].reason.startswith("KeyError: 'conv9'\ntest_runner.py:")
    assert 'raise KeyError("conv9")' in found[1].reason
    assert "killed by SIGKILL" in found[2].reason and "memory" in found[2].reason
    assert "exit status 3" in found[3].reason
    assert found[5].reason.startswith("MemoryError")


def test_in_this_process_failures_are_the_same_outcomes():
    def run(job):
        raise (DivergedError(3, float("nan")) if job.seed else ValueError("wrong"))

    here, there = (outcomes(r, jobs(2)) for r in (InProcessRunner(run), ForkServerRunner(1, run, PRELOAD)))
    assert here == there


def test_a_result_larger_than_a_pipe():
    found = outcomes(ForkServerRunner(1, lambda job: Outcome(scores=bytes(20_000_000)), PRELOAD), jobs(1))
    assert found[0].scores == bytes(20_000_000)


def test_a_job_whose_own_thread_never_ends_does_not_hold_the_others_up(monkeypatch):
    def run(job):
        threading.Thread(target=time.sleep, args=(60,)).start()
        return Outcome(value=2.0)

    monkeypatch.setattr(runner, "PATIENCE", 0.1)
    assert outcomes(ForkServerRunner(1, run, PRELOAD), jobs(1))[0].value == 2.0
    assert multiprocessing.active_children() == []


def test_what_cannot_be_sent_says_which_arm_and_what_to_do():
    lock = threading.Lock()
    with (
        closing(ForkServerRunner(1, lambda job: Outcome(value=float(lock.locked())), PRELOAD)) as workers,
        pytest.raises(ConfigurationError, match="arm arm: .*sent to a worker.*workers=0"),
    ):
        workers.submit(jobs(1)[0])


def test_closing_ends_running_workers():
    def run(job):
        time.sleep(60 if job.seed else 0)
        return Outcome()

    with closing(ForkServerRunner(2, run, PRELOAD)) as busy:
        for job in jobs(3):
            busy.submit(job)
        next(busy.results())
        assert multiprocessing.active_children() != []
    assert multiprocessing.active_children() == []


def test_parts_registered_by_the_caller_are_known_in_workers():
    @registry.register("metric", "only-here")
    def only_here():
        return 41

    try:
        found = outcomes(
            ForkServerRunner(1, lambda job: Outcome(value=registry.find("metric", "only-here")() + 1.0), PRELOAD),
            jobs(1),
        )
    finally:
        del registry._parts["metric"]["only-here"]
    assert found[0].value == 42.0


SCRIPT = """
    from mainstem.bench.runner import ForkServerRunner, Job, Key, Outcome, closing
    print("top level")

    class Mine:
        value = 5.0

    def run(job):
        return Outcome(value=Mine.value)

    with closing(ForkServerRunner(2, run, ["mainstem.bench.runner"])) as runner:
        for k in range(3):
            runner.submit(Job(Key("a", "tune", k), None, {}, 0))
        print([outcome.value for _, outcome in runner.results()])
"""


@pytest.mark.parametrize("how", ["script", "stdin", "module"])
def test_a_script_needs_no_guard(tmp_path, how):
    text = textwrap.dedent(SCRIPT)
    (tmp_path / "unguarded.py").write_text(text)
    command = {"script": ["unguarded.py"], "stdin": ["-"], "module": ["-m", "unguarded"]}[how]
    done = subprocess.run(
        [sys.executable, *command], input=text, capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert done.stdout.splitlines() == ["top level", "[5.0, 5.0, 5.0]"], done.stderr


def test_the_callers_main_module_is_put_back():
    main = sys.modules["__main__"]
    outcomes(ForkServerRunner(1, lambda job: Outcome(), PRELOAD), jobs(1))
    assert sys.modules["__main__"] is main
