"""Image folders: classes from folders or from `metadata.csv`, with contributors and licences."""

from __future__ import annotations

import csv
import hashlib
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import decode, from_pil, is_grey, naming_image
from provgen.errors import InputError

_COLUMNS = ("file_name", "label", "contributor", "license")


@dataclass(frozen=True, kw_only=True)
class ImageMetadata:
    """Class name, maker and licence of one image; a cell that is empty or has no column is None."""

    label: str | None = None
    contributor: str | None = None
    license: str | None = None


def read_metadata(csv_path: Path, image_paths: Collection[str]) -> dict[str, ImageMetadata]:
    """Read the rows of `csv_path` by the relative POSIX path of their image; none if there is no such file.

    Raises:
        InputError: Unreadable file, unknown or missing column, row of an image that is not in `image_paths`,
            or second row of one image.
    """
    if not csv_path.is_file():
        return {}
    known = set(image_paths)
    metadata: dict[str, ImageMetadata] = {}
    for line, file_name, entry in _parsed_lines(csv_path):
        if file_name not in known:
            raise InputError(
                f"{csv_path} line {line}: no image {file_name!r} in {csv_path.parent}; fix or remove the row"
            )
        if file_name in metadata:
            raise InputError(f"{csv_path} line {line}: second row for {file_name}; keep one")
        metadata[file_name] = entry
    return metadata


def _parsed_lines(csv_path: Path) -> list[tuple[int, str, ImageMetadata]]:
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front.
        with csv_path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _require_columns(reader.fieldnames or [], csv_path)
            return [(reader.line_num, *_parse(row, csv_path, reader.line_num)) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {csv_path}: {error}; save it as UTF-8 CSV") from error


def _require_columns(names: Collection[str], csv_path: Path) -> None:
    # Unknown ones are refused, not skipped: a misspelt `licence` would be lost without a word.
    wrong = [f"an unknown column {name!r}" for name in names if name not in _COLUMNS]
    if "file_name" not in names:
        wrong = ["no column file_name"]
    elif len(set(names)) < len(names):
        wrong.append("a column twice")
    if wrong:
        raise InputError(f"{csv_path} has {wrong[0]}; its columns can be {', '.join(_COLUMNS)}")


def _parse(row: dict[str, str | None], csv_path: Path, line: int) -> tuple[str, ImageMetadata]:
    # DictReader files surplus cells under the key None.
    if None in row:
        raise InputError(f"{csv_path} line {line}: more cells than columns; put quotes around cells with commas")
    cells = {name: (cell or "").strip() or None for name, cell in row.items()}
    file_name = cells.pop("file_name")
    if file_name is None:
        raise InputError(f"{csv_path} line {line}: file_name is empty; fill it in or remove the row")
    return PurePosixPath(file_name).as_posix(), ImageMetadata(**cells)


_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_PROGRESS_FROM_IMAGES = 500


def load_image_folder(root: Path, image_size: int) -> ImageSet:
    """Load every image below `root`, in the order of the relative POSIX paths; the set is grey if every image is.

    Subfolders are classes, in the order of their names; a label in metadata.csv overrides the subfolder.

    Raises:
        InputError: No folder, no images, a layout that leaves classes in doubt, or a damaged file.
    """
    paths = _list_images(root)
    metadata = read_metadata(root / "metadata.csv", paths)
    entries = [metadata.get(path, ImageMetadata()) for path in paths]
    # None for an image that lies in the root: it has no class.
    folders = [PurePosixPath(path).parent.name or None for path in paths]
    classes = [entry.label or name for entry, name in zip(entries, folders, strict=True)]
    class_names = tuple(sorted({name for name in classes if name is not None}))
    label_of: dict[str | None, int] = {name: label for label, name in enumerate(class_names)}
    images, digests = _read_all(root, paths, image_size)
    return ImageSet(
        images=images,
        labels=torch.tensor([label_of.get(name, len(class_names)) for name in classes]),
        class_names=class_names,
        paths=tuple(paths),
        sha256=digests,
        contributors=tuple(entry.contributor for entry in entries),
        licenses=tuple(entry.license for entry in entries),
    )


def _list_images(root: Path) -> list[str]:
    """List relative POSIX paths, sorted; all lie in `root`, or all in its class folders."""
    if not root.is_dir():
        raise InputError(f"no folder at {root}; set data.path to a folder of images")
    at_root, by_class = _images_in(root), {folder: _images_in(folder) for folder in _folders_in(root)}
    with_images = [folder.name for folder, images in by_class.items() if images]
    if at_root and with_images:
        raise InputError(
            f"{root} holds both images ({at_root[0].name}) and class folders with images ({with_images[0]}); "
            "move all images into class folders, or all into one folder"
        )
    _require_flat_classes(by_class)
    if not at_root and not with_images:
        raise InputError(f"no images in {root}; it needs {', '.join(_SUFFIXES)} files, or class folders with them")
    empty = [folder for folder, images in by_class.items() if not images]
    if with_images and empty:
        raise InputError(f"class folder {empty[0]} holds no images; add some or remove the folder")
    return sorted(_relative(path, root) for path in chain(at_root, *by_class.values()))


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


def _relative(path: Path, root: Path) -> str:
    relative = path.relative_to(root).as_posix()
    try:
        relative.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"file name {relative!r} in {root} is not valid UTF-8; rename the file") from error
    return relative


def _read_all(root: Path, paths: list[str], image_size: int) -> tuple[Tensor, tuple[str, ...]]:
    shown = len(paths) >= _PROGRESS_FROM_IMAGES and sys.stderr.isatty()
    images, digests = [], []
    for path in track(paths, "reading images", console=Console(stderr=True), transient=True, disable=not shown):
        with naming_image(root / path):
            data = (root / path).read_bytes()
            image = decode(data)
            images.append(from_pil(image, image_size=image_size, channels=1 if is_grey(image) else 3))
        digests.append(hashlib.sha256(data).hexdigest())
    channels = max(map(len, images))
    return torch.stack([image.expand(channels, -1, -1) for image in images]), tuple(digests)
