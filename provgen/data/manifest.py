"""The manifest: which image carries which example index, for the whole life of a run."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from unicodedata import normalize

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.errors import InputError
from provgen.run import atomic_path

SCHEMA_VERSION = 2
"""Version 1 had no column `reachable`: every training image was."""
_SCHEMA = pa.schema(
    {
        "split": pa.string(),
        "example_index": pa.int64(),
        "path": pa.string(),
        "sha256": pa.string(),
        "label": pa.int64(),
        "class_name": pa.string(),
        "contributor": pa.string(),
        "license": pa.string(),
        "reachable": pa.bool_(),
    }
)

FRESH = ["path", "contributor", "license"]
"""Columns that are those of the images as they are now; all others are those of the first day."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A training image as a trace names it."""

    example_index: int
    """Position in the train set."""
    path: str
    """Path relative to the data folder."""
    class_name: str | None
    """None for an image without a label."""
    contributor: str | None
    """Who made the image, where known."""
    license: str | None
    """Licence of the image, where known."""
    reachable: bool
    """Whether the index head covers the image, so that the network can name it."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Every train and holdout image of a run, in the order of the example index."""

    table: pa.Table
    """One row per image, all of train before all of holdout; `example_index` counts within each, and `reachable` is
    null for holdout."""
    image_size: int
    """Height and width in pixels."""
    channels: int
    """1 or 3."""
    class_names: tuple[str, ...]
    """One name per class; the label `len(class_names)` is the null label."""

    @classmethod
    def of(cls, train: ImageSet, holdout: ImageSet) -> Manifest:
        """Fix the order that `train` and `holdout` are in now; all of `train` is reachable."""
        assert train.class_names == holdout.class_names
        return cls(
            table=pa.concat_tables([_table(train, "train"), _table(holdout, "holdout")]),
            image_size=train.images.shape[-1],
            channels=train.images.shape[1],
            class_names=train.class_names,
        )

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            InputError: Missing or damaged file, or one of another version of provgen.
        """
        if not path.is_file():
            raise InputError(f"no manifest at {path}; it is written by training, so give the folder of a run")
        try:
            table = pq.ParquetFile(path).read()
            about = json.loads((table.schema.metadata or {})[b"provgen"])
            version = about.pop("schema_version")
            if version == 1:
                reachable = pc.if_else(pc.equal(table["split"], "train"), True, pa.scalar(None, pa.bool_()))  # noqa: FBT003
                table = table.append_column(_SCHEMA.field("reachable"), reachable)
            if version in (1, SCHEMA_VERSION):
                return cls._checked(table, **about)
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is not a whole manifest of provgen; restore it or start a new output_dir"
            ) from error
        raise InputError(
            f"{path} has schema version {version}, this provgen reads 1 to {SCHEMA_VERSION}; "
            "use the provgen that wrote it or start a new output_dir"
        )

    @classmethod
    def _checked(cls, table: pa.Table, image_size: int, channels: int, class_names: list[str]) -> Manifest:
        splits = table["split"].to_pylist()
        num_train = splits.count("train")
        num_holdout = len(splits) - num_train
        if splits != ["train"] * num_train + ["holdout"] * num_holdout:
            raise ValueError("rows out of order")
        counted = [*range(num_train), *range(num_holdout)]
        if not table.schema.equals(_SCHEMA) or table["example_index"].to_pylist() != counted:
            raise ValueError("columns are not those of a manifest")
        if table["reachable"].is_null().to_pylist() != [False] * num_train + [True] * num_holdout:
            raise ValueError("train rows are reachable or not, holdout rows are neither")
        return cls(table=table, image_size=image_size, channels=channels, class_names=tuple(class_names))

    def save(self, path: Path) -> None:
        """Write the manifest as Parquet; the file appears only when complete.

        Raises:
            InputError: The file cannot be written.
        """
        about = {"schema_version": SCHEMA_VERSION}
        about |= {name: getattr(self, name) for name in ("image_size", "channels", "class_names")}
        with atomic_path(path) as temporary:
            pq.write_table(self.table.replace_schema_metadata({"provgen": json.dumps(about)}), temporary)

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return len(self._train)

    @cached_property
    def _train(self) -> pa.Table:
        return self.table.filter(pc.equal(self.table["split"], "train"))

    @cached_property
    def reachable(self) -> Tensor:
        """Which training images the index head covers, bool (train,); no trace by the network names another."""
        return torch.tensor(self._train["reachable"].to_pylist(), dtype=torch.bool)

    def with_reachable(self, covered: Tensor) -> Manifest:
        """Mark the example indices `covered` (int64, (covered,)) as reachable, and all others as not."""
        reachable = torch.zeros(self.num_train, dtype=torch.bool)
        reachable[covered.cpu()] = True
        column = pa.array(reachable.tolist() + [None] * (len(self.table) - self.num_train), pa.bool_())
        position = _SCHEMA.get_field_index("reachable")
        return replace(self, table=self.table.set_column(position, _SCHEMA.field(position), column))

    @cached_property
    def fingerprint(self) -> str:
        """Digest (hex) of pixels, labels and their order; not of `reachable`, which is no property of the data."""
        columns = [self._train[name].to_pylist() for name in ("sha256", "label")]
        content = [self.image_size, self.channels, self.class_names, *columns]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def with_names_of(self, train: ImageSet, holdout: ImageSet) -> Manifest:
        """Take over paths, contributors and licences of aligned images, which may have changed since."""
        fresh, table = pa.concat_tables([_table(train, "train"), _table(holdout, "holdout")]), self.table
        for name in FRESH:
            table = table.set_column(_SCHEMA.get_field_index(name), _SCHEMA.field(name), fresh[name])
        return replace(self, table=table)

    def count_changed(self, other: Manifest) -> int:
        """Count images whose path, contributor or licence another manifest of the same images gives otherwise."""
        rows = zip(self.table.select(FRESH).to_pylist(), other.table.select(FRESH).to_pylist(), strict=True)
        return sum(before != now for before, now in rows)

    def sources(self, indices: Tensor | Sequence[int]) -> list[Source]:
        """Name the training images with the example `indices` (selected,), in that order.

        Raises:
            InputError: There is no such training image.
        """
        wanted = [int(index) for index in indices]
        if wrong := [index for index in wanted if not 0 <= index < self.num_train]:
            raise InputError(
                f"no training image has the example index {wrong[0]}; give numbers from 0 to {self.num_train - 1}"
            )
        named = self._train.take(pa.array(wanted, pa.int64()))
        return [Source(**row) for row in named.select(list(Source.__dataclass_fields__)).to_pylist()]

    def align(self, images: ImageSet) -> tuple[ImageSet, ImageSet]:
        """Find this manifest's images again in freshly loaded ones: `(train, holdout)` in the old order.

        Files may have been renamed or added. Labels and classes are the manifest's, paths and credits the fresh ones.

        Raises:
            InputError: Another image size, images that are missing or changed, or labels that differ.
        """
        if images.images.shape[-1] != self.image_size:
            raise InputError(
                f"this run was built with data.image_size={self.image_size}, got {images.images.shape[-1]}; "
                f"set it to {self.image_size} or start a new output_dir"
            )
        ordered = images.select(self._find(images))
        self._require_same_classes(ordered)
        pixels = ordered.images
        # Other files in the folder count: one colour image makes a whole set colour.
        assert pixels.shape[1] <= self.channels or torch.equal(pixels[:, :1].expand_as(pixels), pixels)
        aligned = replace(
            ordered,
            images=pixels[:, : self.channels].expand(-1, self.channels, -1, -1),
            labels=torch.tensor(self.table["label"].to_pylist(), dtype=torch.int64),
            class_names=self.class_names,
        )
        train, holdout = torch.arange(len(aligned)).tensor_split([self.num_train])
        return aligned.select(train), aligned.select(holdout)

    def _find(self, images: ImageSet) -> Tensor:
        digests, paths, classes = (self.table[name].to_pylist() for name in ("sha256", "path", "class_name"))
        wanted = list(zip(digests, paths, _in_one_form(classes), strict=True))
        given = list(zip(images.sha256, images.paths, _in_one_form(_class_of_each(images)), strict=True))
        positions = _match(wanted, given)
        missing = [path for (_, path, _), position in zip(wanted, positions, strict=True) if position is None]
        if missing:
            raise InputError(
                f"{len(missing)} of the {len(wanted)} images of this run are missing or changed, the first is "
                f"{missing[0]}; restore the files or start a new output_dir"
            )
        return torch.tensor(positions, dtype=torch.int64)

    def _require_same_classes(self, images: ImageSet) -> None:
        first, fresh = _in_one_form(self.table["class_name"].to_pylist()), _in_one_form(_class_of_each(images))
        classes = zip(images.paths, first, fresh, strict=True)
        changed = [f"{path}: {before} became {now}" for path, before, now in classes if before != now]
        if changed:
            raise InputError(
                f"{len(changed)} labels changed since this run was built, the first is {changed[0]}; "
                "restore the labels or start a new output_dir"
            )


_Identity = tuple[str, str, str | None]
"""Digest, path and class name of an image."""


def _match(wanted: list[_Identity], given: list[_Identity]) -> list[int | None]:
    """Find for each wanted image an unused one of the same bytes: of its path, else its class (renamed), else any."""
    matched: list[int | None] = [None] * len(wanted)
    free = set(range(len(given)))
    for columns in ((0, 1), (0, 2), (0,)):
        if None not in matched:
            break
        candidates: dict[tuple[str | None, ...], deque[int]] = defaultdict(deque)
        for position in sorted(free):
            candidates[tuple(given[position][column] for column in columns)].append(position)
        for number, identity in enumerate(wanted):
            same = candidates[tuple(identity[column] for column in columns)]
            if matched[number] is None and same:
                matched[number] = same.popleft()
        free -= set(matched)
    return matched


def _table(images: ImageSet, split: str) -> pa.Table:
    columns = {
        "split": [split] * len(images),
        "example_index": range(len(images)),
        "path": images.paths,
        "sha256": images.sha256,
        "label": images.labels.tolist(),
        "class_name": _class_of_each(images),
        "contributor": images.contributors,
        "license": images.licenses,
        "reachable": [True if split == "train" else None] * len(images),
    }
    return pa.table(columns, schema=_SCHEMA)


def _class_of_each(images: ImageSet) -> list[str | None]:
    names = [*images.class_names, None]
    return [names[label] for label in images.labels.tolist()]


def _in_one_form(names: list[str | None]) -> list[str | None]:
    """Give names in NFC: image folders do so, but did not when older runs were built."""
    return [name and normalize("NFC", name) for name in names]
