import gzip
import hashlib
import pickle  # noqa: TID251  CIFAR-10 is published as pickles, so the test writes some
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from provgen.data.sources import load_images

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def write_idx_set(folder, labels, side=6):
    images = np.random.default_rng(0).integers(0, 256, (len(labels), side, side), dtype=np.uint8)
    head = struct.pack(">HBBIII", 0, 8, 3, *images.shape)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + images.tobytes()))
    head = struct.pack(">HBBI", 0, 8, 1, len(labels))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(head + bytes(labels)))
    return images


def test_digits_are_scikit_learns_in_its_order():
    digits, expected = load_images("digits", None, 8), load_digits()
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.images.dtype == torch.uint8
    assert np.abs(digits.images[:, 0].numpy() / 255 - expected.images / 16).max() <= 0.5 / 255
    assert digits.images.min() == 0
    assert digits.images.max() == 255
    assert digits.labels.tolist() == expected.target.tolist()
    assert digits.class_names == tuple("0123456789")
    assert digits.paths[12] == "digits/00012"
    assert len(set(digits.sha256)) == 1797
    # Of the values 0 ... 16, as published.
    assert digits.sha256[7] == hashlib.sha256(expected.images[7].astype(np.uint8).tobytes()).hexdigest()


def test_another_image_size_changes_pixels_but_not_identity():
    small, large = load_images("digits", None, 8), load_images("digits", None, 16)
    assert large.images.shape == (1797, 1, 16, 16)
    assert (small.sha256, small.paths) == (large.sha256, large.paths)
    mean = [images.images.double().mean((1, 2, 3)) for images in (small, large)]
    assert torch.corrcoef(torch.stack(mean))[0, 1] > 0.98


@pytest.mark.parametrize(("source", "third"), [("mnist", "2"), ("fashion_mnist", "Pullover")])
def test_idx_sets_carry_names_digests_and_classes(tmp_path, source, third):
    originals = write_idx_set(tmp_path, [2, 0, 9])
    images = load_images(source, tmp_path, 6)
    assert torch.equal(images.images[:, 0], torch.from_numpy(originals))
    assert images.paths == (f"{source}/00000", f"{source}/00001", f"{source}/00002")
    assert images.sha256 == tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in originals)
    assert images.class_names[images.labels[0]] == third
    assert images.num_classes == 10
    assert load_images(source, str(tmp_path), 3).images.shape == (3, 1, 3, 3)


def test_cifar10_is_colour_with_its_class_names(tmp_path):
    for i in range(1, 6):
        red = np.zeros((1, 3072), np.uint8)
        red[:, :1024] = 40 * i
        (tmp_path / f"data_batch_{i}").write_bytes(pickle.dumps({"data": red, "labels": [i]}, protocol=2))
    images = load_images("cifar10", tmp_path, 8)
    assert images.images.shape == (5, 3, 8, 8)
    assert images.images[:, 0, 0, 0].tolist() == [40, 80, 120, 160, 200]
    assert images.images[:, 1:].sum() == 0
    assert [images.class_names[label] for label in images.labels] == [
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
    ]


def test_folder_goes_to_the_image_folder(tmp_path):
    Image.new("L", (9, 9), 5).save(tmp_path / "a.png")
    assert load_images("folder", str(tmp_path), 4).images.tolist() == [[[[5] * 4] * 4]]


def test_bounds_and_wanted_digests_reach_the_files(tmp_path, message_of):
    (tmp_path / "folder").mkdir()
    Image.new("L", (9, 9), 5).save(tmp_path / "folder" / "a.png")
    (tmp_path / "folder" / "b.png").write_bytes(b"broken")
    digest = hashlib.sha256((tmp_path / "folder" / "a.png").read_bytes()).hexdigest()
    assert load_images("folder", tmp_path / "folder", 4, wanted={digest}).paths == ("a.png",)
    message = message_of(load_images, "folder", tmp_path / "folder", 4, max_bytes=4 * 80)
    assert "data.max_bytes=320" in message
    write_idx_set(tmp_path, [1, 2])
    assert len(load_images("mnist", tmp_path, 6, wanted=(), max_bytes=72)) == 2
    assert "data.max_bytes=71" in message_of(load_images, "mnist", tmp_path, 6, max_bytes=71)
    assert "lower data.image_size" in message_of(load_images, "mnist", tmp_path, 10**8)


def test_what_a_source_cannot_take_is_refused(tmp_path, message_of):
    assert "data.path" in message_of(load_images, "digits", tmp_path, 8)
    assert "data.path" in message_of(load_images, "folder", None, 8)
    assert "fashion_mnist" in message_of(load_images, "imagenet", None, 8)
    write_idx_set(tmp_path, [0, 47, 3])
    assert "label 47" in message_of(load_images, "mnist", tmp_path, 8)


def test_a_failed_download_says_how_to_give_a_path(tmp_path, monkeypatch, message_of):
    # A closed port of this machine: the real download code, without a network.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    for source in ("mnist", "cifar10"):
        message = message_of(load_images, source, None, 8)
        assert f"cannot download {source}" in message
        assert "data.path" in message


def test_torchvisions_cache_is_read_without_a_download(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    raw = tmp_path / ".cache/provgen/mnist/MNIST/raw"
    raw.mkdir(parents=True)
    originals = write_idx_set(raw, [4, 5])
    for path in list(raw.iterdir()):
        for part in ("train", "t10k"):
            path.with_name(path.stem.replace("train", part)).write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    images = load_images("mnist", None, 6)
    assert torch.equal(images.images[:, 0], torch.from_numpy(originals))


@pytest.mark.slow
@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="apt-get install dataset-fashion-mnist")
def test_the_real_fashion_mnist_has_6000_of_each_class():
    images = load_images("fashion_mnist", FASHION_MNIST, 28)
    assert images.images.shape == (60000, 1, 28, 28)
    assert images.labels.bincount().tolist() == [6000] * 10
    # Known mean brightness of the training part.
    assert images.images.double().mean().item() / 255 == pytest.approx(0.2860, abs=1e-4)
