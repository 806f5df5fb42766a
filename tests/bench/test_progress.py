from mainstem.bench.progress import Display
from mainstem.bench.runner import Finished, Key, Outcome

RUNS = [
    (Key("[red]a", "cost", 0), Finished({}, Outcome(cost={}))),
    (Key("[red]a", "tune", 1), Finished({"lr": 0.012345, "optimiser": "sgd"}, Outcome(value=51.26, seconds=3.14))),
    (Key("[red]a", "final", 7), Finished({"lr": 0.1}, Outcome("error", "ValueError: no\nnet.py:3"))),
]
LINES = [
    "[red]a: cost",
    "[red]a: trial 1 lr=0.0123 optimiser=sgd: 51.26 % in 3.1 s",
    "[red]a: seed 7: error: ValueError: no",
]


def show(shown):
    with Display("%", shown) as display:
        for done, (key, run) in enumerate(RUNS, 1):
            display.finished(key, run, done, 3)
        display.note("so far")


def test_a_line_for_every_run_where_there_is_no_terminal(capsys):
    show(None)
    out, errors = capsys.readouterr()
    assert out == ""
    assert errors.splitlines() == [*(f"[{i}/3] {line}" for i, line in enumerate(LINES, 1)), "so far"]


def test_silence(capsys):
    show(False)
    assert capsys.readouterr() == ("", "")


def test_a_bar_names_what_failed(capsys):
    show(True)
    assert LINES[2] in capsys.readouterr().err
