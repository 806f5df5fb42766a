"""Patches of the photographs that come inside scikit-image's and scikit-learn's packages; nothing is downloaded."""

from __future__ import annotations

import functools

import numpy as np

from ..errors import ConfigurationError
from ..registry import register
from . import images
from .augment import Shift
from .core import Data, build, draws, fewer, normalised, packaged, statistics, whole

FILES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "colour chart": "color.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "galaxies": "hubble_deep_field.jpg",
    "tissue": "ihc.png",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "temple": "china.jpg",
    "flower": "flower.jpg",
}
PHOTOGRAPHS = ("astronaut", "cat", "coffee", "motorcycle", "rocket", "temple", "flower")
FLAT = 4.0  # a texture patch with a smaller standard deviation (of 255) shows nothing
BLOCK = 64  # pixels; splits are cut in blocks of this side, so that neighbouring patches stay together


@functools.cache
def _image(label: str, channels: int) -> np.ndarray:
    package = "sklearn" if label in {"temple", "flower"} else "skimage"
    folder = "datasets/images" if package == "sklearn" else "data"
    return images.read(packaged(package, f"{folder}/{FILES[label]}", "patches"), channels)


def _tiles(label: str, channels: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """All tiles `[N, C, size, size]` of an image, side by side and from its top left, and the block of each `[N]`."""
    image = _image(label, channels)
    height, width = (side // size for side in image.shape[1:])
    tiles = image[:, : height * size, : width * size].reshape(channels, height, size, width, size)
    tiles = tiles.transpose(1, 3, 0, 2, 4).reshape(height * width, channels, size, size)
    side = max(1, BLOCK // size)
    rows, columns = np.divmod(np.arange(height * width), width)
    return tiles, rows // side * width + columns // side


def _dealt(blocks: np.ndarray, sizes: dict[str, int], rng: np.random.RandomState) -> dict[str, np.ndarray]:
    """Tile numbers of each split: whole blocks in random order, until the split has its size; then the size is cut."""
    order = rng.permutation(np.unique(blocks))
    parts, start = {}, 0
    for role, size in sizes.items():
        held = np.array([], dtype=int)
        while len(held) < size and start < len(order):
            held = np.append(held, np.flatnonzero(blocks == order[start]))
            start += 1
        parts[role] = np.sort(rng.permutation(held)[:size])
    return parts


@register("data", "textures")
def textures(*, seed: int | None = None, count: int | None = None, size: int = 16, shift: int = 2) -> Data:
    """Which of 16 pictures is this patch from? Grey patches `[N, 1, size, size]`, 16 classes of equal size.

    The patches lie side by side, so no two share a pixel, and are dealt to the splits in blocks of 64x64 pixels. Nearly
    flat ones are left out. At 16 pixels there are 3440 training, 1120 validation and 1120 test patches. They are hard
    on purpose: a resnet-8 (lr 0.1, batch 64) reaches about 60 % in ten epochs, a resnet-20 about 70 % in twenty, so
    differences between networks show.

    Args:
        count: this many of the training patches, stratified.
        size: side of a patch in pixels, 4 to 48; larger ones are easier and fewer.
        shift: augmentation moves patches by up to this many pixels and mirrors half of them; 0 leaves both out.
    """
    size, shift = whole("size", size, 4, 48), whole("shift", shift, 0, size // 2)
    tiles: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for label in FILES:
        patches, blocks = _tiles(label, 1, size)
        shown = patches.std(axis=(1, 2, 3)) >= FLAT
        tiles[label] = patches[shown], blocks[shown]
    # the rest of the smallest picture is slack for blocks that do not come out even
    least = min(len(patches) for patches, _ in tiles.values())
    sizes = {"test": int(0.18 * least), "val": int(0.18 * least), "train": int(0.55 * least)}
    rng = draws(seed, "split")
    x: dict[str, list[np.ndarray]] = {role: [] for role in sizes}
    for patches, blocks in tiles.values():
        for role, rows in _dealt(blocks, sizes, rng).items():
            x[role].append(patches[rows])
    if any(len(part) < sizes[role] for role, parts in x.items() for part in parts):
        raise ConfigurationError(f"size: {size} leaves too few patches to split; give a smaller one")
    splits = {role: (np.concatenate(parts), np.repeat(np.arange(16), sizes[role])) for role, parts in x.items()}
    pixels, y = splits["train"]
    rows = fewer(np.arange(len(y)), count, seed, name="textures", classes=y)
    splits["train"] = pixels[rows], y[rows]
    mean, std = statistics(splits["train"][0], (0, 2, 3))
    return build(
        "textures",
        "classification",
        "image",
        {role: (normalised(pixels, mean, std, dim=1), y) for role, (pixels, y) in splits.items()},
        outputs=16,
        labels=list(FILES),
        augment=Shift(shift, flip=True) if shift else None,
        meta={"size": [size, size], "channels": 1, "range": 255, "mean": mean, "std": std},
    )


@register("data", "photos")
def photos(*, seed: int | None = None, count: int | None = None, size: int = 32, noise: float = 25.0) -> Data:
    """Remove the noise from colour photographs: noisy and clean patches, both `[N, 3, size, size]`.

    Patches of seven photographs lie side by side, so no two share a pixel, and are dealt to the splits (60/20/20) in
    blocks of 64x64 pixels. The noise is Gaussian, drawn once, and not clipped. Inputs and targets are normalised alike,
    with one mean and deviation `meta["std"]` for all channels: an mse of m is `m * std**2` in squared grey values, and
    leaving the input as it is scores `(noise / std)**2`.

    Args:
        count: this many of the training patches.
        size: side of a patch in pixels, 8 to 64.
        noise: standard deviation in grey values of 255.
    """
    size = whole("size", size, 8, 64)
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise <= 255:
        raise ConfigurationError(f"noise: {noise!r} is not a number between 0 and 255")
    rng = draws(seed, "split")
    parts: dict[str, list[np.ndarray]] = {"test": [], "val": [], "train": []}
    for label in PHOTOGRAPHS:
        patches, blocks = _tiles(label, 3, size)
        fifth = len(patches) // 5
        sizes = {"test": fifth, "val": fifth, "train": len(patches)}
        for role, rows in _dealt(blocks, sizes, rng).items():
            parts[role].append(patches[rows])
    clean = {role: np.concatenate(pieces).astype(np.float32) for role, pieces in parts.items()}
    clean["train"] = clean["train"][fewer(np.arange(len(clean["train"])), count, seed, name="photos")]
    mean, std = (values * 3 for values in statistics(clean["train"], (0, 1, 2, 3)))
    splits = {}
    for role, pixels in clean.items():
        noisy = pixels + (noise * draws(seed, f"noise {role}").standard_normal(pixels.shape)).astype(np.float32)
        splits[role] = normalised(noisy, mean, std, dim=1), normalised(pixels, mean, std, dim=1)
    meta = {"size": [size, size], "channels": 3, "range": 255, "mean": mean, "std": std, "noise": float(noise)}
    meta["target"] = {"name": "clean", "mean": mean, "std": std}
    return build("photos", "regression", "image", splits, outputs=3, meta=meta)
