"""Named data sets: what their documentation says of them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

from mainstem.data import load, patches
from mainstem.data.augment import Shift
from mainstem.data.core import ROLES, draws, split_rows


def sizes(data):
    return tuple(len(getattr(data, role)) for role in ROLES)


def raw(data, x, dim=1):
    shape = [1] * x.ndim
    shape[dim] = -1
    return x.double() * torch.tensor(data.meta["std"]).view(shape) + torch.tensor(data.meta["mean"]).view(shape)


def together(data):
    return torch.cat([getattr(data, role).x for role in ROLES]), torch.cat([getattr(data, role).y for role in ROLES])


def test_digits_are_scikit_learns():
    data, source = load("digits"), load_digits()
    assert sizes(data) == (1077, 360, 360) and data.shape == (1, 8, 8)
    x, y = together(data)
    held = sorted(
        (tuple(row), int(c)) for row, c in zip(raw(data, x).round().int().flatten(1).tolist(), y, strict=True)
    )
    assert held == sorted((tuple(map(int, row)), int(c)) for row, c in zip(source.data, source.target, strict=True))
    for role in ROLES:  # stratified
        share = torch.bincount(getattr(data, role).y) / len(getattr(data, role))
        assert torch.allclose(share, torch.bincount(y) / len(y), atol=0.003)


def test_300_digits_are_of_the_training_split_and_stratified():
    data = load("digits:300")
    counts = torch.bincount(data.train.y)
    assert counts.sum() == 300 and counts.min() >= 29 and counts.max() <= 31

    def images(name):
        held = load(name)
        return {tuple(row) for row in raw(held, held.train.x).round().flatten(1).tolist()}

    assert images("digits:300") < images("digits")
    assert len(images("digits:100") & images("digits:300")) >= 95


def test_the_fixed_split_stays_what_it_was():
    """These hashes stand in published results; they change only with the data sets' documentation."""
    known = {"digits": DIGITS, "associative-recall": RECALL, "state-tracking": TRACKING}
    assert {name: load(name).sha256 for name in known} == known


DIGITS = "24dac6ebbe7df6c83e0f6a53037af254d806e2228d42171953decc666db6042a"
RECALL = "48c33940fc088474d07acc705b7181ec8426663c5027f7a5b4ce99c63073bbd1"
TRACKING = "cf2b99cb8515d9bd6a5117e28f717dc4f46014d38519db2b5aea7eae1c81ee54"


def test_digits32_are_enlarged_bilinearly():
    small, large = load("digits", seed=1), load("digits32", seed=1)
    assert large.shape == (1, 32, 32) and torch.equal(small.test.y, large.test.y)
    expected = F.interpolate(raw(small, small.test.x).round().float(), size=32, mode="bilinear", align_corners=False)
    assert torch.allclose(raw(large, large.test.x).float(), expected, atol=1e-4)


def test_textures_are_tiles_of_their_pictures_that_share_no_block_across_splits():
    data = load("textures", seed=3)
    assert sizes(data) == (3440, 1120, 1120) and data.outputs == 16
    for role, each in (("train", 215), ("val", 70), ("test", 70)):
        assert torch.bincount(getattr(data, role).y).tolist() == [each] * 16
    for number, label in enumerate(data.labels):
        tiles, blocks = patches._tiles(label, 1, 16)
        place = {}
        for i, tile in enumerate(tiles):
            place.setdefault(tile.tobytes(), set()).add(int(blocks[i]))
        held = []
        for role in ROLES:
            split = getattr(data, role)
            pixels = raw(data, split.x[split.y == number]).round().byte().numpy()
            assert (pixels.std(axis=(1, 2, 3)) >= patches.FLAT).all()
            found = [place[tile.tobytes()] for tile in pixels]
            assert all(len(where) == 1 for where in found)
            held.append(set.union(*found))
        assert not (held[0] & held[1] or held[0] & held[2] or held[1] & held[2])


def test_tiles_cover_their_picture_in_order():
    tiles, blocks = patches._tiles("cat", 3, 32)
    image = patches._image("cat", 3)
    assert len(tiles) == len(blocks) == (300 // 32) * (451 // 32)
    across = 451 // 32
    for i in (0, 5, across, 3 * across + 2):
        row, column = divmod(i, across)
        assert (tiles[i] == image[:, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]).all()
    assert blocks[0] == blocks[1] == blocks[across] == blocks[across + 1] != blocks[2]


def test_photos_are_clean_patches_and_the_same_with_noise():
    data = load("photos", noise=20.0)
    assert sizes(data) == (1025, 344, 344) and data.shape == (3, 32, 32) and data.train.y.shape == data.train.x.shape
    noise = (data.train.x - data.train.y) * data.meta["std"][0]
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 20) < 0.1
    clean = raw(data, data.val.y)
    assert torch.allclose(clean, clean.round(), atol=1e-3) and clean.min() > -0.5 and clean.max() < 255.5
    assert torch.equal(*(split.x for split in [load("photos", noise=0).test] * 2))
    silent = load("photos", noise=0)
    assert torch.equal(silent.test.x, silent.test.y)


def test_diabetes_is_scikit_learns():
    data, source = load("diabetes"), load_diabetes(scaled=False)
    assert sizes(data) == (264, 89, 89)
    x, y = together(data)
    target = data.meta["target"]
    y = y[:, 0].double() * target["std"][0] + target["mean"][0]
    got = torch.cat([raw(data, x), y[:, None]], 1).numpy()
    expected = np.c_[source.data, source.target]
    order, wanted = np.lexsort(got.round(2).T), np.lexsort(expected.round(2).T)
    assert np.allclose(got[order], expected[wanted], rtol=1e-4, atol=1e-3)
    assert abs(data.train.y.mean()) < 1e-5 and abs(data.train.y.std(correction=0) - 1) < 1e-5


def test_breast_cancer_is_scikit_learns():
    data, source = load("breast-cancer"), load_breast_cancer()
    assert sizes(data) == (341, 114, 114) and data.labels == ["malignant", "benign"]
    x, y = together(data)
    assert torch.bincount(y).tolist() == np.bincount(source.target).tolist()
    assert np.allclose(np.sort(raw(data, x).numpy()[:, 3]), np.sort(source.data[:, 3]), rtol=1e-4)


def text_of(data, tokens):
    return "".join(data.meta["characters"][i] for i in tokens)


def test_prose_is_the_reference_manual_in_contiguous_parts():
    from mainstem.data.text import _topics

    data, manual = load("prose"), _topics()
    n = len(manual)
    starts = {"train": 0, "val": n - 2 * int(0.1 * n), "test": n - int(0.1 * n)}
    for role, start in starts.items():
        split = getattr(data, role)
        assert torch.equal(split.x[:, 1:], split.y[:, :-1])
        for i in (0, 1, len(split) - 1):
            here = start + 128 * i
            if not (split.y[i] == 0).any() and not (split.x[i] == 0).any():
                assert text_of(data, split.x[i]) == manual[here : here + 128]
                assert text_of(data, split.y[i]) == manual[here + 1 : here + 129]
    assert starts["train"] + 128 * len(data.train) < starts["val"] < starts["test"] < n
    assert set(data.meta["characters"][1:]) == set(manual[: starts["val"]])
    assert not (data.train.x == 0).any() and not (data.train.y == 0).any()


def test_redrawn_prose_keeps_parts_contiguous_and_apart():
    from mainstem.data.text import _topics

    data, manual = load("prose", seed=2, window=400), _topics()
    where = {
        role: [manual.find(text_of(data, row)) for row in getattr(data, role).x.tolist() if 0 not in row]
        for role in ROLES
    }
    assert all(min(places) >= 0 for places in where.values())
    assert max(where["val"]) + 400 < min(where["test"])
    held = range(min(where["val"]) - 400, max(where["test"]) + 401)
    assert not any(place in held for place in where["train"])


def test_electricity_forecasts_follow_their_windows_and_keep_to_their_part():
    from mainstem.data.series import _demand

    data, demand = load("electricity"), _demand()
    assert len(demand) == 3600 and data.shape == (168, 1) and data.outputs == 24
    values = (demand - data.meta["mean"][0]) / data.meta["std"][0]
    first = {"train": 168, "val": 2520, "test": 3060}
    last = {"train": 2520, "val": 3060, "test": 3600}
    for role in ROLES:
        split = getattr(data, role)
        assert len(split) == last[role] - first[role] - 23
        for i in (0, 7, len(split) - 1):
            hour = first[role] + i
            assert np.allclose(split.x[i, :, 0], values[hour - 168 : hour], atol=1e-5)
            assert np.allclose(split.y[i], values[hour : hour + 24], atol=1e-5)
    assert data.meta["mean"][0] == pytest.approx(demand[:2520].mean(), rel=1e-5)
    apart = load("electricity", stride=24)
    assert torch.equal(apart.test.y.flatten(), data.test.y[::24].flatten())


def test_splits_are_stratified_with_every_class_in_every_split():
    rng = np.random.default_rng(0)
    for n, counts in ((60, [3, 3, 54]), (100, [50, 50]), (35, [5] * 7)):
        classes = rng.permutation(np.repeat(np.arange(len(counts)), counts))
        rows = split_rows(n, 1, classes=classes)
        assert sorted(np.concatenate(list(rows.values())).tolist()) == list(range(n))
        for c, count in enumerate(counts):
            held = {role: int((classes[part] == c).sum()) for role, part in rows.items()}
            assert min(held.values()) >= 1
            assert all(abs(held[role] - 0.2 * count) <= 1 for role in ("val", "test"))


def test_statistics_are_the_same_in_any_number_of_pieces(monkeypatch):
    from mainstem.data import core

    x = np.random.default_rng(0).normal([5, -3, 0], [1, 2, 0], (50, 4, 3)) + 1e6
    whole = core.statistics(x, (0, 1))
    monkeypatch.setattr(core, "CHUNK", 40)
    assert core.statistics(x, (0, 1)) == whole
    assert np.allclose(whole[0], x.mean((0, 1)), rtol=1e-5) and np.allclose(whole[1][:2], x.std((0, 1))[:2], rtol=1e-5)
    assert whole[1][2] == 1  # a constant
    assert core.statistics(np.array([[1.7e9 + 1], [1.7e9 + 4]]), 0) == ([1.7e9 + 2.5], [1.5])
    assert core.statistics(np.array([[3e-9], [1e-9]]), 0) == ([2e-9], [1e-9])
    late = core.normalised(np.array([[1.7e9 + 1], [1.7e9 - 1]]), [1.7e9], [1.0])
    assert late.dtype == np.float32 and late.ravel().tolist() == [1, -1]


def test_random_numbers_for_one_purpose():
    same, again = draws(3, "a").random_sample(5), draws(3, "a").random_sample(5)
    others = [draws(4, "a"), draws(3, "b"), draws(None, "a"), draws(2**70, "a")]
    assert (same == again).all() and all((same != other.random_sample(5)).all() for other in others)


def test_a_shift_moves_whole_pixels_and_continues_the_border():
    x = torch.arange(5 * 6.0).view(1, 1, 5, 6).expand(200, 2, 5, 6).contiguous()
    moved = Shift(2, flip=True)(x, torch.Generator().manual_seed(0))
    possible = {}
    for down in range(-2, 3):
        for right in range(-2, 3):
            for flip in (False, True):
                image = x[:1].flip(3) if flip else x[:1]
                padded = F.pad(image, (2, 2, 2, 2), mode="replicate")
                image = padded[0, :, 2 + down : 7 + down, 2 + right : 8 + right]
                possible[image.numpy().tobytes()] = (down, right, flip)
    seen = {possible[image.numpy().tobytes()] for image in moved}
    assert len(seen) > 40  # of 50


def test_a_shift_of_nothing_is_the_identity():
    x = torch.randn(9, 3, 4, 4)
    assert torch.equal(Shift(0)(x, torch.Generator().manual_seed(0)), x)
