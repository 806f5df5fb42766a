"""`mainstem compare` and the command line around it."""

import json
import subprocess
import sys

import pytest

from mainstem.cli import COMMANDS, main


def call(capsys, *arguments):
    """The exit code, standard output and standard error of a command line."""
    with pytest.raises(SystemExit) as ended:
        main([str(a) for a in arguments])
    output = capsys.readouterr()
    return ended.value.code or 0, output.out, output.err


@pytest.fixture
def caught(monkeypatch):
    """The experiments and options that would run; nothing does."""
    import mainstem.bench

    calls = []

    def run(experiment, **options):
        calls.append((experiment, options))
        raise KeyboardInterrupt

    monkeypatch.setattr(mainstem.bench, "run", run)
    return calls


def chosen(capsys, caught, *arguments):
    """The experiment that a command line asks for."""
    code, _, err = call(capsys, "compare", *arguments)
    assert caught, err
    assert code != 2
    return caught.pop()


def test_help_lists_every_command_with_a_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for name, line in COMMANDS.items():
        assert name in out and line in out


def test_help_of_compare_shows_options_and_examples(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = call(capsys, "compare", "--help")
    assert code == 0
    for option in (
        "--data", "--baseline", "--seeds", "--tune", "--budget", "--metric", "--device", "--workers", "--dry-run",
        "--out", "--json", "--target", "--experiment", "--recipe", "--threads", "--redraw",
    ):  # fmt: skip
        assert option in out
    assert out.count("mainstem compare") >= 5


def test_the_command_line_imports_nothing_heavy():
    script = """
import sys
from mainstem.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
heavy = {"torch", "numpy", "pandas", "scipy", "sqlalchemy", "optuna", "sklearn"} & set(sys.modules)
commands = [name for name in sys.modules if name.startswith("mainstem.cli.")]
assert not heavy, heavy
print(commands)
"""
    for arguments, expected in [
        (["--help"], "[]"),
        (["compare", "--help"], "['mainstem.cli.pairs', 'mainstem.cli.compare']"),
    ]:
        ran = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True)
        assert ran.stdout.splitlines()[-1] == expected


def test_options_become_an_experiment(capsys, caught):
    experiment, options = chosen(
        capsys, caught, "resnet-14", "resnet-20+connection=rezero+norm=none+lr=0.05", "--data", "digits",
        "--baseline", "resnet-14", "--seeds", "3", "--tune", "2", "--budget", "steps=7", "--metric", "nats", "--device",
        "cpu", "--workers", "2", "--threads", "1", "--out", "somewhere", "--recipe", "batch_size=32",
        "--recipe", "optimiser=adamw", "--redraw",
    )  # fmt: skip
    assert [arm.name for arm in experiment.arms] == ["resnet-14", "resnet-20+connection=rezero+norm=none+lr=0.05"]
    assert experiment.arms[1].recipe == {"lr": 0.05}
    assert experiment.final_seeds == (0, 1, 2)
    assert (experiment.tune, str(experiment.budget), experiment.metric) == (2, "steps=7", "nats")
    assert experiment.recipe == {"batch_size": 32, "optimiser": "adamw"}
    assert experiment.data_seeds == "redrawn"
    assert options["workers"] == 2 and str(options["out"]) == "somewhere"


def test_seeds_may_be_listed(capsys, caught):
    experiment, _ = chosen(capsys, caught, "resnet-14", "--data", "digits", "--seeds", "7,3")
    assert experiment.final_seeds == (7, 3)


def test_a_file_with_options_beside_it(tmp_path, capsys, caught):
    path = tmp_path / "experiment.yaml"
    path.write_text(
        "arms: [resnet-14, resnet-20]\ndata: digits\nseeds: 4\nbudget: {epochs: 2}\n"
        "recipe: {lr: 0.2, batch_size: 16}\nspace: {lr: {low: 1e-3, high: 1, log: true}}\n"
    )
    for given in ([path], ["--experiment", path]):
        experiment, _ = chosen(capsys, caught, *given, "--tune", "1", "--recipe", "lr=0.3")
        assert [arm.name for arm in experiment.arms] == ["resnet-14", "resnet-20"]
        assert (experiment.tune, len(experiment.final_seeds), str(experiment.budget)) == (1, 4, "epochs=2")
        assert experiment.recipe == {"lr": 0.3, "batch_size": 16}
        assert experiment.space["lr"].low == 0.001
    experiment, _ = chosen(capsys, caught, "resnet-56", "--experiment", path)
    assert [arm.name for arm in experiment.arms] == ["resnet-56"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "arms: name at least one"),
        (["resnet-14"], "data: say on what to compare"),
        (["resnet-14", "--data", "digits", "--seeds", "many"], "seeds: 'many' is neither"),
        (["resnet-14", "--data", "digits", "--budget", "steps=-4"], "budget"),
        (["resnet-14", "--data", "digits", "--budget", "forever"], "'forever' is not of the form"),
        (["resnet-14", "--data", "digits", "--recipe", "lr"], "recipe: 'lr' is not of the form key=value"),
        (["resnet-14", "--data", "digits", "--recipe", "learning_rate=1"], "learning_rate"),
        (["resnet-14", "--data", "digits", "--baseline", "resnet-1"], "did you mean 'resnet-14'"),
        (["resnet-14", "resnet-14", "--data", "digits"], "more than one is called 'resnet-14'"),
        (["nothing-here.yaml"], "nothing-here.yaml: No such file"),
        (["resnet-2O", "--data", "digits", "--seeds", "1"], "resnet-2O"),
        (["resnet-14", "--data", "digitz", "--seeds", "1"], "did you mean 'digits'"),
        (["resnet-14", "--data", "digits", "--metric", "acuracy", "--seeds", "1"], "did you mean 'accuracy'"),
    ],
)
def test_a_mistake_is_one_readable_message(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capsys, "compare", *arguments)
    assert code == 2
    assert message in err and err.startswith("mainstem: ")
    assert "Traceback" not in err and not out
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_names_the_nearest(capsys):
    code, _, err = call(capsys, "comapre")
    assert code == 2 and "'compare'" in err


def test_version(capsys):
    from mainstem import __version__

    assert call(capsys, "--version") == (0, f"mainstem {__version__}\n", "")


ARMS = ["mlp-2x8", "mlp-2x8+name=wide+lr=0.2", "--data", "digits", "--seeds", "2", "--tune", "0", "--budget", "steps=4"]


def test_a_comparison_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    folder = tmp_path / "run"
    code, out, _ = call(capsys, "compare", *ARMS, "--workers", "0", "--out", folder)
    assert code == 0
    assert "mlp-2x8" in out and "wide" in out and "verdict" in out
    assert out.splitlines()[-1] == f"Report: {folder / 'report.html'}"
    result = json.loads((folder / "result.json").read_text())
    assert [len(arm["finals"]) for arm in result["arms"]] == [2, 2]
    assert result["arms"][0]["cost"]["flops"] > 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "wide" in page and result["data"]["sha256"] in page

    code, again, err = call(capsys, "compare", *ARMS, "--workers", "0", "--out", folder, "--json")
    assert code == 0
    assert json.loads(again)["arms"] == result["arms"]  # found in the folder, not run anew
    assert "report.html" in err


def test_a_dry_run_runs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    code, out, _ = call(capsys, "compare", *ARMS, "--dry-run")
    assert code == 0
    assert "4 runs on digits" in out and "Nothing was run" in out
    assert list(tmp_path.iterdir()) == []
