"""Which images the models of a sweep have, and that every measured file is whole."""

import numpy as np
import pytest
import torch

from provgen.errors import InputError
from provgen.studies.memorization.sweep import SweepFolder, SweepModel, images_of, own_settings, plan

LABELS = torch.arange(100) % 5


def test_halves_share_no_image_and_have_the_proportions_of_the_classes():
    first, second = (images_of(LABELS, SweepModel(30, half, 4)) for half in (0, 1))
    assert first.sum() == second.sum() == 30
    assert not (first & second).any()
    for mask in (first, second):
        assert LABELS[mask].bincount().tolist() == [6] * 5
    assert not torch.equal(first, images_of(LABELS, SweepModel(30, 0, 5)))


@pytest.mark.parametrize("size", [50, 51, 100])
def test_as_many_images_as_were_asked_for(size):
    assert images_of(LABELS, SweepModel(size, 0, 0)).sum() == size


def test_sizes_without_room_for_two_halves_have_one():
    models = plan([100, 50, 51], 2, num_train=100, num_classes=5)
    assert models[:4] == [
        SweepModel(50, 0, 0), SweepModel(50, 1, 0), SweepModel(51, 0, 0), SweepModel(100, 0, 0),
    ]  # fmt: skip
    assert [model.seed for model in models] == [0] * 4 + [1] * 4


@pytest.mark.parametrize("size", [1, 4, 101])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(InputError, match=f"5 to 100, an image of each class to all training images, got {size}"):
        plan([size], 1, num_train=100, num_classes=5)


def test_models_of_a_size_differ_by_their_seed_alone(tiny_settings):
    settings = tiny_settings()
    own = own_settings(settings, SweepModel(10, 1, 7))
    assert own.training.seed == 7
    assert own_settings(own, SweepModel(10, 1, settings.training.seed)) == settings


def test_measured_arrays_come_back_of_models_that_are_finished(tmp_path):
    folder, model, other = SweepFolder(tmp_path), SweepModel(16, 0, 1), SweepModel(18, 1, 0)
    assert folder.load() == {}
    images = np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2)
    folder.save(model, 10, {"ratio": np.array([0.5])})
    folder.save(other, 10, {"ratio": np.array([0.25])})
    folder.save(other, 20, {"ratio": np.array([0.125]), "images": images})
    for _ in range(2):
        assert folder.measured() == {(model, 10), (other, 10), (other, 20)}
        found = folder.load()
        assert list(found) == [other]
        assert found[other][20]["images"].tolist() == images.tolist()
        assert list(found[other][10]) == ["ratio"]
        folder.compact()
    folder.save(model, 20, {"ratio": np.array([0.0625])})
    assert list(folder.load()) == [other, model], "the first seed first"


def test_files_of_an_earlier_version_are_refused(tmp_path):
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "images-00016.npz").touch()
    with pytest.raises(InputError, match=r"provgen 0\.1"):
        SweepFolder(tmp_path).load()
