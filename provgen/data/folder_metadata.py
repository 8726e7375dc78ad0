"""`metadata.csv` of an image folder: who made an image, under which licence, and of which class it is."""

from __future__ import annotations

import csv
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from provgen.errors import InputError

_COLUMNS = ("file_name", "label", "contributor", "license")


@dataclass(frozen=True, kw_only=True)
class ImageMetadata:
    """One row; a field that is empty or has no column is None."""

    label: str | None = None
    """Class name."""
    contributor: str | None = None
    """Who made the image."""
    license: str | None = None
    """Its licence."""


def read_metadata(csv_path: Path, image_paths: Collection[str]) -> dict[str, ImageMetadata]:
    """Read the rows of `csv_path` by the relative POSIX path of their image; none if there is no such file.

    Raises:
        InputError: Unreadable file, unknown or missing column, row of an image that is not in `image_paths`,
            or second row of one image.
    """
    if not csv_path.is_file():
        return {}
    known = set(image_paths)
    rows: dict[str, ImageMetadata] = {}
    for line, (file_name, row) in _rows(csv_path):
        if file_name not in known:
            raise InputError(
                f"{csv_path} line {line}: no image {file_name!r} in {csv_path.parent}; fix or remove the row"
            )
        if file_name in rows:
            raise InputError(f"{csv_path} line {line}: second row for {file_name}; keep one")
        rows[file_name] = row
    return rows


def _rows(csv_path: Path) -> list[tuple[int, tuple[str, ImageMetadata]]]:
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front.
        with csv_path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            _require_columns(reader.fieldnames or [], csv_path)
            return [(reader.line_num, _parse(row, csv_path, reader.line_num)) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {csv_path}: {error}; save it as UTF-8 CSV") from error


def _require_columns(names: Collection[str], csv_path: Path) -> None:
    if "file_name" not in names:
        raise InputError(f"{csv_path} has no column file_name; its columns can be {', '.join(_COLUMNS)}")
    # Refused, not skipped: a misspelt `licence` would be lost without a word.
    unknown = [name for name in names if name not in _COLUMNS]
    if unknown or len(set(names)) < len(names):
        what = f"an unknown column {unknown[0]!r}" if unknown else "a column twice"
        raise InputError(f"{csv_path} has {what}; its columns can be {', '.join(_COLUMNS)}")


def _parse(row: dict[str, str | None], csv_path: Path, line: int) -> tuple[str, ImageMetadata]:
    # DictReader files surplus cells under the key None.
    if None in row:
        raise InputError(
            f"{csv_path} line {line}: more cells than columns; put quotes around cells with commas"
        )
    cells = {name: (cell or "").strip() or None for name, cell in row.items()}
    file_name = cells.pop("file_name")
    if file_name is None:
        raise InputError(f"{csv_path} line {line}: file_name is empty; fill it in or remove the row")
    return PurePosixPath(file_name).as_posix(), ImageMetadata(**cells)
