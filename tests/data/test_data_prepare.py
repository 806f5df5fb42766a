"""New rows, images and text become what the network was trained on, by the JSON in a saved folder alone."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from mainstem.data import answers, load, prepare
from mainstem.data.core import ROLES
from mainstem.errors import ConfigurationError


def saved(data):
    """The meta as it comes back from a file."""
    return json.loads(json.dumps(data.meta))


@pytest.fixture
def rows(tmp_path):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(3, 9, 40).round(3), "b": rng.integers(0, 99, 40), "kind": ["x", "y"] * 20})
    frame["price"] = frame["a"] * 2 + 1
    frame.to_csv(tmp_path / "rows.csv", index=False)
    return tmp_path / "rows.csv", frame


def test_csv_rows(rows, tmp_path):
    path, frame = rows
    data = load(f"csv:{path}", target="price", ignore="kind")
    meta = saved(data)
    x = prepare(meta, path)
    assert x.shape == (40, 2) and x.dtype == torch.float32
    assert {tuple(row) for row in x.tolist()} == {
        tuple(row) for role in ROLES for row in getattr(data, role).x.tolist()
    }
    for given in (frame, frame[["b", "a"]], frame.to_dict("records"), frame[["a", "b"]].to_numpy(), str(path)):
        assert torch.equal(prepare(meta, given), x)
    assert torch.equal(prepare(meta, {"a": frame["a"][0], "b": frame["b"][0]}), x[:1])
    assert torch.equal(data.prepare(path), x)


def test_csv_rows_that_cannot_be_used(rows):
    path, frame = rows
    meta = saved(load(f"csv:{path}", target="kind", ignore="price"))
    cases = [
        (frame.rename(columns={"b": "B"}), r"missing column: unknown 'b'"),
        (frame.assign(b=np.where(frame.index == 2, np.nan, 1.0)), r"row 3, column 'b' holds no value"),
        (frame.assign(b=["many"] * 40), r"row 1, column 'b' holds text, 'many'"),
        (np.zeros((4, 3)), r"shape \(4, 3\) is not \[N, 2\]"),
        (np.full((4, 2), np.inf), r"row 1 holds NaN or Inf"),
        ([["p", "q"]], r"not an array of numbers"),
        ("none.csv", r"no such file: none\.csv"),
    ]
    for given, said in cases:
        with pytest.raises(ConfigurationError, match=said):
            prepare(meta, given)


def test_image_files(tmp_path):
    data = load("digits")
    meta = saved(data)
    raw = (data.test.x[:6].double() * meta["std"][0] + meta["mean"][0]).round()
    assert torch.equal(prepare(meta, raw.numpy()), data.test.x[:6])
    assert torch.equal(prepare(meta, raw[0]), data.test.x[:1])
    files = []
    for i, image in enumerate(raw):
        files.append(tmp_path / f"{i}.png")
        Image.fromarray((image[0].numpy() * 255 / 16).round().astype(np.uint8)).save(files[-1])
    near = 0.5 / 255 * 16 / meta["std"][0] + 1e-5
    assert torch.allclose(prepare(meta, files), data.test.x[:6], atol=near)
    assert torch.allclose(prepare(meta, str(files[2])), data.test.x[2:3], atol=near)
    assert torch.equal(prepare(meta, Image.open(files[2])), prepare(meta, files[2]))
    square = Image.open(files[2]).resize((80, 80), Image.Resampling.BOX).convert("RGB")
    correlation = torch.corrcoef(torch.stack([prepare(meta, square).flatten(), data.test.x[2].flatten()]))[0, 1]
    assert correlation > 0.95
    (tmp_path / "bad.png").write_bytes(b"no picture")
    for given, said in (
        (tmp_path / "bad.png", r"bad\.png cannot be read as an image"),
        ("none.png", "no such file: none.png"),
        ([], "none were given"),
        (np.zeros((2, 3, 8, 8)), r"is not \[N, 1, height, width\]"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            prepare(meta, given)


def test_images_of_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for i in range(5):
            Image.fromarray(rng.integers(0, 256, (13, 11, 3), dtype=np.uint8)).save(tmp_path / label / f"{i}.png")
    data = load(f"folder:{tmp_path}", size=8)
    x = prepare(saved(data), sorted(tmp_path.rglob("*.png")))
    assert {row.numpy().tobytes() for row in x} == {
        row.numpy().tobytes() for role in ROLES for row in getattr(data, role).x
    }


def test_text(tmp_path):
    data = load("prose", window=20)
    meta = saved(data)
    characters = meta["characters"]
    texts = ["".join(characters[i] for i in row) for row in data.val.x[:3].tolist()]
    assert torch.equal(prepare(meta, texts), data.val.x[:3])
    assert torch.equal(prepare(meta, "(" * 30 + texts[0]), data.val.x[:1])
    assert prepare(meta, "ab\U0001f600").tolist() == [[characters.index("a"), characters.index("b"), 0]]
    (tmp_path / "a.txt").write_text(texts[1], encoding="utf-8")
    assert torch.equal(prepare(meta, tmp_path / "a.txt"), data.val.x[1:2])
    for given in (["ab", "abc"], ""):
        with pytest.raises(ConfigurationError, match="must be alike and above 0"):
            prepare(meta, given)


def test_tokens_and_series():
    data = load("delayed-recall")
    assert torch.equal(prepare(saved(data), data.test.x[:4].tolist()), data.test.x[:4])
    for given, said in (([[1, 8]], "8 is not between 0 and 7"), ([[0.5]], "of integers"), ([["a"]], "not an array")):
        with pytest.raises(ConfigurationError, match=said):
            prepare(saved(data), given)
    data = load("electricity")
    raw = data.test.x.double() * data.meta["std"][0] + data.meta["mean"][0]
    assert torch.allclose(prepare(saved(data), raw.numpy()), data.test.x, atol=1e-6)
    assert torch.allclose(prepare(saved(data), raw[0, :, 0].tolist()), data.test.x[:1], atol=1e-6)


def test_npz(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(4, 2, (60, 6, 3))
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(60) % 2)
    data = load(f"npz:{tmp_path}/a.npz")
    np.savez(tmp_path / "new.npz", x=x[:5])
    new = prepare(saved(data), tmp_path / "new.npz")
    assert torch.equal(new, prepare(saved(data), x[:5])) and new.shape == (5, 6, 3)
    held = {row.numpy().tobytes() for role in ROLES for row in getattr(data, role).x}
    assert {row.numpy().tobytes() for row in new} <= held
    np.savez(tmp_path / "other.npz", z=x)
    with pytest.raises(ConfigurationError, match="has no array x; it has z"):
        prepare(saved(data), tmp_path / "other.npz")


def test_answers_are_in_the_words_and_units_of_the_data(rows):
    path, frame = rows
    assert answers(saved(load(f"csv:{path}", target="kind", ignore="price")), torch.tensor([[0.1, 2.0], [3, 1]])) == [
        "y",
        "x",
    ]
    data = load(f"csv:{path}", target="price", ignore="kind")
    said = answers(saved(data), torch.cat([getattr(data, role).y for role in ROLES]))
    assert np.allclose(sorted(said), sorted(frame["price"]), atol=1e-3)
    data = load("electricity")
    day = answers(saved(data), data.test.y[:1])[0]
    assert len(day) == 24 and 3000 < min(day) < max(day) < 20000
    data = load("photos")
    clean = np.array(answers(saved(data), data.test.y[:1]))
    assert clean.shape == (1, 3, 32, 32) and np.allclose(clean, clean.round(), atol=1e-3)
    data = load("prose", window=8)
    best = torch.nn.functional.one_hot(data.test.x[:1], data.outputs)
    assert torch.equal(prepare(saved(data), answers(saved(data), best)), data.test.x[:1])
    assert answers(saved(load("delayed-recall")), torch.eye(8)[None, [3, 1]]) == [[3, 1]]


def test_meta_that_says_nothing():
    with pytest.raises(ConfigurationError, match="does not say how to prepare new examples"):
        prepare({}, [[1.0]])
