"""Pixels: files and PIL images to tensors and back; no other module decodes or resizes images."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from provgen.errors import InputError
from provgen.run import atomic_path

MAX_BYTES = 2**28
"""Most bytes that one image may unpack to unless the caller says otherwise, 4 a pixel as PIL holds colours."""

# Formats that PIL knows by name only, hands to other programs, or that hold measurements, films or news, not pictures.
_NOT_READ = {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
# What PIL multiplies 2- and 4-bit grey of a PNG by, but not the value that is transparent.
_GREY_STEPS = {"L;2": 85, "L;4": 17}
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # TIFF tags
# Beyond this ratio of the sides a centre crop keeps under 1 % of the image, and resizing it takes gigabytes.
_LARGEST_ASPECT_RATIO = 100
# What PIL's decoders raise on damaged files, apart from OSError.
_DECODER_ERRORS = (
    SyntaxError, ValueError, TypeError, IndexError, EOFError, OverflowError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


def to_unit_range(images: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Map uint8 pixels of any shape to [-1, 1]; `dtype` is torch's default one unless given."""
    return images.to(dtype or torch.get_default_dtype()) / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Map floating-point pixels of any shape from [-1, 1] to uint8; values outside are clamped."""
    # At least float32: half precision cannot tell all 256 levels apart near 1.
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return ((wide.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """Turn one uint8 image (channel, height, width) of 1 or 3 channels into a PIL image."""
    pixels = image.cpu().permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels)


def from_pil(image: Image.Image, *, image_size: int, channels: int, max_bytes: int = MAX_BYTES) -> Tensor:
    """Turn a PIL image of any mode into uint8 (channel, image_size, image_size).

    Transparent parts become white, 16-bit grey is scaled to 8 bits, EXIF rotation is applied, the shorter
    side is resized to `image_size` and the centre is cut out.

    Raises:
        InputError: Pixels without a known range, an image too narrow to cut a square out of, or one that unpacks
            to more than `max_bytes`, of which no pixel is read.
    """
    image = _on_white(_eight_bits(_load(image, max_bytes)))
    if max(image.size) > _LARGEST_ASPECT_RATIO * min(image.size):
        raise InputError(f"{image.width} x {image.height} pixels are too narrow to cut a square out of")
    pixels = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")))
    pixels = pixels.reshape(image.height, image.width, channels).permute(2, 0, 1)
    return resize_and_crop(pixels, image_size)


def resize_and_crop(images: Tensor, image_size: int) -> Tensor:
    """Resize the shorter side of uint8 (..., channel, height, width) and cut the centre square out."""
    if images.shape[-2:] == (image_size, image_size):
        return images.contiguous()
    from torchvision.transforms.v2 import functional as F

    resized = F.resize(images, [image_size], antialias=True)
    cropped: Tensor = F.center_crop(resized, [image_size, image_size])
    return cropped.contiguous()


def is_grey(image: Image.Image) -> bool:
    """Whether an image has no colour by its mode or, with a palette, by the colours that it shows."""
    if image.mode in ("P", "PA"):
        shown = np.asarray(_on_white(image).convert("RGB"))
        return bool((shown == shown[..., :1]).all())
    return image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16")


@cache
def readable_suffixes() -> frozenset[str]:
    """Give the suffixes, in small letters, of the formats that `decode` reads, such as `.png`."""
    Image.init()
    # The reader of JPEG also reads MPO, its kind with several pictures.
    formats = {"MPO", *_readable_formats()}
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def decode(data: bytes, *, max_bytes: int = MAX_BYTES) -> Image.Image:
    """Decode the bytes of an image file; the first frame of an animation.

    Raises:
        InputError: It unpacks to more than `max_bytes`, of which no pixel is read.
    """
    with _bounded(max_bytes):
        image = Image.open(io.BytesIO(data), formats=_readable_formats())
        return _load(image, max_bytes)


def read_image(path: Path, *, image_size: int, channels: int, max_bytes: int = MAX_BYTES) -> Tensor:
    """Read an image file as `from_pil` does: uint8 (channel, image_size, image_size).

    Raises:
        InputError: Missing, damaged, unsuitable or too large file.
    """
    with naming_image(path):
        image = decode(path.read_bytes(), max_bytes=max_bytes)
        return from_pil(image, image_size=image_size, channels=channels, max_bytes=max_bytes)


def require_memory(count: int, image_size: int) -> None:
    """Refuse as many images as the memory of this machine cannot hold.

    Raises:
        InputError: They do not fit.
    """
    # Three bytes a pixel: a colour image once, or a grey one while images are read, put together and split.
    needed, there = 3 * count * image_size**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise InputError(
            f"{count} images of {image_size} x {image_size} pixels take {needed / 1e9:.1f} GB, more than the "
            f"{there / 1e9:.1f} GB of this machine; lower data.image_size"
        )


@contextmanager
def naming_image(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong with the image at `path` into an `InputError` that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"no image at {path}; check the path") from error
    except UnidentifiedImageError as error:
        raise InputError(f"cannot read the image {path}: not an image, or damaged; replace or remove it") from error
    except (OSError, *_DECODER_ERRORS) as error:
        reason = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise InputError(f"cannot read the image {path}: {reason}; replace or remove it") from error


def save_png(image: Tensor, path: Path, text: dict[str, str]) -> None:
    """Write one uint8 image (channel, height, width) of 1 or 3 channels as a PNG with `text` as metadata, or nothing.

    Raises:
        InputError: The file cannot be written.
    """
    entries = PngInfo()
    for key, value in text.items():
        entries.add_text(key, value)
    with atomic_path(path) as temporary:
        to_pil(image).save(temporary, format="PNG", pnginfo=entries)


@cache
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NOT_READ)


@contextmanager
def _bounded(max_bytes: int) -> Iterator[None]:
    """Let PIL refuse what is larger than `max_bytes`, nothing smaller, and warn of nothing."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, max_bytes // 4
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # An icon may hold a picture that is larger than its header says: only PIL sees it in time.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise _too_large(max_bytes) from error
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _too_large(max_bytes: int) -> InputError:
    return InputError(f"it unpacks to more than data.max_bytes={max_bytes}, raise that for larger images")


def _load(image: Image.Image, max_bytes: int) -> Image.Image:
    """Read the pixels of an image that is not loaded yet, if they are few enough."""
    if 4 * image.width * image.height > max_bytes:
        raise _too_large(max_bytes)
    # Only a file that is not loaded yet says how its pixels are packed.
    packing = {tile.args for tile in getattr(image, "tile", ())} if image.format == "PNG" else set()
    if "transparency" in image.info:
        _mend_transparency(image, packing)
    image.load()
    # PIL reads transparent grey of 16 bits as colours.
    return image.convert("LA") if "LA;16B" in packing else image


def _mend_transparency(image: Image.Image, packing: set[object]) -> None:
    """Bring the transparent value of a PNG to the range that PIL brings its pixels to."""
    if "RGB;16B" in packing:
        raise InputError("16-bit colours with one transparent colour are not read exactly, save it with 8 bits")
    for name in packing & _GREY_STEPS.keys():
        image.info["transparency"] *= _GREY_STEPS[str(name)]


def _eight_bits(image: Image.Image) -> Image.Image:
    """Turn an image upright, and grey of more than 8 bits to 8 by the range that its format guarantees."""
    upright = ImageOps.exif_transpose(image)
    if image.mode == "La":
        return upright.convert("LA")
    if image.mode == "LAB":
        return upright.convert("RGB")
    if image.mode != "F" and not image.mode.startswith("I"):
        return upright
    black, white = _range_of_grey(image)
    values = np.asarray(upright).astype(np.int32)
    top = abs(white - black)
    # Rounded; PIL's own conversion to 8 bits clips at 255 instead.
    levels = ((510 * abs(values - black) + top) // (2 * top)).astype(np.uint8)
    levels[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(levels)


def _range_of_grey(image: Image.Image) -> tuple[int, int]:
    """Give the values of black and of white that the format guarantees, whatever the pixels are."""
    if image.mode == "F":
        raise InputError("floating-point pixels have no known range, save it with 8 or 16 bits")
    # PIL opens 16-bit PGM files in this mode, and scales them to 65535; also signed 16 bits of other formats.
    if image.mode == "I" and image.format != "PPM":
        raise InputError("signed or 32-bit pixels have no known range, save it with 8 or unsigned 16 bits")
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return 0, 65535
    top = 2 ** tags.get(_BITS_PER_SAMPLE, (16,))[0] - 1
    # PIL inverts white-is-zero up to 8 bits, and reads a missing tag so, but does not invert 16.
    return (top, 0) if tags.get(_PHOTOMETRIC, 0) == 0 else (0, top)


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
