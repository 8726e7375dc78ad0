"""Three columns of every measure: copies look like copies, held-out images like nothing, a collapse like a collapse."""

import pytest
import torch

from provgen.errors import InputError
from provgen.metrics.set_measures import set_measures


@pytest.fixture(scope="module")
def sets():
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return torch.randn(count, 8, generator=generator)

    return draw(150), draw(300), draw(400)


@pytest.fixture(scope="module")
def measured(sets):
    return set_measures(*sets)


def test_a_perfect_generator_is_like_held_out_images(measured):
    for name, found in measured.items():
        first, second = found.generated, found.holdout
        assert first.low <= second.high and second.low <= first.high, name  # noqa: PT018 - one overlap
        assert first.low <= first.value <= first.high
        assert first.n == second.n == found.copies.n == 150


def test_copies_stand_out(measured):
    value = {name: (found.copies.value, found.holdout.high, found.holdout.low) for name, found in measured.items()}
    assert value["share_memorized"][0] == 1
    assert value["authenticity"][0] == 0
    assert value["data_copying"][0] < -5
    assert value["closer_to_train"][0] == 1


def test_nulls_are_known(measured, expected_coverage):
    assert measured["share_memorized"].holdout.value < 0.02
    assert measured["authenticity"].holdout.low < 0.59 < measured["authenticity"].holdout.high
    expected = 400 / 550
    assert measured["closer_to_train"].holdout.low < expected < measured["closer_to_train"].holdout.high
    assert measured["data_copying"].holdout.low < 0 < measured["data_copying"].holdout.high
    assert measured["coverage"].holdout.low < expected_coverage(150, 150) < measured["coverage"].holdout.high
    assert measured["density"].holdout.value == pytest.approx(1, abs=0.15)
    assert measured["kernel_distance"].holdout.low < 0 < measured["kernel_distance"].holdout.high


def test_a_collapse_is_seen_by_recall_and_not_taken_for_copies(sets):
    generated, holdout, train = sets
    found = set_measures(generated * 0.1, holdout, train)
    assert found["data_copying"].generated.value < -5, "as of copies"
    assert found["share_memorized"].generated.value < 0.02
    assert found["recall"].generated.value < 0.1
    assert found["coverage"].generated.value < 0.5
    assert found["frechet_distance"].generated.low > found["frechet_distance"].holdout.high


def test_the_order_of_images_changes_only_what_is_drawn(sets):
    generated, holdout, train = sets
    again = set_measures(generated.flip(0), holdout, train)
    first = set_measures(generated, holdout, train)
    for name in ("share_memorized", "authenticity", "precision", "recall", "frechet_distance"):
        assert again[name].generated.value == pytest.approx(first[name].generated.value)


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match="20 generated, 40 held-out and 20 training images, got 50, 30 and 50"):
        set_measures(torch.zeros(50, 2), torch.zeros(30, 2), torch.eye(50))
