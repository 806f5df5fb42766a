"""Image files as arrays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 3: "RGB"}


def pillow() -> Any:
    """Pillow's `Image` module, or an error that says how to install it."""
    try:
        from PIL import Image
    except ImportError:
        raise ConfigurationError("data: reading images needs Pillow; pip install 'mainstem[data]'") from None
    return Image


def read(path: str | Path, channels: int, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image file as uint8 `[C, H, W]`, resized and cropped to `size` (height, width) if given.

    A file that is no image, or is truncated, raises ConfigurationError with its path.
    """
    module = pillow()
    try:
        with module.open(path) as image:
            return decoded(image, channels, size)
    except FileNotFoundError:
        raise ConfigurationError(f"no such file: {path}") from None
    except (OSError, SyntaxError, ValueError, module.DecompressionBombError) as error:
        raise ConfigurationError(f"{path} cannot be read as an image ({error}); remove or replace it") from None


def check(path: str | Path) -> tuple[int, int]:
    """The (height, width) of an image file, without decoding it; a file that is visibly damaged raises as in `read`."""
    module = pillow()
    try:
        with module.open(path) as image:
            width, height = image.size
            image.verify()
            return height, width
    except (OSError, SyntaxError, ValueError, module.DecompressionBombError) as error:
        raise ConfigurationError(f"{path} cannot be read as an image ({error}); remove or replace it") from None


def decoded(image: Image.Image, channels: int, size: tuple[int, int] | None) -> np.ndarray:
    """A Pillow image as uint8 `[C, H, W]`: turned as its EXIF says, on black where it is transparent.

    For `size`, the image is scaled (bilinear, antialiased) until it just covers it, and its centre is taken.
    """
    from PIL import Image, ImageOps

    if size is not None:
        image.draft(MODES[channels], (2 * size[1], 2 * size[0]))  # JPEG decodes at a fraction of its size
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits a pixel
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    elif image.mode in {"LA", "PA", "RGBA"} or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    image = image.convert(MODES[channels])
    if size is not None and image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.moveaxis(pixels, -1, 0)
