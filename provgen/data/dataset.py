"""A set of images held in memory, with everything a trace needs to name its source."""

from __future__ import annotations

from dataclasses import dataclass, replace
from unicodedata import normalize

import torch
from torch import Tensor

from provgen.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images in the order of their index; one without a label carries the null label, `num_classes` (0 if none)."""

    images: Tensor
    """Pixels, uint8 (train, channel, height, width); 1 or 3 channels."""
    labels: Tensor
    """Classes, int64 (train,), each in 0 ... num_classes; the last is the null label."""
    class_names: tuple[str, ...]
    """One name per class; empty for a set without labels."""
    paths: tuple[str, ...]
    """Path relative to the data folder, or `digits/00012` for packed data sets; unique."""
    sha256: tuple[str, ...]
    """Digest of the original file's bytes (folders) or of the original array's bytes (packed data sets)."""
    contributors: tuple[str | None, ...]
    """Who made the image, where known."""
    licenses: tuple[str | None, ...]
    """Licence of the image, where known."""

    def __post_init__(self) -> None:
        assert len({len(value) for name, value in vars(self).items() if name != "class_names"}) == 1

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def num_classes(self) -> int:
        """Number of classes, without the null label."""
        return len(self.class_names)

    def class_index(self, name: str) -> int:
        """Give the label of a class, whose name may be in another Unicode normal form.

        Raises:
            InputError: There is no such class.
        """
        names = [normalize("NFC", known) for known in self.class_names]
        if normalize("NFC", name) not in names:
            known = ", ".join(self.class_names) or "none, as the data set has no labels"
            raise InputError(f"unknown class {name!r}; the classes are: {known}")
        return names.index(normalize("NFC", name))

    def select(self, indices: Tensor) -> ImageSet:
        """Keep the images `indices` (int64, (selected,)), in that order."""
        words = ("paths", "sha256", "contributors", "licenses")
        kept = {name: tuple(getattr(self, name)[index] for index in indices.tolist()) for name in words}
        return replace(self, images=self.images[indices], labels=self.labels[indices], **kept)


def require_different(train: ImageSet) -> None:
    """Refuse training images that are all alike.

    Raises:
        InputError: They are.
    """
    if torch.equal(train.images[1:], train.images[:-1]):
        raise InputError(f"all {len(train)} training images are alike; there is nothing to tell apart, so add others")
