"""Image files, and the scaling of pictures.

We open every file ourselves and allow three formats only, whatever the suffix says.
"""

import math
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from tfm_jax.errors import InputError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
Resize = Literal["bicubic", "bilinear"]
FORMATS = ("JPEG", "PNG", "WEBP")
NO_IMAGE = "is not an image; expected a JPEG, PNG or WebP file"
LONGEST = 16
"""How often the clip may fit into a picture, side by side, that is scaled as a whole."""


def read_image(path: Path, max_pixels: int) -> Image.Image:
    """Read an image file: 8-bit RGB, turned upright as its EXIF orientation says.

    Sixteen bits per channel are reduced to eight. Pictures with transparent pixels are refused: a background would have
    to be invented, and training would learn it.

    Raises:
        InputError: the file does not exist, is not an image, is damaged or animated, has transparent pixels, or has
            more than `max_pixels` pixels.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected an image")
    too_large = f"expected at most {max_pixels:,} pixels"
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            for kind in (UserWarning, Image.DecompressionBombWarning):  # damage that Pillow passes over; the size
                warnings.simplefilter("error", kind)
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise InputError(f"{path}: has {image.width} x {image.height} pixels; {too_large}")
                if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photo with a preview
                    raise InputError(f"{path}: is animated; expected a still picture, or a video file")
                image.load()
                upright = ImageOps.exif_transpose(_eight_bits(image))
                return _opaque(upright, path)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"{path}: has far too many pixels; {too_large}") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: {NO_IMAGE}") from None
    except Exception as error:  # on damaged files, Pillow raises exceptions of many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: is damaged ({reason}); expected an intact image") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey, which Pillow would clip; it converts 16-bit colour by itself."""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    grey = Image.fromarray(np.round(values / 257).astype(np.uint8))
    grey.info = image.info
    transparent = image.info.get("transparency")
    if transparent is not None:  # one value of 16 bits is transparent
        grey.info = {name: value for name, value in image.info.items() if name != "transparency"}
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _opaque(image: Image.Image, path: Path) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (255, 255):
            raise InputError(f"{path}: has transparent pixels; expected an opaque picture; put it on a background")
    return image.convert("RGB")


def read_size(path: Path) -> tuple[int, int]:
    """Return the height and width of an image as displayed, from its header. Threads may do so at the same time.

    Raises:
        InputError: the file is not an image, or its header is damaged.
    """
    try:
        with path.open("rb") as file, Image.open(file, formats=FORMATS) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except UnidentifiedImageError:
        raise InputError(f"{path}: {NO_IMAGE}") from None
    except Exception as error:  # on damaged files, Pillow raises exceptions of many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: is damaged ({reason}); expected an intact image") from error


def scale_and_crop(
    image: Image.Image, height: int, width: int, aspect: Fraction, resize: Resize = "bicubic"
) -> UInt8[np.ndarray, "y x 3"]:
    """Crop an RGB picture around its centre to the new aspect ratio, and scale it with antialiasing.

    Args:
        aspect: width of a stored pixel as displayed, divided by its height.
        resize: bilinear gives the pixels of the official code (crop_and_resize in diffsynth/trainers/utils.py), which
            scales the whole picture to a whole number of pixels, and then crops a whole number of pixels.
    """
    scale = max(width / (image.width * aspect), height / image.height)
    if resize == "bilinear":
        return _scale_then_crop(image, height, width, aspect, float(scale))
    left = max(0, (image.width - width / (scale * aspect)) / 2)
    top = max(0, (image.height - height / scale) / 2)
    box = (float(left), float(top), float(image.width - left), float(image.height - top))
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box))


def _scale_then_crop(
    image: Image.Image, height: int, width: int, aspect: Fraction, scale: float
) -> UInt8[np.ndarray, "y x 3"]:
    # Only a strip is so long that this cuts something off. Scaled as a whole, it could fill the memory.
    image = _middle(image, math.ceil(LONGEST * width / (scale * aspect)), math.ceil(LONGEST * height / scale))
    # Not by a box, which Pillow rounds to single precision: a few pixels in a hundred would differ by one level.
    whole = image.resize((round(image.width * aspect * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    return np.asarray(_middle(whole, width, height))


def _middle(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return the middle of a picture, of at most the given size."""
    width, height = min(width, image.width), min(height, image.height)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
