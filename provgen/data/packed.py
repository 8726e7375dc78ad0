"""Data sets packed in a few files: the idx files of the MNIST family and the pickled batches of CIFAR-10."""

from __future__ import annotations

import gzip
import math
import pickle  # noqa: TID251  CIFAR-10 is published as pickles; _ArrayUnpickler runs nothing that they name
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from provgen.data.images import MAX_BYTES
from provgen.errors import InputError

_DAMAGED = "replace it with a fresh copy"
_UNSIGNED_BYTE = 8  # idx type code


def read_idx_folder(folder: Path, preferred: str, *, max_bytes: int = MAX_BYTES) -> tuple[Tensor, Tensor]:
    """Read training images uint8 (train, 1, height, width) and labels int64 (train,) of an MNIST-like data set.

    The files train-images-idx3-ubyte and train-labels-idx1-ubyte, plain or .gz, lie at most two levels below `folder`;
    if several subfolders hold such files, the one named `preferred` is taken.

    Raises:
        InputError: Files that are missing, ambiguous, damaged or of different lengths, or that unpack to more than
            `max_bytes`.
    """
    image_path = _find(folder, ["train-images-idx3-ubyte", "train-images.idx3-ubyte"], preferred)
    label_path = _find(image_path.parent, ["train-labels-idx1-ubyte", "train-labels.idx1-ubyte"], preferred)
    images, labels = _read_idx(image_path, 3, max_bytes), _read_idx(label_path, 1, max_bytes)
    _require_pairs(images, labels, f"{image_path} and {label_path.name}")
    return images[:, None], labels.long()


def read_cifar10_folder(folder: Path, *, max_bytes: int = MAX_BYTES) -> tuple[Tensor, Tensor]:
    """Read images uint8 (train, 3, 32, 32) and labels int64 (train,) of CIFAR-10 (python version) below `folder`.

    Raises:
        InputError: Files that are missing, damaged, unpack to more than `max_bytes`, or name anything but numpy arrays.
    """
    first = _find(folder, ["data_batch_1"], "cifar-10-batches-py")
    paths = [first, *(_find(first.parent, [f"data_batch_{i}"], "") for i in range(2, 6))]
    images, labels = zip(*[_read_cifar_batch(path, max_bytes) for path in paths], strict=True)
    return torch.cat(images), torch.cat(labels)


def _find(folder: Path, names: Sequence[str], preferred: str) -> Path:
    """Find the shallowest file with one of `names`, plain before gzipped."""
    if not folder.is_dir():
        raise InputError(f"no folder at {folder}; set data.path to the folder that holds {names[0]}")
    for level in ("", "*/", "*/*/"):
        copies = [path for name in names for end in ("", ".gz") for path in folder.glob(f"{level}{name}{end}")]
        if copies:
            return _only(copies, preferred, folder)
    raise InputError(f"no {names[0]} (plain or .gz) in {folder}; set data.path to the folder that holds it")


def _only(copies: list[Path], preferred: str, folder: Path) -> Path:
    parents = {path.parent for path in copies}
    chosen = [path for path in copies if len(parents) == 1 or preferred in path.relative_to(folder).parts]
    if len({path.parent for path in chosen}) != 1:
        options = " or ".join(sorted(map(str, parents)))
        raise InputError(f"several copies of {copies[0].name} in {folder}; set data.path to one of them: {options}")
    return chosen[0]


@contextmanager
def _unpacked(path: Path) -> Iterator[BufferedIOBase]:
    """Open a file, plain or gzipped; no more is unpacked than is read."""
    try:
        with path.open("rb") as file:
            is_gzipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            yield gzip.GzipFile(fileobj=file) if is_gzipped else file
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}; {_DAMAGED}") from error


def _require_small(path: Path, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise InputError(
            f"{path} unpacks to more than data.max_bytes={max_bytes}; raise that if the file is as it should be"
        )


def _read_idx(path: Path, dimensions: int, max_bytes: int) -> Tensor:
    """Read an idx file of unsigned bytes: big-endian magic and sizes, then the values."""
    start = 4 + 4 * dimensions
    with _unpacked(path) as file:
        header = file.read(start)
        if header[:4] != bytes([0, 0, _UNSIGNED_BYTE, dimensions]) or len(header) < start:
            raise InputError(f"{path} is not an idx file of unsigned bytes in {dimensions} dimensions; {_DAMAGED}")
        shape = [int.from_bytes(header[i : i + 4], "big") for i in range(4, start, 4)]
        promised = math.prod(shape)
        _require_small(path, promised, max_bytes)
        # One more tells whether there are more, without unpacking them.
        values = file.read(promised + 1)
    if len(values) != promised:
        held = f"only {len(values)}" if len(values) < promised else "more"
        raise InputError(f"{path} holds {held} values where its header says {promised}; {_DAMAGED}")
    return torch.from_numpy(np.frombuffer(values, np.uint8).reshape(shape).copy())


def _require_pairs(images: Tensor, labels: Tensor, where: str) -> None:
    if len(images) != len(labels):
        raise InputError(f"{len(images)} images but {len(labels)} labels in {where}; take both from one release")
    if images.numel() == 0:
        raise InputError(f"no images in {where}; {_DAMAGED}")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickle dicts, lists and numpy arrays; anything else that a pickle names is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        package, _, rest = module.partition(".")
        if package == "numpy" and rest in ("core.multiarray", "_core.multiarray") and name == "_reconstruct":
            return _empty_array
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        raise pickle.UnpicklingError(f"it asks to run {module}.{name}")


def _empty_array(_subtype: type, _shape: tuple[int, ...], _dtype: bytes) -> np.ndarray[Any, Any]:
    # What numpy's _reconstruct does for arrays; their shape and values follow as pickled state.
    return np.ndarray((0,), np.int8)


def _encode_latin1(text: str, _encoding: str) -> bytes:
    # How Python 3 pickles bytes in protocol 2.
    return text.encode("latin1")


def _read_cifar_batch(path: Path, max_bytes: int) -> tuple[Tensor, Tensor]:
    with _unpacked(path) as file:
        data = file.read(max_bytes + 1)
    _require_small(path, len(data), max_bytes)
    try:
        batch = _ArrayUnpickler(BytesIO(data), encoding="latin1").load()
        # str keys as published (Python 2), bytes keys as some re-packed copies have them.
        pixels, labels = (batch[key if key in batch else key.encode()] for key in ("data", "labels"))
        images = torch.from_numpy(np.asarray(pixels, np.uint8).reshape(-1, 3, 32, 32).copy())
        pair = images, torch.tensor([int(label) for label in labels])
    except InputError:
        raise
    except (
        pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError,
        OverflowError, MemoryError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path} is not a python batch of CIFAR-10: {reason}; {_DAMAGED}") from error
    _require_pairs(*pair, str(path))
    return pair
