"""Named sources of training images, loaded whole into memory."""

from __future__ import annotations

import hashlib
import http.client
import tarfile
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.folder import load_image_folder
from provgen.data.images import MAX_BYTES, require_memory, resize_and_crop
from provgen.data.packed import read_cifar10_folder, read_idx_folder
from provgen.errors import InputError

_DIGIT_NAMES = tuple("0123456789")
_CLASS_NAMES = {
    "digits": _DIGIT_NAMES,
    "mnist": _DIGIT_NAMES,
    "fashion_mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}  # fmt: skip
_TORCHVISION_NAMES = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}


def load_images(
    source: str,
    path: str | Path | None,
    image_size: int,
    *,
    wanted: Collection[str] | None = None,
    max_bytes: int = MAX_BYTES,
) -> ImageSet:
    """Load all examples of a source's training part, in its own order.

    Args:
        source: `digits`, `fashion_mnist`, `mnist`, `cifar10` or `folder`.
        path: Folder with the files; None for `digits`, and elsewhere to download into ~/.cache/provgen.
        image_size: Height and width in pixels that the images are resized and cropped to.
        wanted: SHA-256 digests of the files of a `folder` to load; None, and any other source, loads all.
        max_bytes: Most bytes that one image file or packed file may unpack to.

    Raises:
        InputError: Unknown source, missing, damaged or too large files, or a failed download.
    """
    folder = None if path is None else Path(path).expanduser()
    if source == "folder":
        if folder is None:
            raise InputError("data.source=folder needs data.path; set it to an image folder")
        return load_image_folder(folder, image_size, wanted=wanted, max_bytes=max_bytes)
    if source == "digits":
        if folder is not None:
            raise InputError(f"data.source=digits is embedded and takes no data.path, got {path}; leave it out")
        return _load_digits(image_size)
    if source not in _TORCHVISION_NAMES:
        known = ", ".join([*_CLASS_NAMES, "folder"])
        raise InputError(f"unknown data.source={source}; choose one of {known}")
    return _load_packed(source, folder or _download(source), image_size, max_bytes)


def _load_digits(image_size: int) -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    levels = torch.from_numpy(digits.images).to(torch.uint8)[:, None]  # 0 ... 16
    pixels = (levels * (255 / 16)).round().to(torch.uint8)
    return _pack("digits", levels, pixels, torch.from_numpy(digits.target).long(), image_size)


def _load_packed(source: str, folder: Path, image_size: int, max_bytes: int) -> ImageSet:
    if source == "cifar10":
        images, labels = read_cifar10_folder(folder, max_bytes=max_bytes)
    else:
        images, labels = read_idx_folder(folder, _TORCHVISION_NAMES[source], max_bytes=max_bytes)
    last = len(_CLASS_NAMES[source]) - 1
    unknown = labels[(labels < 0) | (labels > last)].tolist()
    if unknown:
        raise InputError(f"label {unknown[0]} in {folder}, {source} has 0 ... {last}; check data.path")
    return _pack(source, images, images, labels, image_size)


def _pack(source: str, originals: Tensor, pixels: Tensor, labels: Tensor, image_size: int) -> ImageSet:
    """Give packed images names, and digests of the `originals`, which no choice of image size changes."""
    require_memory(len(labels), image_size)
    # In parts: on some processors torchvision resizes in float32, four times the memory.
    unknown = (None,) * len(labels)
    return ImageSet(
        images=torch.cat([resize_and_crop(part, image_size) for part in pixels.split(4096)]),
        labels=labels,
        class_names=_CLASS_NAMES[source],
        paths=tuple(f"{source}/{i:05d}" for i in range(len(labels))),
        sha256=tuple(hashlib.sha256(image).hexdigest() for image in originals.contiguous().numpy()),
        contributors=unknown,
        licenses=unknown,
    )


def _download(source: str) -> Path:
    """Let torchvision download a data set, once, and return its folder."""
    import torchvision

    folder = Path.home() / ".cache" / "provgen" / source
    try:
        # train=False: the download brings both parts, and the test part is the quicker one to read back.
        getattr(torchvision.datasets, _TORCHVISION_NAMES[source])(folder, train=False, download=True)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException, tarfile.TarError) as error:
        raise InputError(
            f"cannot download {source} to {folder}: {' '.join(str(error).split())}; "
            "get its files another way and set data.path to their folder"
        ) from error
    return folder
