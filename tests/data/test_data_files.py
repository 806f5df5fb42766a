"""Data of the user's own: what is read from files, and what is said about files that cannot be used."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from mainstem.data import load
from mainstem.data.core import ROLES
from mainstem.data.folder import Images
from mainstem.errors import ConfigurationError


def sizes(data):
    return tuple(len(getattr(data, role)) for role in ROLES)


def everything(data, part="x"):
    return torch.cat([getattr(getattr(data, role), part) for role in ROLES])


# --- CSV


def table(tmp_path, text, name="rows.csv", encoding="utf-8"):
    path = tmp_path / name
    path.write_text(text, encoding=encoding)
    return f"csv:{path}"


def houses(n=50, **changes):
    """Rows of a small table as CSV text; `changes` are (row, column) -> field, rows counted from 1."""
    rows = [[f"{60 + i}", f"{i % 7}.5", "east" if i % 2 else "west", f"{100 + 3 * i}.25"] for i in range(n)]
    for place, field in changes.items():
        row, column = place.lstrip("r").split("_")
        rows[int(row) - 1][["area", "rooms", "side", "price"].index(column)] = field
    return "\n".join(["area,rooms,side,price", *(",".join(row) for row in rows)]) + "\n"


def test_csv_regression(tmp_path):
    data = load(table(tmp_path, houses()), target="price", ignore="side")
    assert (data.task, data.inputs, data.outputs, data.shape) == ("regression", "vector", 1, (2,))
    assert sizes(data) == (30, 10, 10) and data.meta["columns"] == ["area", "rooms"]
    target = data.meta["target"]
    price = everything(data, "y")[:, 0].double() * target["std"][0] + target["mean"][0]
    area = everything(data)[:, 0].double() * data.meta["std"][0] + data.meta["mean"][0]
    assert torch.allclose(price, 100.25 + 3 * (area - 60), atol=1e-3)
    assert sorted(area.round().int().tolist()) == list(range(60, 110))


def test_csv_classes(tmp_path):
    data = load(table(tmp_path, houses()), target="side")
    assert (data.task, data.outputs, data.labels) == ("classification", 2, ["east", "west"])
    assert [torch.bincount(getattr(data, role).y).tolist() for role in ROLES] == [[15, 15], [5, 5], [5, 5]]
    area = everything(data)[:, 0].double() * data.meta["std"][0] + data.meta["mean"][0]
    assert torch.equal(everything(data, "y"), 1 - (area.round().long() % 2))


@pytest.mark.parametrize(
    ("values", "task", "labels"),
    [
        ([0, 1, 2], "classification", ["0", "1", "2"]),
        ([10, 2], "classification", ["2", "10"]),
        (list(range(40)), "regression", None),
        ([0.5, 1.5], "regression", None),
        (["True", "False"], "classification", ["False", "True"]),
        (["1", "one"], "classification", ["1", "one"]),
    ],
)
def test_what_a_csv_target_is_taken_for(tmp_path, values, task, labels):
    rows = "\n".join(f"{i}.5,{values[i % len(values)]}" for i in range(120))
    data = load(table(tmp_path, f"a,b\n{rows}\n"), target="b")
    assert (data.task, data.labels) == (task, labels)
    if task == "classification" and isinstance(values[0], int):
        assert load(table(tmp_path, f"a,b\n{rows}\n"), target="b", task="regression").task == "regression"


def test_csv_with_another_separator_a_byte_order_mark_and_a_constant_column(tmp_path):
    rows = "\n".join(f"{i};7;{i * 2}" for i in range(30))
    data = load(table(tmp_path, f"a; b;c\n{rows}\n", encoding="utf-8-sig"), target="c", separator=";")
    assert data.meta["columns"] == ["a", "b"] and (everything(data)[:, 1] == 0).all()


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (houses(r7_rooms=""), {"target": "price", "ignore": "side"}, r"row 7, column 'rooms' holds no value"),
        (houses(r7_rooms="nan"), {"target": "price", "ignore": "side"}, r"row 7, column 'rooms' holds nan"),
        (houses(r9_area="inf"), {"target": "price", "ignore": "side"}, r"row 9, column 'area' holds inf"),
        (houses(r50_area="6O"), {"target": "price", "ignore": "side"}, r"row 50, column 'area' holds '6O' among numb"),
        (houses(), {"target": "price"}, r"row 1, column 'side' holds text, 'west'; .*leave the column out"),
        (
            houses(r3_price=""),
            {"target": "price", "ignore": "side"},
            r"row 3, column 'price' \(the target\) holds no v",
        ),
        (
            houses(r3_price="n/a"),
            {"target": "price", "ignore": "side"},
            r"row 3, column 'price' \(the target\) .*'n/a'",
        ),
        (houses(), {"target": "prize"}, r"unknown 'prize'; did you mean 'price'"),
        (houses(), {}, r"target: .*say which column to predict: area, rooms, side, price"),
        (houses(), {"target": "price", "ignore": "sied"}, r"ignore: .*unknown 'sied'; did you mean 'side'"),
        (houses(), {"target": "side", "task": "clasification"}, r"task: unknown 'clasification'; did you mean 'class"),
        (houses(), {"target": "price", "ignore": ["area", "rooms", "side"]}, r"no column beside the target"),
        (houses(r1_side="north"), {"target": "side"}, r"class 'north' has 1 example; a split in 3 needs at least 3"),
        (houses(2), {"target": "price", "ignore": "side"}, r"2 examples are too few to split in 3"),
        (houses(8), {"target": "side", "count": 5}, r"count: 5 training examples are more than the 4 of .*rows.csv"),
        ("", {"target": "a"}, r"cannot be read as CSV"),
        ("a,b\n", {"target": "a"}, r"has no rows below"),
        ("a,a\n1,2\n", {"target": "a"}, r"column name 'a' is empty or stands there twice"),
        ("a,\n1,2\n", {"target": "a"}, r"column name '' is empty"),
        ("1,2\n3,4\n", {"target": "1"}, r"the first line holds numbers"),
        ("a;b\n1;2\n", {"target": "b"}, r"one column, 'a;b'; pass separator=';'"),
        ("a,b\n1,2\n3,4,5\n", {"target": "b"}, r"cannot be read as CSV: .*line 3"),
        ("a,b\n1,2,3\n4,5,6\n", {"target": "b"}, r"rows have more fields than the 2 column names"),
        ("a,b\n1,2\n3\n", {"target": "a"}, r"row 2, column 'b' holds no value"),
        ("a,b\n1,x\n2,x\n3,x\n4,x\n", {"target": "b"}, r"the target 'b' has one value"),
    ],
)
def test_a_csv_that_cannot_be_used(tmp_path, text, options, said):
    name = table(tmp_path, text)
    with pytest.raises(ConfigurationError, match=said) as error:
        load(name, **options)
    assert "rows.csv" in str(error.value) or "task" in options


def test_blanks_around_fields_and_lines_do_not_count(tmp_path):
    rows = "\n\n".join(f" {i} ,  {'xy'[i % 2]}" for i in range(30))
    data = load(table(tmp_path, f"a , b\n{rows}\n\n"), target="b")
    assert data.labels == ["x", "y"] and len(everything(data)) == 30
    with pytest.raises(ConfigurationError, match="separator: 'tab' is not a single character"):
        load(table(tmp_path, "a,b\n1,2\n"), target="b", separator="tab")


def test_a_csv_that_is_not_there_or_not_utf8(tmp_path):
    with pytest.raises(ConfigurationError, match=r"no such file: .*none\.csv"):
        load(f"csv:{tmp_path}/none.csv", target="a")
    with pytest.raises(ConfigurationError, match="is a folder"):
        load(f"csv:{tmp_path}", target="a")
    (tmp_path / "latin.csv").write_bytes("näme,b\n1,2\n".encode("latin-1"))
    with pytest.raises(ConfigurationError, match=r"latin\.csv is not UTF-8 text \(byte 1\)"):
        load(f"csv:{tmp_path}/latin.csv", target="b")


# --- arrays


def arrays(tmp_path, **held):
    np.savez(tmp_path / "held.npz", **held)
    return f"npz:{tmp_path}/held.npz"


def test_npz_of_features_and_classes(tmp_path):
    x, y = np.random.default_rng(0).normal(5, 3, (100, 4)), np.arange(100) % 5
    data = load(arrays(tmp_path, x=x, y=y))
    assert (data.task, data.inputs, data.outputs) == ("classification", "vector", 5) and sizes(data) == (60, 20, 20)
    raw = everything(data).double() * torch.tensor(data.meta["std"]) + torch.tensor(data.meta["mean"])
    order = np.lexsort(raw.numpy().T)
    assert np.allclose(raw.numpy()[order], x[np.lexsort(x.T)], atol=1e-4)
    assert (everything(data, "y").numpy()[order] == y[np.lexsort(x.T)]).all()


def test_npz_with_given_parts_keeps_them(tmp_path):
    rng = np.random.default_rng(0)
    x = {
        role: rng.normal(size=(n, 3)) + shift for role, n, shift in (("train", 50, 0), ("val", 20, 9), ("test", 30, 99))
    }
    held = {f"x_{role}": part for role, part in x.items()} | {f"y_{r}": np.arange(len(p)) % 2 for r, p in x.items()}
    data = load(arrays(tmp_path, **held))
    assert sizes(data) == (50, 20, 30)
    mean, std = x["train"].mean(0), x["train"].std(0)
    for role, part in x.items():  # normalised by the training part alone, however far the others lie
        assert np.allclose(getattr(data, role).x, (part - mean) / std, rtol=1e-4, atol=1e-4)
    del held["x_val"], held["y_val"]
    data = load(arrays(tmp_path, **held))
    assert sizes(data) == (40, 10, 30) and torch.bincount(data.val.y).tolist() == [5, 5]


@pytest.mark.parametrize(
    ("x", "y", "inputs", "shape", "task", "outputs"),
    [
        (np.zeros((30, 8, 9), np.uint8), np.arange(30) % 2, "image", (1, 8, 9), "classification", 2),
        (np.zeros((30, 8, 9, 3), np.uint8), np.arange(30) % 2, "image", (3, 8, 9), "classification", 2),
        (np.zeros((30, 3, 8, 9)), np.arange(30) % 2, "image", (3, 8, 9), "classification", 2),
        (np.zeros((30, 3, 8, 8)), np.zeros((30, 2, 8, 8)), "image", (3, 8, 8), "regression", 2),
        (np.zeros((30, 7, 2)), np.zeros((30, 3)), "sequence", (7, 2), "regression", 3),
        (np.zeros((30, 7)), np.linspace(0, 1, 30), "vector", (7,), "regression", 1),
        (np.zeros(30), np.linspace(0, 1, 30), "vector", (1,), "regression", 1),
        (np.full((30, 7), 4), np.arange(30) % 3, "tokens", (7,), "classification", 3),
        (np.full((30, 7), 4), np.full((30, 7), 6), "tokens", (7,), "next-token", 7),
        (np.zeros((30, 7), np.uint8), np.arange(30)[:, None] % 3, "vector", (7,), "classification", 3),
        (np.zeros((30, 7)), np.array(["a", "b"] * 15), "vector", (7,), "classification", 2),
    ],
)
def test_what_npz_arrays_are_taken_for(tmp_path, x, y, inputs, shape, task, outputs):
    data = load(arrays(tmp_path, x=x, y=y))
    assert (data.inputs, data.shape, data.task, data.outputs) == (inputs, shape, task, outputs)
    assert torch.isfinite(everything(data).float()).all()


def test_npz_targets_that_are_not_scored_and_integers_that_are_features(tmp_path):
    y = np.where(np.arange(7) < 5, -100, 3) + np.zeros((30, 1), int)
    assert load(arrays(tmp_path, x=np.full((30, 7), 4), y=y)).outputs == 5
    assert load(arrays(tmp_path, x=np.full((30, 7), 4), y=np.arange(30) % 2), inputs="vector").inputs == "vector"


X, Y = np.random.default_rng(1).normal(size=(30, 4)), np.arange(30) % 3


@pytest.mark.parametrize(
    ("held", "options", "said"),
    [
        ({"images": X, "y": Y}, {}, r"has no array x; it has images, y \(give x and y"),
        ({"x_train": X, "y_train": Y}, {}, r"has no array x_test"),
        ({"x": X, "y": Y[:20]}, {}, r"the train part has 30 inputs and 20 targets"),
        ({"x": np.where(X[4, 1] == X, np.nan, X), "y": Y}, {}, r"row 5 of x in the train part holds NaN"),
        ({"x": X, "y": Y - 1}, {}, r"label -1 of the train part is out of range: 0 to 1"),
        ({"x": X, "y": Y}, {"classes": 2}, r"label 2 of the train part is out of range: 0 to 1"),
        ({"x_train": X, "y_train": Y, "x_test": X, "y_test": Y + 1}, {}, r"label 3 of the test part is out of range"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, :3], "y_test": Y}, {}, r"x of the test part is float64 \(3,\)"),
        ({"x": X, "y": np.arange(30)}, {}, r"class 0 has 1 example; a split in 3 needs at least 3"),
        ({"x": X, "y": np.zeros((30, 4, 4))}, {}, r"targets \(30, 4, 4\) must be"),
        ({"x": X, "y": np.zeros((30, 4), int)}, {}, r"integers go with tokens"),
        ({"x": X.astype(int), "y": np.zeros((30, 3), int)}, {"inputs": "tokens"}, r"fit no inputs"),
        ({"x": X - 9, "y": Y}, {"inputs": "tokens"}, r"token -\d+ of the train part is out of range"),
        ({"x": X, "y": Y}, {"inputs": "image"}, r"are no image data, which have 4 dimensions"),
        ({"x": X, "y": Y}, {"inputs": "pictures"}, r"inputs: unknown 'pictures'"),
        ({"x": X, "y": Y}, {"count": 19}, r"count: 19 training examples are more than the 18 of .*held.npz"),
        ({"x": X, "y": np.array([None] * 30)}, {}, r"cannot be read as an \.npz file of plain arrays"),
        ({"x": np.array(["a"] * 30), "y": Y}, {}, r"x of the train part is not an array of numbers"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, held, options, said):
    with pytest.raises(ConfigurationError, match=said):
        load(arrays(tmp_path, **held), **options)


def test_an_npz_that_is_not_one(tmp_path):
    name = arrays(tmp_path, x=X, y=Y)
    path = tmp_path / "held.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ConfigurationError, match=r"held\.npz cannot be read"):
        load(name)
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(ConfigurationError, match="is a single array"):
        load(f"npz:{tmp_path}/one.npy")
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    with pytest.raises(ConfigurationError, match="has no array x; it has none"):
        load(f"npz:{tmp_path}/empty.npz")
    with pytest.raises(ConfigurationError, match="no such file"):
        load(f"npz:{tmp_path}/none.npz")


# --- text


def test_text_is_cut_into_windows(tmp_path):
    text = "".join(np.random.default_rng(0).choice(list("ab \nö"), 1000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    data = load(f"text:{tmp_path}/a.txt", window=10)
    characters = data.meta["characters"]
    assert characters == ["\ufffd", "\n", " ", "a", "b", "ö"] and data.outputs == 6
    assert "".join(characters[i] for i in data.train.x.flatten()) == text[: 10 * len(data.train)]
    assert "".join(characters[i] for i in data.train.y.flatten()) == text[1 : 10 * len(data.train) + 1]
    assert sizes(data) == (79, 9, 9)


def test_characters_that_training_lacks_are_unknown(tmp_path):
    (tmp_path / "a.txt").write_text("ab" * 400 + "z" * 200)
    data = load(f"text:{tmp_path}/a.txt", window=10)
    assert (data.test.x == 0).all() and not (data.train.x == 0).any() and data.outputs == 3


def test_text_that_cannot_be_used(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff" * 1000)
    with pytest.raises(ConfigurationError, match=r"a\.txt is not UTF-8 text \(byte 3\)"):
        load(f"text:{tmp_path}/a.txt")
    (tmp_path / "b.txt").write_text("short")
    with pytest.raises(ConfigurationError, match=r"b\.txt: 5 characters are too few .* at least 1290"):
        load(f"text:{tmp_path}/b.txt")
    with pytest.raises(ConfigurationError, match="no such file"):
        load(f"text:{tmp_path}/none.txt")


# --- folders of images


def picture(path, colour=None, size=(12, 10), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if colour is None:
        seed = sum(path.as_posix().encode())
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, **options)
    else:
        Image.new("RGB", size, colour).save(path, **options)


COLOURS = {"blue": (0, 0, 250), "red": (250, 0, 0)}


@pytest.fixture
def classes(tmp_path):
    for label, colour in COLOURS.items():
        for i in range(10):
            picture(tmp_path / label / f"{i}.png", tuple(max(0, c - i) for c in colour))
    return tmp_path


def colours(data, split):
    x = split.x if isinstance(split.x, torch.Tensor) else torch.stack([split.x[i] for i in range(len(split.x))])
    values = x * torch.tensor(data.meta["std"])[:, None, None] + torch.tensor(data.meta["mean"])[:, None, None]
    return values.mean((2, 3)).round().int().tolist()


def test_folder_of_class_folders(classes):
    (classes / "red" / "notes.txt").write_text("not an image")
    (classes / ".hidden").mkdir()
    data = load(f"folder:{classes}", size=8)
    assert data.labels == ["blue", "red"] and sizes(data) == (12, 4, 4) and data.shape == (3, 8, 8)
    seen = set()
    for role in ROLES:
        for colour, y in zip(colours(data, getattr(data, role)), getattr(data, role).y.tolist(), strict=True):
            assert (colour[0] > colour[2]) == (y == 1)
            seen.add(tuple(colour))
    assert len(seen) == 20


def test_folder_of_parts(tmp_path):
    for role, n in (("train", 10), ("test", 3)):
        for label, colour in COLOURS.items():
            for i in range(n):
                shade = i if role == "train" else 100 + i
                picture(tmp_path / role / label / f"{i}.png", tuple(max(0, c - shade) for c in colour))
    data = load(f"folder:{tmp_path}", size=4)
    assert sizes(data) == (16, 4, 6)
    assert all(max(colour) <= 150 for colour in colours(data, data.test))
    assert all(max(colour) > 200 for split in (data.train, data.val) for colour in colours(data, split))
    for label in COLOURS:
        picture(tmp_path / "val" / label / "a.png", (1, 2, 3))
    assert sizes(load(f"folder:{tmp_path}", size=4)) == (20, 2, 6)


def test_images_too_many_for_memory_stay_files(classes):
    whole, lazy = (load(f"folder:{classes}", size=8, in_memory=bytes_) for bytes_ in (1 << 30, 1000))
    assert isinstance(lazy.train.x, Images) and isinstance(lazy.train.x, torch.utils.data.Dataset)
    assert sizes(lazy) == sizes(whole) and lazy.shape == whole.shape and lazy.meta == whole.meta
    for role in ROLES:
        one, other = getattr(whole, role), getattr(lazy, role)
        assert len(other.x) == len(one) and torch.equal(one.y, other.y)
        assert torch.equal(torch.stack([other.x[i] for i in range(len(other.x))]), one.x)
    batch = next(iter(torch.utils.data.DataLoader(lazy.train.x, 5)))
    assert batch.shape == (5, 3, 8, 8) and batch.dtype == torch.float32
    assert lazy.sha256 == load(f"folder:{classes}", size=8, in_memory=1000).sha256
    assert lazy.sha256 != load(f"folder:{classes}", size=8, in_memory=1000, seed=1).sha256
    picture(classes / "red" / "0.png", (3, 3, 3))
    assert lazy.sha256 != load(f"folder:{classes}", size=8, in_memory=1000).sha256


def test_images_of_every_mode_and_shape(tmp_path):
    tall = np.zeros((40, 20), np.uint8)
    tall[10:30] = 200  # the centre square is all that is left
    kinds = {
        "grey.png": Image.fromarray(tall),
        "palette.png": Image.fromarray(tall).convert("RGB").convert("P"),
        "alpha.png": Image.fromarray(tall).convert("RGBA"),
        "deep.png": Image.fromarray(tall.astype(np.uint16) * 257),
        "photo.jpg": Image.fromarray(tall).convert("RGB"),
        "bits.bmp": Image.fromarray(tall),
    }
    clear = Image.new("RGBA", (20, 20), (255, 255, 255, 0))
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for name, image in kinds.items():
            image.save(tmp_path / label / name)
        clear.save(tmp_path / label / "clear.png")
    data = load(f"folder:{tmp_path}", size=10, channels=1)
    values = everything(data).double() * data.meta["std"][0] + data.meta["mean"][0]
    means = sorted(round(v) for v in values[:, :, 1:-1].mean((1, 2, 3)).tolist())
    assert means[:2] == [0, 0] and all(abs(v - 200) <= 3 for v in means[2:])


def test_a_photograph_that_was_turned(tmp_path):
    from mainstem.data.images import read

    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    pixels = np.zeros((16, 32), np.uint8)
    pixels[:, :16] = 255
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=100)
    upright = read(tmp_path / "a.jpg", 1)
    assert upright.shape == (1, 32, 16) and upright[0, :15].mean() > 250 and upright[0, 17:].mean() < 5


def truncated(classes):
    picture(classes / "red" / "3.png", size=(90, 90))
    content = (classes / "red" / "3.png").read_bytes()
    (classes / "red" / "3.png").write_bytes(content[: len(content) // 2])


def garbage(classes):
    (classes / "red" / "3.png").write_bytes(b"not a picture")


@pytest.mark.parametrize("damage", [truncated, garbage])
@pytest.mark.parametrize("in_memory", [1 << 30, 10])
def test_an_unreadable_image_is_named(classes, damage, in_memory):
    damage(classes)
    with pytest.raises(ConfigurationError, match=r"red/3\.png cannot be read as an image .*remove or replace it"):
        load(f"folder:{classes}", in_memory=in_memory)


def test_folders_that_cannot_be_used(tmp_path, classes):
    def said(text, **options):
        with pytest.raises(ConfigurationError, match=text):
            load(f"folder:{classes}", **options)

    said("channels: 2 is neither 3", channels=2)
    said("13 training examples are more than the 12", count=13)
    said("less than one example for each of the 2 classes", count=1)
    (classes / "green").mkdir()
    said("green holds no images; remove the folder or fill it")
    picture(classes / "green" / "0.png", (0, 9, 0))
    said("class 'green' has 1 example; a split in 3 needs at least 3")
    with pytest.raises(ConfigurationError, match="no such folder"):
        load(f"folder:{tmp_path}/none")
    (tmp_path / "alone" / "one").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="holds 1 class folders; at least two"):
        load(f"folder:{tmp_path}/alone")
    for part, labels in (("train", "ab"), ("test", "bc")):
        with_test = tmp_path / "parts"
        for label in labels:
            picture(with_test / part / label / "0.png", (1, 1, 1))
        if part == "train":
            with pytest.raises(ConfigurationError, match="has a folder train but no folder test"):
                load(f"folder:{with_test}")
    with pytest.raises(ConfigurationError, match="class 'a' is only in one of"):
        load(f"folder:{with_test}")
