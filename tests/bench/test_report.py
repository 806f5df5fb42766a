"""The report and the table, from results that were made up."""

import copy
import html.parser
import io
import math
import re

import numpy as np
import pytest

from mainstem.bench import charts, svg, wording
from mainstem.bench.report import render, write
from mainstem.bench.statistics import summarise
from mainstem.bench.table import print_plan, print_result

COSTS = [(41_000, 1.2e6, 0.0051, 3.1e6), (269_000, 5.0e6, 0.0178, 8.4e6), (853_000, 1.6e7, 0.049, 2.2e7)]


def made_up(arms=6, seeds=5, tune=4, *, trouble=True, metric="accuracy", spread=0.25):
    """A result as `mainstem compare` writes it: arm 1 is better than the baseline 0, arm 2 ties, later ones vary; with
    `trouble` the last arm failed and one trial and one final run diverged."""
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


class Page(html.parser.HTMLParser):
    """Elements, attributes and text of a page, with a check that elements are closed in order."""

    VOID = frozenset({"meta", "input", "br"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def every_state():
    yield "six arms", made_up(6)
    yield "one arm", made_up(1, trouble=False)
    yield "two arms", made_up(2, trouble=False)
    yield "twelve arms", made_up(12)
    yield "lower is better", made_up(5, metric="nats")
    yield "one seed, no tuning", made_up(3, seeds=1, tune=0)
    yield "no spread", made_up(3, spread=0.0)
    failed = made_up(3)
    for arm in failed["arms"]:
        arm |= {"status": "failed", "reason": "RuntimeError", "mean": None, "low": None, "high": None}
        arm |= {"setting": None, "finals": [], "cost": dict.fromkeys(arm["cost"])}
        for trial in arm["trials"]:
            trial |= {"status": "error", "reason": None, "value": None}
        if arm["difference"]:
            arm["difference"] = dict.fromkeys(arm["difference"]) | {"verdict": "unknown"}
    yield "nothing finished", failed
    bare = made_up(3)
    for run in (run for arm in bare["arms"] for run in arm["finals"]):
        run["curve"] = [{**point, "val_loss": None} for point in run["curve"][:1]]
    yield "a curve of one point", bare


STATES = dict(every_state())


@pytest.mark.parametrize("state", STATES)
def test_every_result_has_a_whole_page(state):
    result = STATES[state]
    text = render(result)
    page = Page(text)
    for arm in result["arms"]:
        assert arm["name"].replace("+", " +") in page.words or arm["name"] in page.words
    for _, value in page.attributes:
        assert value is None or not re.search(r"\b(nan|inf|None)\b", value)
    assert result["data"]["sha256"] in page.words
    assert result["command"] in page.words
    assert "2.13.0+cpu" in page.words


def test_a_page_needs_nothing_else():
    text = render(made_up(6))
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href", "srcset") or name.startswith("on")]
    assert "@import" not in text and "http" not in re.sub(r'http-equiv="[^"]*"', "", text)
    assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", text))
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = [value for name, value in page.attributes if name == "for"]
    assert set(references) <= set(ids)


@pytest.mark.parametrize("arms", [3, 9])
def test_markup_in_names_and_data_is_only_text(arms):
    evil = '<script>alert("x")</script><img src=x onerror=alert(1)>\'"></style></svg>&'
    result = copy.deepcopy(made_up(arms))
    first = result["arms"][0]
    old = first["name"]
    for arm in result["arms"]:
        arm["description"] = arm["reason"] = evil
        arm["name"] = arm["name"].replace(old, evil)
        for run in [*arm["finals"], *arm["trials"]]:
            run["reason"] = evil
        for trial in arm["trials"]:
            trial["setting"] = {evil: evil}
        arm["setting"] = {evil: evil}
    result |= {"baseline": evil, "command": evil, "notes": [evil], "created": evil}
    result["data"] |= {"name": evil, "task": evil}
    result["metric"] |= {"name": evil, "unit": evil}
    result["versions"] = {evil: evil}
    result["hardware"] |= {"cpu": evil, "device": evil}
    result["experiment"] |= {"budget": evil, "recipe": {evil: evil}}
    page = Page(render(result))
    harmless = Page(render(made_up(arms)))
    assert set(page.tags) <= set(harmless.tags) | {"br"}
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    assert 'alert("x")' in page.words


def test_verdicts_failures_and_what_could_have_been_seen_are_told():
    result = made_up(6)
    words = Page(render(result)).words
    assert wording.headline(result) == "wrn-10-2 beats plain-20 by 2.54 points"
    assert "2 better than, 1 tied with, 1 worse than plain-20; 1 failed" in words
    assert "mat1 and mat2 shapes cannot be multiplied" in words
    assert "final runs, seeds 0, 1, 2, 3, 4" in words
    assert "4 of 5 runs finished" in words
    assert "Not counted for wrn-10-2" in words  # it has no FLOPs
    tie = next(arm for arm in result["arms"] if arm["difference"] and arm["difference"]["verdict"] == "tie")
    assert f"{tie['difference']['detectable']:.2f}" in words


def test_writing_replaces_the_file(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    write(made_up(2), path)
    assert path.read_text(encoding="utf-8") == render(made_up(2))
    assert list(tmp_path.iterdir()) == [path]


def printed(result, width=None):
    file = io.StringIO()
    print_result(result, file, width)
    return file.getvalue()


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_its_terminal(state, width):
    result = STATES[state]
    text = printed(result, width)
    assert max(map(len, text.splitlines())) <= width
    together = re.sub(r"\s", "", text)
    assert all(re.split(r"[+]", arm["name"])[0] in together for arm in result["arms"])
    assert re.sub(r"\s", "", wording.headline(result)) in together


def test_the_table_says_what_the_report_says():
    text = printed(made_up(6))
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines() if "  " in line}
    assert "98.37 ± 1.10" in rows["wrn-10-2"] and "+2.54 ± 0.29" in rows["wrn-10-2"]
    assert "▲ better" in rows["wrn-10-2"] and "▼ worse" in rows["plain-56"] and "failed" in rows["resnet-56"]
    assert "= tie" in rows["resnet-20+connection=rezero+norm=none"]
    assert "a true difference of 0.89 points would have been seen 4 times in 5" in text
    assert "\x1b" not in text  # plain where it is not a terminal


def test_brackets_in_names_are_not_taken_for_styles():
    result = made_up(2, trouble=False)
    result["arms"][1]["name"] = "[red]arm[/red]"
    assert "[red]arm[/red]" in printed(result)


def test_a_plan_says_what_would_run_and_for_how_long():
    arm = {"name": "resnet-20", "description": "", "runs": 9, "steps": 1700, "step_seconds": 0.02, "seconds": 34.0}
    plan = {
        "arms": [{**arm, "reason": None}, {**arm, "name": "odd", "steps": None, "seconds": None, "reason": "KeyError"}],
        "runs": 18, "workers": 2, "seconds": 153.0, "data": {"name": "digits"}, "metric": {},
    }  # fmt: skip
    file = io.StringIO()
    print_plan(plan, file)
    text = file.getvalue()
    assert "18 runs on digits, about 2 min 33 s with 2 workers. Nothing was run." in text
    assert "1 700" in text and "34.0 s" in text and "odd would fail: KeyError" in text


def test_numbers_as_people_read_them():
    assert [wording.count(n) for n in (None, 0, 950, 269_434, 36_479_194, 999_999)] == [
        "–", "0", "950", "269 k", "36.5 M", "1.00 M",
    ]  # fmt: skip
    assert [wording.duration(s) for s in (2e-5, 0.0178, 2.4, 59.9, 80, 3900)] == [
        "20.0 µs", "17.8 ms", "2.40 s", "59.9 s", "1 min 20 s", "1 h 5 min",
    ]  # fmt: skip
    assert [wording.probability(p) for p in (None, 0.0004, 0.0421, 0.31)] == ["–", "<0.001", "0.042", "0.31"]
    assert wording.size(8_791_448) == "8.79 MB"


def test_headlines():
    assert wording.headline(STATES["one arm"]).startswith("plain-20 reaches")
    assert wording.headline(STATES["nothing finished"]) == "No arm finished"
    assert wording.headline(STATES["one seed, no tuning"]) == "Too few runs for a verdict"
    same = made_up(2, trouble=False)
    same["arms"][1]["difference"]["verdict"] = "tie"
    assert wording.headline(same) == "resnet-20 and plain-20 tie"
    same["arms"][1]["difference"]["verdict"] = "worse"
    assert wording.headline(same) == "plain-20 beats the other arm"


def test_ticks_are_round_and_inside():
    assert svg.Scale(0.3, 9.7, 0, 100).ticks(5) == [2, 4, 6, 8]
    assert svg.Scale(73.9, 100.2, 0, 100).ticks(6) == [75, 80, 85, 90, 95, 100]
    assert svg.Scale(3e4, 2e6, 0, 100, log=True).ticks(6) == pytest.approx([3e4, 1e5, 3e5, 1e6])
    assert svg.Scale(4e4, 6e4, 0, 100, log=True).ticks(6) == pytest.approx([4e4, 5e4, 6e4])
    assert svg.Scale(1, 1000, 0, 90, log=True)(10) == pytest.approx(30)
    assert svg.spread([5.0, 5.0]) != (5.0, 5.0)
    assert svg.Scale(61, 99, 0, 100).ticks(2) == [70, 80, 90]


def test_tick_labels_have_the_decimals_that_tell_them_apart():
    linear, log = svg.Scale(0, 1, 0, 1), svg.Scale(1, 10, 0, 1, log=True)
    assert svg.tick_labels(linear, [95.0, 95.5, 96.0], str) == ["95.0", "95.5", "96.0"]
    assert svg.tick_labels(linear, [80.0, 90.0], str) == ["80", "90"]
    assert svg.tick_labels(log, [0.01, 0.1], wording.duration) == ["10 ms", "100 ms"]
    assert svg.tick_labels(log, [3e5, 1.5e6, 1e7], wording.count) == ["300 k", "1.5 M", "10 M"]


def test_labels_keep_apart_and_stay_inside():
    placed = charts.apart([50.0, 51.0, 52.0, 120.0], 0, 200)
    gaps = np.diff(sorted(placed))
    assert gaps.min() >= svg.LINE - 0.5
    assert placed == sorted(placed) and placed[3] == 120
    crowded = charts.apart([10.0] * 12, 0, 100)
    assert min(crowded) >= -1 and max(crowded) <= 101
    taken = []
    for _ in range(6):
        charts.place(100, 100, 60, (0, 0, 300, 200), taken)
    overlaps = [charts._overlap(a, b) for i, a in enumerate(taken) for b in taken[:i]]
    assert max(overlaps) == 0


def test_the_front_is_what_no_cheaper_arm_equals():
    points = [charts.Point(n, 0, x, y) for n, x, y in [("a", 1, 5), ("b", 2, 7), ("c", 3, 6), ("d", 4, 7), ("e", 5, 8)]]
    assert [p.name for p in charts.frontier(points, True)] == ["a", "b", "e"]
    assert [p.name for p in charts.frontier(points, False)] == ["a"]
