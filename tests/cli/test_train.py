"""mainstem train and mainstem predict, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from mainstem import checkpoint, load
from mainstem.cli import main
from mainstem.data import load as load_data


def run(*arguments: str) -> None:
    try:
        main([str(a) for a in arguments])
    except SystemExit as end:
        if end.code not in (0, None):
            raise


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "digits"
    run("train", "mlp-2x32", "--data", "digits", "--budget", "epochs=6", "--recipe", "lr=0.05", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def houses(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("houses"), np.random.RandomState(0)
    table = pd.DataFrame({"rooms": draw.randint(1, 9, 300), "area": 100 * draw.rand(300)})
    table["price"] = 10.0 * table.rooms + 2.5 * table.area + draw.randn(300)
    table.to_csv(folder / "houses.csv", index=False)
    table.drop(columns="price").head(30).to_csv(folder / "new.csv", index=False)
    # a name of its own for the target's truth
    np.save(folder / "truth.npy", table.price.head(30).to_numpy())
    run("train", "mlp-2x32", "--data", f"csv:{folder / 'houses.csv'}", "--target", "price", "--budget", "epochs=40",
        "--recipe", "optimiser=adamw", "--recipe", "lr=0.01", "--out", folder / "net")  # fmt: skip
    return folder


def test_a_trained_network_is_saved_with_its_score(trained):
    config = json.loads((trained / "config.json").read_text())
    assert config["network"]["name"] == "mlp-2x32"
    assert config["score"]["metric"] == "accuracy" and config["score"]["test"] > 85
    assert config["data_sha256"] == load_data("digits").sha256
    assert load(trained).config == config["network"]


def test_the_same_command_again_only_reads(trained, capsys):
    before = (trained / "model.safetensors").read_bytes()
    run("train", "mlp-2x32", "--data", "digits", "--budget", "epochs=6", "--recipe", "lr=0.05", "--out", trained)
    assert "test accuracy" in capsys.readouterr().out
    assert (trained / "model.safetensors").read_bytes() == before


KILLED = [
    "train", "mlp-16x64+connection=stochastic-depth", "--data", "digits:300", "--budget", "epochs=60",
    "--device", "cpu", "--recipe", "evaluations=60", "--recipe", "threads=1", "--recipe", "precision=fp32",
    "--seed", "3",
]  # fmt: skip


def test_a_killed_run_goes_on_when_the_command_is_given_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run(*KILLED, "--out", "unbroken")
    child = subprocess.Popen([sys.executable, "-c", "from mainstem.cli import main; main()", *KILLED])
    path = Path("runs", "mlp-16x64+connection=stochastic-depth-digits_300".replace("+", "_"), checkpoint.NAME)
    while child.poll() is None and not path.exists():
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert 0 < checkpoint.about(path)["steps"] < 240 and not (path.parent / "model.safetensors").exists()
    capsys.readouterr()
    run(*KILLED)
    assert "going on at step" in capsys.readouterr().err
    whole, resumed = load("unbroken").state_dict(), load(path.parent).state_dict()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    scores = [json.loads(Path(folder, "config.json").read_text())["score"] for folder in ("unbroken", path.parent)]
    assert scores[0]["test"] == scores[1]["test"] and scores[0]["test_loss"] == scores[1]["test_loss"]


def test_what_is_said_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run("train", "mlp-1x8+lr=0.02+norm=rms", "--data", "digits:100", "--budget", "steps=4", "--metric", "nats",
        "--seed", "2", "--tensorboard", "--json", "--recipe", "evaluations=2", "--recipe", "precision=fp32",
        "--out", "net")  # fmt: skip
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["metric"] == "nats" and result["test_examples"] == 360 and result["steps"] == 4
    assert result["test"] == pytest.approx(result["test_loss"], rel=1e-4) and result["folder"] == "net"
    assert sum(line.startswith("step ") for line in err.splitlines()) == 2
    config = json.loads(Path("net", "config.json").read_text())
    assert config["recipe"]["lr"] == 0.02 and config["recipe"]["seed"] == 2 and config["network"]["norm"] == "rms"
    assert (
        config["data"]["labels"] == [str(digit) for digit in range(10)] and config["data"]["task"] == "classification"
    )
    assert any(Path("net", "tensorboard").iterdir())


def test_another_recipe_does_not_overwrite(trained, capsys):
    with pytest.raises(SystemExit) as end:
        run("train", "mlp-2x32", "--data", "digits", "--budget", "epochs=6", "--recipe", "lr=0.01", "--out", trained)
    assert end.value.code == 2
    assert "lr=0.05" in capsys.readouterr().err


def test_images_get_a_class_and_a_probability(trained, tmp_path, capsys):
    from PIL import Image
    from sklearn.datasets import load_digits

    pixels, classes = load_digits().images, load_digits().target
    files = []
    for i in range(10):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray((pixels[i] * 255 / 16).round().astype(np.uint8)).save(files[-1])
    run("predict", trained, *files, "--json")
    rows = json.loads(capsys.readouterr().out)
    assert [row["input"] for row in rows] == [str(f) for f in files]
    assert sum(row["prediction"] == str(c) for row, c in zip(rows, classes, strict=False)) >= 7
    np.savez(tmp_path / "same.npz", x=pixels[:10, None])
    run("predict", trained, tmp_path / "same.npz", "--json")
    for row, same in zip(rows, json.loads(capsys.readouterr().out), strict=True):
        assert row["probability"] == pytest.approx(same["probabilities"][row["prediction"]], abs=0.02)
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["probability"] == max(row["probabilities"].values()) == row["probabilities"][row["prediction"]]
    run("predict", trained, files[0])
    assert "probability" in capsys.readouterr().out


def test_rows_of_a_table_get_numbers_in_their_own_unit(houses, tmp_path):
    run("predict", houses / "net", houses / "new.csv", "--out", tmp_path / "prices.csv")
    table = pd.read_csv(tmp_path / "prices.csv")
    truth = np.load(houses / "truth.npy")
    assert len(table) == 30
    assert np.abs(table.prediction - truth).mean() < 0.2 * truth.std()


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["train", "mlp-2x32", "--data", "digts"], "did you mean 'digits'"),
        (["train", "mpl-2x32", "--data", "digits"], "mlp-<layers>x<width>"),
        (["train", "mlp-2x32", "--data", "digits", "--recipe", "lr"], "not of the form key=value"),
        (["train", "mlp-2x32", "--data", "digits", "--recipe", "lr=-1"], "greater than 0"),
        (["train", "mlp-2x32+clases=5", "--data", "digits"], "clases"),
        (["train", "mlp-2x32+classes=5", "--data", "digits"], "has 10 classes, more than"),
        (["train", "mlp-2x32", "--data", "digits", "--device", "gpu"], "device: 'gpu' cannot be used here"),
        (["train", "mlp-2x32", "--data", "digits", "--budget", "flops=1e9"], "budget: flops are counted by compare"),
        (["train", "mlp-2x32", "--data", "digits", "--metric", "mse"], "metric: mse is for regression"),
        (["train", "resnet-8", "--data", "diabetes"], "network: resnet-8 takes images; diabetes holds vector data"),
        (["predict", "no-such-folder", "a.png"], "no such file: no-such-folder/config.json"),
    ],
)
def test_what_cannot_be_used_is_one_readable_error(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("mainstem: ") and text in shown and "Traceback" not in shown
    assert not list(tmp_path.iterdir())


def test_a_missing_image_is_named(trained, capsys):
    with pytest.raises(SystemExit):
        run("predict", trained, "gone.png")
    assert "gone.png" in capsys.readouterr().err
