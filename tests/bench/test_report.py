"""The report and the table, from results that were made up."""

import math

import numpy as np

COSTS = [(41_000, 1.2e6, 0.0051, 3.1e6), (269_000, 5.0e6, 0.0178, 8.4e6), (853_000, 1.6e7, 0.049, 2.2e7)]


def made_up(arms=6, seeds=5, tune=4, *, trouble=True, metric="accuracy", spread=0.25):
    """A result as `mainstem compare` writes it: arm 1 is better than the baseline 0, arm 2 ties, later ones vary; with
    `trouble` the last arm failed and one trial and one final run diverged."""
    from mainstem.bench.statistics import summarise

    rng = np.random.default_rng(arms)
    names = [
        "plain-20", "resnet-20", "resnet-20+connection=rezero+norm=none", "wrn-10-2", "plain-56", "resnet-56",
        "preact-resnet-20", "resnet-20+norm=none", "mlp-8x64", "resnet-20+connection=stochastic-depth(final=0.8)",
        "resnet-110", "wrn-16-4",
    ]  # fmt: skip
    levels = [95.6, 98.1, 95.7, 98.4, 88.2, 97.9, 97.0, 94.1, 92.6, 97.2, 96.4, 98.6]
    lower = metric == "nats"
    finals, entries = {}, []
    shared = rng.normal(0, 0.4, seeds)
    for i in range(arms):
        name = names[i] if i < len(names) else f"arm-{i}"
        failed = trouble and i == arms - 1 and arms > 2
        level = levels[i % 12] / 100 if not lower else 2.6 - levels[i % 12] / 90
        runs = []
        for s in range(seeds):
            diverged = trouble and i == 4 and s == 2
            value = level * (100 if not lower else 1) + (shared[s] + rng.normal(0, spread)) * (1 if not lower else 0.01)
            curve = []
            for k in range(1, 11):
                t = k / 10
                gap = math.exp(-5 * t) * (1 + 0.1 * rng.normal())
                seen = value + gap * 1.6 if lower else value - 60 * gap + rng.normal(0, 0.3) * (1 - t)
                loss = 2.3 * gap + 0.02 + 0.002 * i
                curve.append(
                    {"step": 17 * k, "epoch": float(k), "seconds": 0.4 * k, "lr": 0.1 * (1 - t), "train_loss": loss,
                     "val_loss": loss * 1.2 + 0.03, "val_metric": seen}
                )  # fmt: skip
            ok = not (failed or diverged)
            runs.append(
                {
                    "seed": s, "status": "ok" if ok else "error" if failed else "diverged",
                    "reason": None if ok else "the loss became nan at step 41" if diverged else
                    "RuntimeError: mat1 and mat2 shapes cannot be multiplied (64x128 and 64x10)\n"
                    "net.py:41 in forward: return self.head(x)",
                    "value": value if ok else None, "loss": 0.1 if ok else None, "steps": 170, "seconds": 3.4,
                    "curve": curve if ok else [],
                }
            )  # fmt: skip
        finals[name] = [{"seed": r["seed"], "value": r["value"], "scores": None} for r in runs]
        trials = []
        for k in range(tune):
            lr = 0.1 if k == 0 else float(np.exp(rng.uniform(np.log(0.01), np.log(1))))
            bad = failed or (trouble and lr > 0.6)
            value = (levels[i % 12] - 3 * abs(math.log10(lr / 0.15))) * (1 if not lower else 0.015)
            trials.append(
                {"k": k, "setting": {"lr": lr}, "status": "diverged" if bad else "ok",
                 "reason": "the loss became inf at step 12" if bad else None, "value": None if bad else value,
                 "seconds": 3.3}
            )  # fmt: skip
        good = [t for t in trials if t["value"] is not None]
        best = max(good, key=lambda t: t["value"] * (-1 if lower else 1)) if good else None
        parameters, flops, seconds, peak = (c * (1 + 0.37 * (i // 3)) for c in COSTS[i % 3])
        entries.append(
            {
                "name": name, "description": name.replace("+", ", "),
                "status": "failed" if failed else "partial" if any(r["status"] != "ok" for r in runs) else "ok",
                "reason": next((r["reason"] for r in runs if r["reason"]), None),
                "setting": best["setting"] if best else None, "trials": trials, "finals": runs,
                "cost": {"parameters": int(parameters), "flops": None if i == 3 else int(flops),
                         "step_seconds": seconds, "peak_bytes": int(peak)},
            }
        )  # fmt: skip
    summary = summarise(finals, names[0], not lower)
    return {
        "schema": 1,
        "command": "mainstem compare plain-20 resnet-20 --data digits --seeds 5 --tune 4 --budget epochs=10",
        "created": "2025-11-21T10:40:00+00:00",
        "versions": {"mainstem": "0.1.0", "torch": "2.13.0+cpu", "python": "3.11.7"},
        "hardware": {"cpu": "A processor", "cores": 2, "device": "cpu", "threads": 1, "workers": 2},
        "experiment": {"arms": names[:arms], "data": "digits", "budget": "epochs=10", "seeds": list(range(seeds)),
                       "tune": tune, "data_seeds": "fixed", "recipe": {}, "precision": "fp32"},
        "data": {"name": "digits", "task": "classification", "sha256": "ab" * 32,
                 "sizes": {"train": 1077, "val": 360, "test": 360}},
        "metric": {"name": metric, "unit": "nats" if lower else "%", "higher_is_better": not lower},
        "baseline": names[0],
        "arms": [{**entry, **summary[entry["name"]]} for entry in entries],
        "notes": ["resnet-20: the best lr is the largest that finished (0.61); a wider range may do better."]
        if trouble else [],
    }  # fmt: skip
