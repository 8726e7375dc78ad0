"""Folders of image files: one subfolder per class, or a flat folder, with an optional metadata.csv."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.folder_metadata import ImageMetadata, read_metadata
from provgen.data.images import decode, from_pil, is_grey, naming_image
from provgen.errors import InputError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_PROGRESS_FROM_IMAGES = 500


def load_image_folder(root: Path, image_size: int) -> ImageSet:
    """Load every image below `root`, in the order of the relative POSIX paths.

    Subfolders are classes, in the order of their names; a label in metadata.csv overrides the subfolder. The
    set is grey if every image is.

    Raises:
        InputError: No folder, no images, a layout that leaves classes in doubt, or a damaged file.
    """
    paths = _list_images(root)
    metadata = read_metadata(root / "metadata.csv", paths)
    rows = [metadata.get(path, ImageMetadata()) for path in paths]
    classes = [row.label or _folder_class(path) for row, path in zip(rows, paths, strict=True)]
    class_names, labels = _to_labels(classes)
    images, digests = _read_all(root, paths, image_size)
    return ImageSet(
        images=images,
        labels=labels,
        class_names=class_names,
        paths=tuple(paths),
        sha256=digests,
        contributors=tuple(row.contributor for row in rows),
        licenses=tuple(row.license for row in rows),
    )


def _list_images(root: Path) -> list[str]:
    """List relative POSIX paths, sorted; all lie in `root`, or all in its class folders."""
    if not root.is_dir():
        raise InputError(f"no folder at {root}; set data.path to a folder of images")
    at_root = _images_in(root)
    by_class = {folder: _images_in(folder) for folder in _folders_in(root)}
    with_images = [folder.name for folder, images in by_class.items() if images]
    if at_root and with_images:
        raise InputError(
            f"{root} holds both images ({at_root[0].name}) and class folders with images ({with_images[0]}); "
            "move all images into class folders, or all into one folder"
        )
    _require_flat_classes(by_class)
    if not at_root and not with_images:
        raise InputError(
            f"no images in {root}; it needs {', '.join(_SUFFIXES)} files, or class folders with them"
        )
    if with_images:
        _require_no_empty_class(by_class)
    found = [*at_root, *(image for images in by_class.values() for image in images)]
    return sorted(_relative(path, root) for path in found)


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in _visible(folder) if path.suffix.lower() in _SUFFIXES and path.is_file())


def _folders_in(folder: Path) -> list[Path]:
    return sorted(path for path in _visible(folder) if path.is_dir())


def _visible(folder: Path) -> Iterable[Path]:
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise InputError(f"cannot list {folder}: {error.strerror}; fix its permissions") from error


def _require_flat_classes(by_class: dict[Path, list[Path]]) -> None:
    # Taken silently, train/cat/1.png would be an image of a class named train.
    for folder in by_class:
        for deeper in _folders_in(folder):
            if _images_in(deeper):
                raise InputError(
                    f"{deeper} holds images two levels down; class folders hold their images directly, "
                    f"so set data.path to {folder} or move them up"
                )


def _require_no_empty_class(by_class: dict[Path, list[Path]]) -> None:
    for folder, images in by_class.items():
        if not images:
            raise InputError(f"class folder {folder} holds no images; add some or remove the folder")


def _relative(path: Path, root: Path) -> str:
    relative = path.relative_to(root).as_posix()
    try:
        relative.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"file name {relative!r} in {root} is not valid UTF-8; rename the file") from error
    return relative


def _folder_class(path: str) -> str | None:
    folder, separator, _ = path.rpartition("/")
    return folder if separator else None


def _to_labels(classes: list[str | None]) -> tuple[tuple[str, ...], Tensor]:
    class_names = tuple(sorted({name for name in classes if name is not None}))
    label_of: dict[str | None, int] = {name: label for label, name in enumerate(class_names)}
    return class_names, torch.tensor([label_of.get(name, len(class_names)) for name in classes])


def _read_all(root: Path, paths: list[str], image_size: int) -> tuple[Tensor, tuple[str, ...]]:
    shown = len(paths) >= _PROGRESS_FROM_IMAGES and sys.stderr.isatty()
    bar = track(paths, "reading images", console=Console(stderr=True), transient=True, disable=not shown)
    read = [_read(root / path, image_size) for path in bar]
    channels = max(len(image) for image, _ in read)
    images = torch.stack([image.expand(channels, -1, -1) for image, _ in read])
    return images, tuple(digest for _, digest in read)


def _read(path: Path, image_size: int) -> tuple[Tensor, str]:
    with naming_image(path):
        data = path.read_bytes()
        image = decode(data)
        pixels = from_pil(image, image_size=image_size, channels=1 if is_grey(image) else 3)
    return pixels, hashlib.sha256(data).hexdigest()
