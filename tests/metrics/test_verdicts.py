"""Verdicts on what is known: the ideal denoiser copies, held-out digits do not, noise is unsupported; patches."""

from collections import Counter

import pytest
import torch
from sklearn.datasets import load_digits

from provgen.generators.closed_form import ClosedFormPosterior
from provgen.metrics.statistics import auroc
from provgen.metrics.verdicts import KINDS, Evidence, Limits, gather_evidence, patch_share, verdicts
from provgen.models.diffusion import make_sampling_scheduler, make_training_scheduler
from provgen.studies.faithfulness.planted import ideal_samples

ALPHA_BAR = 0.5


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    images = torch.from_numpy(found.images).float()[:, None] / 8 - 1
    return images, torch.from_numpy(found.target)


@pytest.fixture(scope="module")
def evidence_of(digits):
    """Evidence of images, their sources by the closed form at one level, told nothing."""
    images, labels = digits[0][:1400], digits[1][:1400]
    closed_form = ClosedFormPosterior(images, labels, null_label=10)

    def call(some, asked):
        noise = torch.randn(some.shape[1:], generator=torch.Generator().manual_seed(0))
        noisy = ALPHA_BAR**0.5 * some + (1 - ALPHA_BAR) ** 0.5 * noise
        probs = closed_form.probs(noisy, torch.full((len(some),), ALPHA_BAR), torch.full((len(some),), 10))
        of_class = (probs * (labels == asked[:, None])).sum(dim=1)
        return gather_evidence(
            some,
            images,
            entropy=torch.special.entr(probs).sum(dim=1),
            late_entropy=torch.special.entr(probs).sum(dim=1),
            of_class=of_class,
            top=probs.amax(dim=1),
            agreement=torch.ones(len(some)),
        )

    return call


@pytest.fixture(scope="module")
def holdout(digits, evidence_of):
    return evidence_of(digits[0][1400:], digits[1][1400:])


def kinds_of(evidence, limits):
    return Counter(verdict.kind for verdict in verdicts(evidence, limits))


def test_the_ideal_denoiser_copies_and_held_out_digits_do_not(digits, evidence_of, holdout):
    closed_form = ClosedFormPosterior(digits[0][:1400], digits[1][:1400], null_label=10)
    scheduler = make_sampling_scheduler(make_training_scheduler("linear"))
    noise = torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = torch.arange(60) % 10
    made, _ = ideal_samples(closed_form, scheduler, noise, asked, num_inference_steps=50)
    limits = Limits.of(holdout)
    assert kinds_of(evidence_of(made, asked), limits) == {"copy": 60}
    of_holdout = kinds_of(holdout, limits)
    assert of_holdout["copy"] == 0
    assert of_holdout["unsupported"] <= 3 * 0.011 * len(holdout)


def test_off_the_manifold_is_unsupported(digits, evidence_of, holdout):
    generator = torch.Generator().manual_seed(0)
    images, labels = digits
    shuffled = images[1400:1500].flatten(1)[:, torch.randperm(64, generator=generator)].view(-1, 1, 8, 8)
    found = evidence_of(shuffled, labels[1400:1500])
    assert auroc(found.distance, holdout.distance, seed=0).low > 0.95
    assert kinds_of(found, Limits.of(holdout))["unsupported"] >= 90


def test_the_wrong_class_is_unsupported(digits, evidence_of, holdout):
    found = evidence_of(digits[0][1400:], (digits[1][1400:] + 3) % 10)
    assert auroc(-found.of_class, -holdout.of_class, seed=0).low > 0.95
    assert kinds_of(found, Limits.of(holdout))["unsupported"] > 0.75 * len(found)


@pytest.mark.parametrize(
    ("changed", "kind", "reason"),
    [
        ({}, "novel", "9.0 sources, 50% of its parts"),
        ({"agreement": 0.3}, "novel", "30% of the strongest are the closed form's too"),
        ({"ratio": 0.3}, "copy", "0.30 of the distance"),
        ({"calibrated": 0.5}, "near copy", "distance 0.50, of held-out images 0.80"),
        ({"calibrated": 0.5, "patches": 1.0}, "near copy", "100% of its parts from one image"),
        ({"patches": 1.0}, "novel", "100% of its parts"),
        ({"patches": float("nan")}, "novel", "9.0 sources"),
        ({"distance": 0.7}, "unsupported", "within 0.70, of held-out images 0.60"),
        ({"sources": 80.0}, "unsupported", "spread over 80 sources, held-out images over 50"),
        ({"of_class": 0.1}, "unsupported", "with 10% only"),
        ({"sources": 3.5}, "blend of few", "3.5 sources"),
        ({"sources": 1.0, "of_class": 0.1, "ratio": 0.1}, "copy", "0.10"),
    ],
)
def test_rules_by_hand(changed, kind, reason):
    usual = {
        "ratio": 0.9,
        "calibrated": 1.5,
        "distance": 0.4,
        "patches": 0.5,
        "sources": 9.0,
        "late_entropy": 0.1,
        "of_class": 0.9,
        "top": 0.2,
        "agreement": 0.8,
    }
    evidence = Evidence(**{name: torch.tensor([value]) for name, value in (usual | changed).items()})
    (found,) = verdicts(evidence, Limits(calibrated=0.8, distance=0.6, sources=50.0, few=4.0, of_class=0.2, n=100))
    assert found.kind == kind in KINDS
    assert reason in found.reason


@pytest.fixture
def train(generator):
    return 2 * torch.rand(60, 1, 8, 8, generator=generator) - 1


def test_copies_are_of_one_image(train):
    assert torch.equal(patch_share(train[:9], train), torch.ones(9, dtype=torch.float64))
    assert torch.equal(patch_share(train[:9] + 0.02, train), torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize("columns", [2, 4, 6])
def test_an_image_of_two_halves_has_the_larger_share(train, columns):
    image = train[:1].clone()
    image[..., columns:] = train[1:2, :, :, columns:]
    assert patch_share(image, train).tolist() == [max(columns, 8 - columns) / 8]


def test_parts_that_all_images_share_do_not_count(train):
    train = train.clone()
    train[..., :4, :] = -1
    image = train[:1].clone()
    image[..., :4] = train[1:2, :, :, :4]
    assert patch_share(image, train).tolist() == [0.5], "of the lower half"
    assert patch_share(-torch.ones(1, 1, 8, 8), -torch.ones(50, 1, 8, 8)).isnan().all(), "no part tells"


@pytest.mark.parametrize("count", [2, 16, 20])
def test_noise_is_of_no_single_image_of_a_small_set(train, count, generator):
    images = 2 * torch.rand(30, 1, 8, 8, generator=generator) - 1
    assert patch_share(train[:2], train[:count]).tolist() == [1, 1]
    if count > 2:
        assert patch_share(images, train[:count]).nanmean() < 0.5


def test_chunks_and_order_change_nothing(train, generator, monkeypatch):
    images = train[:20] / 2 + train[20:40] / 2
    whole = patch_share(images, train)
    assert 0 < whole.min() < whole.max() <= 1
    assert torch.equal(patch_share(images, train[torch.randperm(60, generator=generator)]), whole)
    monkeypatch.setattr("provgen.metrics.verdicts.MAX_BYTES", 60 * 16 * 4 * 3)
    assert torch.equal(patch_share(images, train), whole)
