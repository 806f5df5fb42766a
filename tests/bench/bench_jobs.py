"""Jobs that need no training: their outcomes follow from the arm, the setting and the seed."""

from __future__ import annotations

import os
import signal
import time

import numpy as np

from mainstem.bench.runner import Job, Outcome
from mainstem.errors import DivergedError

ARMS = ["plain", "better", "diverges", "raises", "dies", "fragile"]


def run(job: Job) -> Outcome:
    arm = job.key.arm
    log = os.environ.get("BENCH_LOG")
    if log:
        with open(log, "a") as lines:
            lines.write(f"{arm} {job.key.kind} {job.key.number}\n")
    if job.key.kind != "cost":
        time.sleep(float(os.environ.get("BENCH_SECONDS", "0")))
    if job.key.kind == "cost":
        return Outcome(cost={"parameters": len(arm), "flops": None, "step_seconds": time.time(), "peak_bytes": 10})
    if arm == "diverges":
        raise DivergedError(7, float("nan"))
    if arm == "raises" and job.key.kind == "final":
        raise ValueError("no such shape")
    if arm == "dies" or (arm == "fragile" and job.key.number in (1, 3)):
        os.kill(os.getpid(), signal.SIGKILL)
    noise = np.random.default_rng([job.seed, len(arm)]).normal(size=20)
    scores = (noise + (arm == "better") - abs(np.log10(job.setting["lr"] / 0.3))).astype("<f4")
    return Outcome(
        value=float(scores.astype(float).mean()),
        loss=1.0,
        steps=3,
        seconds=time.time(),
        curve=[{"step": 3, "seconds": time.time(), "val_loss": float("nan")}],
        scores=scores.tobytes(),
    )
