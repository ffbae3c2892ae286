"""Pictures from files, as every stage reads them: upright, 8 bits, RGB.

- A camera's orientation (EXIF) is applied.
- 16-bit grey values are scaled by 255/65535; Pillow's own conversion cuts them off at 255
  (https://github.com/python-pillow/Pillow/issues/3011), and a radiograph would turn white.
- Floating-point values must lie between 0 and 1 and are scaled by 255; others are refused,
  since nobody knows their range and Pillow would show most of them black.
- Transparency is laid over white, as on paper.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from core.errors import InputError
from core.reading import open_regular, prefix_of

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Those of these endings, and their relatives. Others are not decoded: one of Pillow's (EPS)
# starts a program.
FORMATS = ("BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
MAX_PIXELS = 2**26
_SIXTEEN_BITS = 65535.0
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")


def read_image(path: str | Path, flag: str = "") -> Image.Image:
    """Read a picture.

    Args:
        path: A PNG, JPG or other picture; grey or colour, 8 or 16 bits.
        flag: The flag or setting that led to it, for messages.

    Returns:
        An 8-bit RGB picture.

    Raises:
        InputError: The file is missing or no picture that can be shown.
    """
    return decoded(path, flag, lambda file: _as_rgb(ImageOps.exif_transpose(file)))


def decoded(
    path: str | Path, flag: str, decode: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    """What a function makes of an opened picture.

    Args:
        path: Of one of `FORMATS`.
        flag: The flag or setting that led to it, for messages.
        decode: Gets the picture before its pixels are read.

    Raises:
        InputError: The file is missing, no regular file, no picture, or has more than
            `MAX_PIXELS` pixels: a file of some kilobytes may claim any number.
    """
    prefix = prefix_of(flag)
    if not Path(path).exists():
        raise InputError(f"{prefix}there is no image {path}")
    with open_regular(path, flag, "picture") as opened:
        try:
            # A build of Pillow may lack one of them.
            known = set(Image.registered_extensions().values())
            with Image.open(opened, formats=[f for f in FORMATS if f in known]) as file:
                _check_pixels(*file.size)
                return decode(file)
        # Pillow's decoders raise whatever a broken file leads them to.
        except Exception as error:
            raise InputError(f"{prefix}the image {path} cannot be read ({error})") from None


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"it has {width} x {height} pixels, more than {MAX_PIXELS / 1e6:.0f} million"
        )


def load_image(path: str | Path, size: int, flag: str = "") -> torch.Tensor:
    """Read a picture as a square tensor: rows first, greyscale repeated to three channels.

    Args:
        path: A PNG, JPG or other picture; grey or colour, 8 or 16 bits.
        size: Side in pixels that it is resized to, both ways.
        flag: The flag or setting that led to it, for messages.

    Returns:
        3 x size x size in [0, 1].

    Raises:
        InputError: The file is missing or no picture that can be shown.
    """
    picture = read_image(path, flag)
    if picture.size != (size, size):
        picture = picture.resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        picture = _scaled(np.asarray(picture, dtype=np.float64) / _SIXTEEN_BITS)
    elif picture.mode == "F":
        picture = _scaled(_checked(np.asarray(picture, dtype=np.float64)))
    if picture.mode in _TRANSPARENT or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def _scaled(values: np.ndarray) -> Image.Image:
    """Grey values in [0, 1] (H x W) in 8 bits."""
    return Image.fromarray((255 * values).clip(0, 255).round().astype(np.uint8))


def _checked(values: np.ndarray) -> np.ndarray:
    if not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"its floating-point values lie in [{values.min():g}, {values.max():g}], "
            "not in [0, 1]; save it with 8 or 16 bits"
        )
    return values
