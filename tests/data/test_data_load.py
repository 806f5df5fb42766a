"""Names, counts, options and what is said about wrong ones."""

import sys

import pytest
import torch

from mainstem import register, registry
from mainstem.data import Data, load, names
from mainstem.errors import ConfigurationError


def test_names_lists_named_sets_and_kinds_of_files():
    listed = names()
    assert {"digits", "textures", "prose", "associative-recall", "csv:PATH", "folder:PATH"} <= set(listed)
    assert listed == sorted(listed)


def test_a_count_in_the_name_is_the_option_count():
    data = load("digits:300", seed=2)
    assert data.name == "digits:300" and len(data.train) == 300
    assert data.sha256 == load("digits", seed=2, count=300).sha256
    assert len(load("state-tracking:70").train) == 70


def test_options_in_the_name():
    assert load("delayed-recall(length=20, delay=3)").shape == (20,)
    assert load("delayed-recall(length=20)", delay=3).sha256 == load("delayed-recall", length=20, delay=3).sha256


def test_a_data_set_of_the_users_own(monkeypatch):
    monkeypatch.setitem(registry._parts, "data", dict(registry._parts["data"]))

    @register("data", "toy-<n>")
    def toy(n, *, seed=None, colour="red"):
        from mainstem.data.core import build

        x = torch.arange(float(n))[:, None]
        pair = (x, x)
        return build("toy", "regression", "vector", dict.fromkeys(("train", "val", "test"), pair), outputs=1, meta={})

    data = load("toy-7")
    assert isinstance(data, Data) and len(data.train) == 7 and data.name == "toy-7"
    with pytest.raises(ConfigurationError, match=r"unknown 'color'.*'colour'"):
        load("toy-7", color="blue")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("digit", {}, r"data: unknown 'digit'; did you mean 'digits'"),
        ("cvs:rows.csv", {}, r"data: unknown 'cvs'; did you mean 'csv'"),
        ("digits:99999", {}, r"count: 99999 training examples are more than the 1077 of the training split of digits"),
        ("digits:9", {}, r"count: 9 is less than one example for each of the 10 classes of digits"),
        ("digits:0", {}, r"count: 0 is not a positive number"),
        ("digits:many", {}, r"'many' is not a number of training examples"),
        ("digits:10", {"count": 20}, r"unknown 'count'"),
        ("digits", {"count": 2.5}, r"count: 2.5 is not a positive number"),
        ("digits", {"sift": 2}, r"data digits: unknown 'sift'; did you mean 'shift'"),
        ("digits(sift=2)", {}, r"data digits: unknown 'sift'; did you mean 'shift'"),
        ("digits", {"shift": 9}, r"shift: 9 is not between 0 and 4"),
        ("digits", {"shift": "one"}, r"shift: 'one' is not an integer"),
        ("digits", {"target": "x"}, r"target: digits has no columns"),
        ("digits", {"seed": -1}, r"seed: -1 is not an integer of 0 or more"),
        ("digits", {"seed": 1.5}, r"seed: 1.5"),
        ("csv", {}, r"'csv' lacks its path; write csv:PATH"),
        ("textures", {"size": 100}, r"size: 100 is not between 4 and 48"),
        ("photos", {"noise": -3}, r"noise: -3 is not a number between 0 and 255"),
        ("photos:99999", {}, r"99999 training examples are more than the 1025"),
        ("prose", {"window": 0}, r"window: 0 is not 1 or more"),
        ("prose", {"window": 50000}, r"prose: \d+ characters are too few for a window of 50000"),
        ("electricity", {"window": 5000}, r"window, horizon: 5000 and 24 hours do not fit"),
        ("electricity", {"horizon": 700}, r"window, horizon: 168 and 700 hours do not fit"),
        ("associative-recall", {"pairs": 40}, r"pairs: 40 is more than the 32 different keys"),
        ("associative-recall", {"queries": 9}, r"queries: 9 is more than the 8 pairs"),
        ("selective-copy", {"items": 65}, r"items: 65 do not fit in a length of 64"),
        ("delayed-recall", {"delay": 64}, r"delay: 64 is not between 0 and 63"),
        ("state-tracking", {"group": "Q8"}, r"group: 'Q8' is none that is known"),
        ("state-tracking", {"group": "S7"}, r"group: 'S7' is none that is known"),
        ("state-tracking", {"scored": "lats"}, r"scored: unknown 'lats'; did you mean 'last'"),
        ("state-tracking", {"group": "Z2", "length": 5}, r"data state-tracking: 5500 different examples are more than"),
        ("teacher", {"task": "ranking"}, r"task: unknown 'ranking'"),
        ("teacher", {"activation": "rellu"}, r"activation: unknown 'rellu'; did you mean 'relu'"),
        ("teacher", {"noise": 2, "task": "classification"}, r"noise: 2 is not a number between 0 and 1"),
    ],
)
def test_what_cannot_be_loaded_is_said(name, options, said):
    with pytest.raises(ConfigurationError, match=said):
        load(name, **options)


def test_a_bare_path_is_told_how_it_is_read(tmp_path):
    for file, kind in (("rows.csv", "csv"), ("a.npz", "npz"), ("a.md", "text")):
        (tmp_path / file).touch()
        with pytest.raises(ConfigurationError, match=f"'{kind}:{tmp_path / file}'"):
            load(str(tmp_path / file))
    with pytest.raises(ConfigurationError, match=f"'folder:{tmp_path}'"):
        load(str(tmp_path))


def test_a_missing_package_is_named(monkeypatch):
    from mainstem.data import patches

    patches._image.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"needs scikit-image; pip install 'mainstem\[data\]'"):
        load("textures")


def test_a_missing_pillow_is_named(monkeypatch, tmp_path):
    (tmp_path / "a").mkdir()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigurationError, match=r"needs Pillow; pip install 'mainstem\[data\]'"):
        load(f"folder:{tmp_path}")
