"""mainstem predict on what mainstem train saved, whatever the inputs are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from mainstem import Connection, Layer, Network, Stream, load, registry
from mainstem.cli import main
from mainstem.data import load as load_data
from mainstem.network import takes


def run(*arguments) -> int:
    try:
        main([str(a) for a in arguments])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def predicted(capsys, *arguments) -> list[dict]:
    capsys.readouterr()
    assert run("predict", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """A table whose classes are words, one of them odd, and a network on it."""
    folder, draw = tmp_path_factory.mktemp("flowers"), np.random.RandomState(0)
    kind = draw.randint(3, size=150)
    table = pd.DataFrame({"length": kind + 0.2 * draw.randn(150), "width": draw.rand(150)})
    table["kind"] = np.array(["[red] rose", "tulip", "<b>aster</b>"])[kind]
    table.to_csv(folder / "flowers.csv", index=False)
    options = ["--budget", "epochs=20", "--recipe", "lr=0.05", "--recipe", "batch_size=16"]
    name = "mlp-1x16+classes=5"  # more outputs than there are classes
    assert (
        run(
            "train",
            name,
            "--data",
            f"csv:{folder / 'flowers.csv'}",
            "--target",
            "kind",
            *options,
            "--out",
            folder / "net",
        )
        == 0
    )
    return folder


def test_rows_get_a_class_with_probabilities(flowers, capsys):
    rows = predicted(capsys, flowers / "net", flowers / "flowers.csv")
    truth = pd.read_csv(flowers / "flowers.csv").kind
    assert len(rows) == 150 and rows[0]["input"] == f"{flowers / 'flowers.csv'}:1"
    assert np.mean([row["prediction"] == kind for row, kind in zip(rows, truth, strict=True)]) > 0.9
    for row in rows:
        assert set(row["probabilities"]) == {"[red] rose", "tulip", "<b>aster</b>"}
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)


def test_predictions_are_the_networks(flowers, capsys):
    data = load_data(f"csv:{flowers / 'flowers.csv'}", target="kind")
    x = data.prepare(flowers / "flowers.csv")
    expected = load(flowers / "net")(x)[:, :3].softmax(1)
    rows = predicted(capsys, flowers / "net", flowers / "flowers.csv")
    found = torch.tensor([[row["probabilities"][label] for label in data.labels] for row in rows])
    torch.testing.assert_close(found, expected)


def test_a_table_on_the_terminal_is_short_and_literal(flowers, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()
    assert run("predict", flowers / "net", flowers / "flowers.csv") == 0
    out = capsys.readouterr().out
    assert "[red] rose" in out and "... and 130 more; --out FILE or --json gives them all" in out
    assert sum("flowers.csv:" in line for line in out.splitlines()) == 20


def test_a_csv_has_a_column_for_each_class(flowers, tmp_path, capsys):
    capsys.readouterr()
    assert run("predict", flowers / "net", flowers / "flowers.csv", "--out", tmp_path / "found.csv") == 0
    assert capsys.readouterr().out.strip() == f"Wrote 150 rows to {tmp_path / 'found.csv'}"
    table = pd.read_csv(tmp_path / "found.csv")
    assert list(table.columns) == ["input", "prediction", "p(<b>aster</b>)", "p([red] rose)", "p(tulip)"]
    np.testing.assert_allclose(table.iloc[:, 2:].sum(axis=1), 1, atol=1e-5)


def test_arrays_and_several_files(flowers, tmp_path, capsys):
    table = pd.read_csv(flowers / "flowers.csv").drop(columns="kind")
    np.savez(tmp_path / "rows.npz", x=table.to_numpy())
    table.head(1).to_csv(tmp_path / "one.csv", index=False)
    whole = predicted(capsys, flowers / "net", tmp_path / "rows.npz", tmp_path / "one.csv")
    assert len(whole) == 151 and whole[-1]["input"] == str(tmp_path / "one.csv")
    assert whole[0]["probabilities"] == pytest.approx(whole[-1]["probabilities"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.drop(columns="width"), "missing column: unknown 'width'"),
        (lambda t: t.assign(width="wide"), "row 1, column 'width' holds text, 'wide'"),
        (lambda t: t.assign(width=[np.nan] + [0.0] * (len(t) - 1)), "row 1, column 'width' holds no value"),
        (lambda t: t.head(0), "has no rows below its column names"),
    ],
)
def test_wrong_rows_are_named(flowers, tmp_path, capsys, change, message):
    change(pd.read_csv(flowers / "flowers.csv")).to_csv(tmp_path / "wrong.csv", index=False)
    capsys.readouterr()
    assert run("predict", flowers / "net", tmp_path / "wrong.csv") == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("mainstem: ") and "wrong.csv" in err and message in err


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors"])
def test_a_damaged_folder_is_named(flowers, tmp_path, capsys, damage):
    for name in ("config.json", "model.safetensors"):
        content = (flowers / "net" / name).read_bytes()
        (tmp_path / name).write_bytes(content[:50] if name == damage else content)
    assert run("predict", tmp_path, flowers / "flowers.csv") == 2
    assert damage in capsys.readouterr().err


def test_a_network_saved_without_its_data_is_told(flowers, tmp_path, capsys):
    load(flowers / "net").save(tmp_path)
    assert run("predict", tmp_path, flowers / "flowers.csv") == 2
    assert "does not say how to read new examples; mainstem train saves that" in capsys.readouterr().err


def test_a_device_that_is_not_here_is_named(flowers, capsys):
    assert run("predict", flowers / "net", flowers / "flowers.csv", "--device", "abacus") == 2
    assert "device: 'abacus' cannot be used here" in capsys.readouterr().err


# Text, with a network that a user registered


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    @registry.register("network", "toy-text-<width>")
    @takes("tokens")
    def toy_text(*, width, classes, connection=None):
        """Each character from the one before."""
        stream = Stream([Layer(nn.Linear(width, width), Connection(width))])
        return Network(nn.Embedding(classes, width), stream, nn.Linear(width, classes), inputs="tokens")

    folder = tmp_path_factory.mktemp("text")
    (folder / "abc.txt").write_text("abc.\n" * 400)
    options = ["--budget", "steps=60", "--recipe", "optimiser=adam", "--recipe", "lr=0.05", "--recipe", "batch_size=4"]
    assert run("train", "toy-text-16", "--data", f"text:{folder / 'abc.txt'}", *options, "--out", folder / "net") == 0
    yield folder
    del registry._parts["network"]["toy-text-<width>"]


def test_a_text_gets_the_character_that_follows(characters, capsys, monkeypatch):
    monkeypatch.chdir(characters)
    Path("b").write_text("ab")
    rows = predicted(capsys, "net", "a", "c", "b")  # the last one is a file
    assert [row["prediction"] for row in rows] == ["b", ".", "c"] and rows[0]["probability"] > 0.9
    (same,) = predicted(capsys, "net", "ba" * 4000)  # longer than a window, and than a file name may be
    assert same["probabilities"] == pytest.approx(rows[0]["probabilities"], rel=1e-4)
    rows = predicted(capsys, "net", "abc.")  # looks like a file, and is a text
    assert rows[0]["prediction"] == "\n"
    capsys.readouterr()
    assert run("predict", "net", "abc.") == 0
    assert r"'\n'" in capsys.readouterr().out
