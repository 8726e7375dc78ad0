import gzip
import os
import pickle  # noqa: TID251  CIFAR-10 is published as pickles, so the tests write some
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from provgen.data.packed import read_cifar10_folder, read_idx_folder

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4), dtype=np.uint8)
LABELS = np.array([3, 0, 9, 1, 3], np.uint8)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, *, separator="-", end="", images=None, labels=None):
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if end else bytes
    (folder / f"train-images{separator}idx3-ubyte{end}").write_bytes(pack(images or idx(IMAGES)))
    (folder / f"train-labels{separator}idx1-ubyte{end}").write_bytes(pack(labels or idx(LABELS)))


def write_cifar(folder, dump):
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(1).integers(0, 256, (10, 3072), dtype=np.uint8)
    for i in range(5):
        (folder / f"data_batch_{i + 1}").write_bytes(dump(pixels[2 * i : 2 * i + 2], [i, 9 - i]))
    return torch.from_numpy(pixels).reshape(10, 3, 32, 32)


def protocol_2(pixels, labels):
    return pickle.dumps({"data": pixels, "labels": labels, "batch_label": "training batch"}, protocol=2)


def python_2(pixels, labels):
    """Spell out what Python 2 and numpy 1 wrote when CIFAR-10 was published."""
    data = pixels.tobytes()
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01K\x02M\x00\x0c\x86"
        b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tbI00\n"
        b"T" + struct.pack("<I", len(data)) + data + b"tb"
    )
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(U\x04data" + array + b"U\x06labels" + listed + b"u."


@pytest.mark.parametrize("separator", ["-", "."])
@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("inside", ["", "raw", "MNIST/raw"])
def test_idx_files_are_found_and_read(tmp_path, separator, end, inside):
    write_idx(tmp_path / inside, separator=separator, end=end)
    images, labels = read_idx_folder(tmp_path, "MNIST")
    assert torch.equal(images, torch.from_numpy(IMAGES)[:, None])
    assert labels.tolist() == LABELS.tolist()
    assert labels.dtype == torch.int64


def test_the_preferred_copy_is_taken_and_doubt_is_refused(tmp_path, message_of):
    write_idx(tmp_path / "MNIST" / "raw", labels=idx(LABELS * 0 + 1))
    write_idx(tmp_path / "FashionMNIST" / "raw", labels=idx(LABELS * 0 + 2))
    assert read_idx_folder(tmp_path, "MNIST")[1].unique().tolist() == [1]
    assert read_idx_folder(tmp_path, "FashionMNIST")[1].unique().tolist() == [2]
    message = message_of(read_idx_folder, tmp_path, "KMNIST")
    assert str(tmp_path / "MNIST" / "raw") in message


def test_missing_idx_files_are_named(tmp_path, message_of):
    assert str(tmp_path / "nowhere") in message_of(read_idx_folder, tmp_path / "nowhere", "MNIST")
    assert "train-images-idx3-ubyte" in message_of(read_idx_folder, tmp_path, "MNIST")
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    assert "train-labels-idx1-ubyte" in message_of(read_idx_folder, tmp_path, "MNIST")


@pytest.mark.parametrize("keep", [0, 3, 10, 16, 40, 95])
@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_truncated_idx_file_is_named(tmp_path, keep, end, message_of):
    write_idx(tmp_path, end=end)
    path = tmp_path / f"train-images-idx3-ubyte{end}"
    path.write_bytes(path.read_bytes()[:keep])
    assert path.name in message_of(read_idx_folder, tmp_path, "MNIST")


def test_surplus_values_wrong_kind_and_unequal_counts_are_refused(tmp_path, message_of):
    write_idx(tmp_path, images=idx(IMAGES) + b"\x00")
    assert "more values where its header says 80" in message_of(read_idx_folder, tmp_path, "MNIST")
    write_idx(tmp_path, images=idx(LABELS))
    assert "3 dimensions" in message_of(read_idx_folder, tmp_path, "MNIST")
    write_idx(tmp_path, images=idx(IMAGES[:4]))
    assert "4 images but 5 labels" in message_of(read_idx_folder, tmp_path, "MNIST")
    write_idx(tmp_path, images=idx(IMAGES[:0]), labels=idx(LABELS[:0]))
    assert "no images" in message_of(read_idx_folder, tmp_path, "MNIST")


@pytest.mark.parametrize("dump", [python_2, protocol_2])
@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
def test_cifar_batches_are_read_in_order(tmp_path, dump, inside):
    expected = write_cifar(tmp_path / inside, dump)
    images, labels = read_cifar10_folder(tmp_path)
    assert torch.equal(images, expected)
    assert labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]


def test_gzipped_batches_with_bytes_keys_are_read(tmp_path):
    def dump(pixels, labels):
        return pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2)

    expected = write_cifar(tmp_path, dump)
    for path in list(tmp_path.iterdir()):
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    assert torch.equal(read_cifar10_folder(tmp_path)[0], expected)


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, message_of):
    write_cifar(tmp_path / "data", protocol_2)
    attack = pickle.dumps({"data": _Touch(tmp_path / "hacked"), "labels": []})
    pickle.loads(attack)
    assert (tmp_path / "hacked").is_dir(), "the attack works on the ordinary unpickler"
    (tmp_path / "hacked").rmdir()
    (tmp_path / "data" / "data_batch_3").write_bytes(attack)
    message = message_of(read_cifar10_folder, tmp_path / "data")
    assert "data_batch_3" in message
    assert "mkdir" in message
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        pickle.dumps([1, 2], 2),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8)}, 2),
        pickle.dumps({"data": np.zeros((2, 100), np.uint8), "labels": [0, 1]}, 2),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, 2),
        pickle.dumps({"data": np.zeros((0, 3072), np.uint8), "labels": []}, 2),
        protocol_2(np.zeros((2, 3072), np.uint8), [0, 1])[:3000],
        gzip.compress(b"half a file")[:-4],
    ],
    ids=[
        "empty",
        "text",
        "list",
        "no labels",
        "short rows",
        "fewer labels",
        "no images",
        "truncated",
        "half gz",
    ],
)
def test_a_damaged_batch_is_named(tmp_path, content, message_of):
    write_cifar(tmp_path, protocol_2)
    (tmp_path / "data_batch_2").write_bytes(content)
    assert "data_batch_2" in message_of(read_cifar10_folder, tmp_path)


def test_a_missing_batch_is_named(tmp_path, message_of):
    write_cifar(tmp_path, protocol_2)
    (tmp_path / "data_batch_4").unlink()
    assert "data_batch_4" in message_of(read_cifar10_folder, tmp_path)


def test_packed_files_that_unpack_to_more_than_they_may_are_refused(tmp_path, message_of):
    write_idx(tmp_path / "idx")
    write_idx(tmp_path / "idx.gz", end=".gz")
    for folder in (tmp_path / "idx", tmp_path / "idx.gz"):
        assert len(read_idx_folder(folder, "MNIST", max_bytes=80)[0]) == 5
        message = message_of(read_idx_folder, folder, "MNIST", max_bytes=79)
        assert str(folder) in message
        assert "data.max_bytes=79" in message
    write_cifar(tmp_path / "cifar", protocol_2)
    size = max(path.stat().st_size for path in (tmp_path / "cifar").iterdir())
    assert len(read_cifar10_folder(tmp_path / "cifar", max_bytes=size)[0]) == 10
    message = message_of(read_cifar10_folder, tmp_path / "cifar", max_bytes=size - 1)
    assert "data_batch_" in message
    assert f"data.max_bytes={size - 1}" in message


@pytest.mark.parametrize("promised", [(5, 4, 4), (2**31, 2**31, 2**31), (2**26 // 16, 4, 4)])
def test_a_gzip_bomb_is_unpacked_no_further_than_its_header_promises(tmp_path, promised, message_of):
    header = struct.pack(">HBB3I", 0, 8, 3, *promised)
    write_idx(tmp_path, end=".gz", images=header + bytes(2**26))
    tracemalloc.start()
    try:
        message = message_of(read_idx_folder, tmp_path, "MNIST", max_bytes=2**20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "train-images" in message
    assert peak < 2**21


def test_a_gzip_bomb_in_place_of_a_batch_is_unpacked_no_further_than_allowed(tmp_path, message_of):
    write_cifar(tmp_path, protocol_2)
    (tmp_path / "data_batch_2").write_bytes(gzip.compress(bytes(2**26)))
    tracemalloc.start()
    try:
        message = message_of(read_cifar10_folder, tmp_path, max_bytes=2**20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "data_batch_2" in message
    assert peak < 2**22
