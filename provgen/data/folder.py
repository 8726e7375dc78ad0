"""Image folders: classes from folders or from `metadata.csv`, with contributors and licences."""

from __future__ import annotations

import csv
import hashlib
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from unicodedata import normalize

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import (
    MAX_BYTES,
    decode,
    from_pil,
    is_grey,
    naming_image,
    readable_suffixes,
    require_memory,
)
from provgen.errors import InputError, notice

_COLUMNS = ("file_name", "label", "contributor", "license")


@dataclass(frozen=True, kw_only=True)
class ImageMetadata:
    """Class name, maker and licence of one image; a cell that is empty or has no column is None."""

    label: str | None = None
    contributor: str | None = None
    license: str | None = None


def read_metadata(csv_path: Path, image_paths: Collection[str]) -> dict[str, ImageMetadata]:
    """Read the rows of `csv_path` by the relative POSIX path of their image; none if there is no such file.

    A row finds a file whose name is in another Unicode normal form, unless there is one of its own form.

    Raises:
        InputError: Unreadable file, unknown or missing column, row of an image that is not in `image_paths`,
            or second row of one image.
    """
    if not csv_path.is_file():
        return {}
    path_of = {normalize("NFC", path): path for path in image_paths}
    path_of |= {path: path for path in image_paths}
    metadata: dict[str, ImageMetadata] = {}
    for line, file_name, entry in _parsed_lines(csv_path):
        path = path_of.get(file_name) or path_of.get(normalize("NFC", file_name))
        if path is None:
            raise InputError(
                f"{csv_path} line {line}: no image {file_name!r} in {csv_path.parent}; fix or remove the row"
            )
        if path in metadata:
            raise InputError(f"{csv_path} line {line}: second row for {file_name}; keep one")
        metadata[path] = entry
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


_METADATA_SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".tsv")
_PROGRESS_FROM_IMAGES = 500


def load_image_folder(
    root: Path, image_size: int, *, wanted: Collection[str] | None = None, max_bytes: int = MAX_BYTES
) -> ImageSet:
    """Load every image below `root`, in the order of the relative POSIX paths; the set is grey if every image is.

    Subfolders are classes, in the order of their names; a label in metadata.csv overrides the subfolder. Names of
    classes are in Unicode's normal form NFC, so that those which look alike are one class.

    Args:
        root: The folder.
        image_size: Height and width in pixels that the images are resized and cropped to.
        wanted: SHA-256 digests of the files to load; others may be broken, as they are not decoded. None loads all.
        max_bytes: Most bytes that one image may unpack to.

    Raises:
        InputError: No folder, no images, a layout that leaves classes in doubt, or a damaged or too large file.
    """
    paths = _list_images(root, skips_lost=wanted is not None)
    metadata = read_metadata(root / "metadata.csv", paths)
    require_memory(len(paths if wanted is None else wanted), image_size)
    files = _read_all(root, paths, image_size, wanted, max_bytes)
    entries = [metadata.get(path, ImageMetadata()) for path in files]
    classes = [_class_of(path, entry) for path, entry in zip(files, entries, strict=True)]
    class_names = tuple(sorted({name for name in classes if name is not None}))
    label_of: dict[str | None, int] = {name: label for label, name in enumerate(class_names)}
    return ImageSet(
        images=_stack([image for _, image in files.values()], image_size),
        labels=torch.tensor([label_of.get(name, len(class_names)) for name in classes], dtype=torch.int64),
        class_names=class_names,
        paths=tuple(files),
        sha256=tuple(digest for digest, _ in files.values()),
        contributors=tuple(entry.contributor for entry in entries),
        licenses=tuple(entry.license for entry in entries),
    )


def _class_of(path: str, entry: ImageMetadata) -> str | None:
    """Name the class of an image; None for one in the root without a label."""
    return normalize("NFC", entry.label or PurePosixPath(path).parent.name) or None


def _list_images(root: Path, *, skips_lost: bool) -> list[str]:
    """List relative POSIX paths, sorted; all lie in `root`, or all in its class folders.

    Links of images that lead nowhere are refused unless it `skips_lost` ones.
    """
    if not root.is_dir():
        raise InputError(f"no folder at {root}; set data.path to a folder of images")
    found = sorted(_files_below(root))
    images = [path for path in found if path.suffix.lower() in readable_suffixes()]
    there = {path for path in found if path.is_file()}
    _require_there([path for path in found if path not in there and not (skips_lost and path in images)])
    images = [path for path in images if path in there]
    others = sorted(there - {*images, root / "metadata.csv"})
    _require_no_other_metadata(others, root)
    _say_left_out(others, root)
    _require_layout(images, root)
    return sorted(_relative(path, root) for path in images)


def _files_below(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield what is no folder, at any depth, but nothing hidden; `above` are the folders that it lies in."""
    here = folder.resolve()
    if here in above:  # a link that leads back up
        return
    folders, others = _split(folder)
    yield from others
    for inner in folders:
        yield from _files_below(inner, above | {here})


def _split(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the folders in a folder, and all else in it, but nothing hidden."""
    folders: list[Path] = []
    others: list[Path] = []
    try:
        for path in folder.iterdir():
            if not path.name.startswith("."):
                (folders if path.is_dir() else others).append(path)
    except OSError as error:
        raise InputError(f"cannot list {folder}: {error.strerror}; fix its permissions") from error
    return folders, others


def _require_there(lost: list[Path]) -> None:
    for path in lost:
        if path.is_symlink():
            raise InputError(f"{path} is a link that leads nowhere; mend or remove it")
        raise InputError(f"{path} is neither a file nor a folder; remove it")


def _require_no_other_metadata(paths: list[Path], root: Path) -> None:
    for path in paths:
        if path.stem.lower() == "metadata" and path.suffix.lower() in _METADATA_SUFFIXES:
            raise InputError(
                f"{path} would not be read; write {root / 'metadata.csv'}, CSV with the columns {', '.join(_COLUMNS)}, "
                "in its place"
            )


def _say_left_out(paths: list[Path], root: Path) -> None:
    counts = Counter(path.suffix.lower() or "no suffix" for path in paths)
    if counts:
        kinds = [f"{name} ({count})" for name, count in counts.most_common()]
        notice(f"left out what is no image in {root}: {', '.join(kinds)}")


def _require_layout(images: list[Path], root: Path) -> None:
    at_root, deeper = ([path for path in images if (path.parent == root) == is_at_root] for is_at_root in (True, False))
    # Taken silently, train/cat/1.png would be an image of a class named train.
    for path in deeper:
        if path.parent.parent != root:
            raise InputError(
                f"{path.parent} holds images {len(path.relative_to(root).parts) - 1} levels down; class folders hold "
                f"their images directly, so set data.path to {path.parent.parent} or move them up"
            )
    if at_root and deeper:
        raise InputError(
            f"{root} holds both images ({at_root[0].name}) and class folders with images ({deeper[0].parent.name}); "
            "move all images into class folders, or all into one folder"
        )
    if not images:
        raise InputError(f"no images in {root}; it needs files such as 1.png or 1.jpg, or class folders with them")
    empty = set(_split(root)[0]) - {path.parent for path in deeper}
    if deeper and empty:
        raise InputError(f"class folder {min(empty)} holds no images; add some or remove the folder")


def _relative(path: Path, root: Path) -> str:
    relative = path.relative_to(root).as_posix()
    try:
        relative.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"file name {relative!r} in {root} is not valid UTF-8; rename the file") from error
    return relative


def _read_all(
    root: Path, paths: list[str], image_size: int, wanted: Collection[str] | None, max_bytes: int
) -> dict[str, tuple[str, Tensor]]:
    """Read digest and pixels of the files that are `wanted`, by their paths."""
    shown = len(paths) >= _PROGRESS_FROM_IMAGES and sys.stderr.isatty()
    files = {}
    for path in track(paths, "reading images", console=Console(stderr=True), transient=True, disable=not shown):
        with naming_image(root / path):
            data = (root / path).read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if wanted is None or digest in wanted:
                image = decode(data, max_bytes=max_bytes)
                channels = 1 if is_grey(image) else 3
                files[path] = digest, from_pil(image, image_size=image_size, channels=channels, max_bytes=max_bytes)
    return files


def _stack(images: list[Tensor], image_size: int) -> Tensor:
    """Put images together, as colours if one of them is coloured."""
    channels = max(map(len, images), default=1)
    none = torch.empty(0, channels, image_size, image_size, dtype=torch.uint8)
    return torch.stack([image.expand(channels, -1, -1) for image in images]) if images else none
