"""Pixels: files and PIL images to tensors and back; no other module decodes or resizes images."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from provgen.errors import InputError
from provgen.run import atomic_path

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


def from_pil(image: Image.Image, *, image_size: int, channels: int) -> Tensor:
    """Turn a PIL image of any mode into uint8 (channel, image_size, image_size).

    Transparent parts become white, 16-bit grey is scaled to 8 bits, EXIF rotation is applied, the shorter
    side is resized to `image_size` and the centre is cut out.

    Raises:
        InputError: Pixels without a known range, or an image too narrow to cut a square out of.
    """
    image = _on_white(_to_eight_bits(ImageOps.exif_transpose(image)))
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
    return image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")


def decode(data: bytes) -> Image.Image:
    """Decode the bytes of an image file; the first frame of an animation."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def read_image(path: Path, *, image_size: int, channels: int) -> Tensor:
    """Read an image file as `from_pil` does: uint8 (channel, image_size, image_size).

    Raises:
        InputError: Missing, damaged or unsuitable file.
    """
    with naming_image(path):
        return from_pil(decode(path.read_bytes()), image_size=image_size, channels=channels)


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


def _to_eight_bits(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise InputError("floating-point pixels have no known range, save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise InputError("32-bit pixels have no known range, save it with 8 or 16 bits")
    # 257 = 65535 / 255; PIL's own conversion to 8 bits clips at 255 instead.
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
