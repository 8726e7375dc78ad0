"""With the closed form in the network's place nothing is lost; no network beats its ceiling."""

import pytest
import torch

from provgen.analysis import index_quality
from provgen.analysis.index_quality import LEVELS, IndexProbe, IndexQuality, mean_kl_gap
from provgen.analysis.statistics import Estimate
from provgen.attribution.network import NetworkPosterior
from provgen.attribution.posterior import ClosedFormPosterior


class ExactNetwork:
    """The closed form where a network is expected, softened by a temperature; 1 is exact."""

    def __init__(self, closed_form: ClosedFormPosterior, temperature: float = 1.0) -> None:
        self.closed_form = closed_form
        self.temperature = temperature
        self.denoiser = self
        self.device = torch.device("cpu")
        self.dtype = torch.float64

    def index_logits(self, noisy_images, timesteps, signal, class_labels):
        probs = self.closed_form.probs(noisy_images, signal, class_labels)
        return probs.clamp_min(1e-300).log() / self.temperature


@pytest.fixture
def images(random_images):
    """Close to one another, so that the parent of a noisy image is in doubt at every level."""
    some = random_images(30, num_classes=3, size=4)
    object.__setattr__(some, "images", (some.images // 6) + 100)
    return some


@pytest.fixture
def make_probe(closed_form_of, alphas_cumprod):
    def make(images, **changed):
        defaults = {"num_queries": 20, "label_mixing": 0.0, "seed": 0}
        pixels = images.images.double() / 127.5 - 1
        return IndexProbe(
            closed_form_of(images), pixels, images.labels, alphas_cumprod.double(), **{**defaults, **changed}
        )

    return make


def test_the_closed_form_has_no_gap_and_reaches_every_ceiling(images, make_probe, closed_form_of):
    qualities = make_probe(images).measure(ExactNetwork(closed_form_of(images)))
    assert len(qualities) == 2 * len(LEVELS)
    for quality in qualities:
        assert quality.kl_gap.value == pytest.approx(0, abs=1e-9)
        assert quality.cross_entropy == pytest.approx(quality.cross_entropy_ceiling, abs=1e-9)
        assert quality.top1.value == pytest.approx(quality.top1_ceiling, abs=1e-12)
        assert quality.top5.value == pytest.approx(quality.top5_ceiling, abs=1e-12)
        assert quality.kl_gap.n == 20
    in_doubt = [quality for quality in qualities if quality.cross_entropy_ceiling > 0.1]
    assert len(in_doubt) > 6
    assert mean_kl_gap(qualities, "null").value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_another_temperature_opens_the_gap_and_keeps_the_order(
    temperature, images, make_probe, closed_form_of
):
    qualities = make_probe(images).measure(ExactNetwork(closed_form_of(images), temperature))
    for quality in qualities:
        assert quality.kl_gap.value > -1e-12
        assert quality.top1.value == pytest.approx(quality.top1_ceiling, abs=1e-12)
    assert mean_kl_gap(qualities, "null").value > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_no_network_exceeds_a_ceiling(seed, images, make_probe, tiny_networks):
    network = NetworkPosterior(*tiny_networks(images, seed=seed))
    qualities = make_probe(images, seed=seed).measure(network)
    for quality in qualities:
        assert quality.kl_gap.value > 0
        assert quality.top1.value <= quality.top1_ceiling + 1e-12
        assert quality.top5.value <= quality.top5_ceiling + 1e-12
    assert sum(quality.top1_ceiling - quality.top1.value for quality in qualities) > 0.1


def test_labelled_rows_have_ceilings_of_their_own(images, make_probe, closed_form_of):
    qualities = make_probe(images).measure(ExactNetwork(closed_form_of(images)))
    pairs = zip(qualities[::2], qualities[1::2], strict=True)
    for labelled, null in pairs:
        assert (labelled.rows, null.rows) == ("labelled", "null")
        assert labelled.signal == null.signal
        assert labelled.cross_entropy_ceiling < null.cross_entropy_ceiling
        assert labelled.top1_ceiling > null.top1_ceiling


@pytest.mark.parametrize("mixing", [0.1, 0.5])
def test_with_label_mixing_the_floor_is_the_mixed_posteriors_entropy(
    mixing, images, make_probe, closed_form_of
):
    plain = make_probe(images).measure(ExactNetwork(closed_form_of(images)))
    qualities = make_probe(images, label_mixing=mixing).measure(ExactNetwork(closed_form_of(images)))
    for quality, unmixed in zip(qualities, plain, strict=True):
        assert quality.cross_entropy_ceiling > unmixed.cross_entropy_ceiling
        assert quality.kl_gap.value > 0, "the closed form itself is no longer the optimum"


def test_a_set_without_labels_has_null_rows_alone(random_images, make_probe, closed_form_of):
    images = random_images(8, num_classes=0)
    qualities = make_probe(images).measure(ExactNetwork(closed_form_of(images)))
    assert [quality.rows for quality in qualities] == ["null"] * len(LEVELS)
    assert {len(quality.query_gaps) for quality in qualities} == {8}


def test_a_set_of_fewer_than_five_images_has_top_five_of_one(random_images, make_probe, closed_form_of):
    images = random_images(3)
    qualities = make_probe(images).measure(ExactNetwork(closed_form_of(images)))
    assert all(quality.top5.value == pytest.approx(1) for quality in qualities)


def test_levels_are_the_nearest_timesteps(images, make_probe, closed_form_of, alphas_cumprod):
    qualities = make_probe(images).measure(ExactNetwork(closed_form_of(images)))
    for quality, level in zip(qualities[1::2], LEVELS, strict=True):
        assert abs(quality.signal - level) == pytest.approx(
            float((alphas_cumprod - level).abs().min()), abs=1e-6
        )


def test_small_chunks_change_nothing(images, make_probe, closed_form_of, tiny_networks, monkeypatch):
    network = NetworkPosterior(*tiny_networks(images))
    whole = make_probe(images).measure(network)
    monkeypatch.setattr("provgen.attribution.posterior.MAX_CHUNK_BYTES", 1)
    for quality, expected in zip(make_probe(images).measure(network), whole, strict=True):
        assert quality.as_row() == pytest.approx(expected.as_row(), abs=1e-9)


def test_a_probe_is_the_same_whenever_it_is_made(images, make_probe, tiny_networks):
    network = NetworkPosterior(*tiny_networks(images))
    torch.manual_seed(0)
    first = [quality.as_row() for quality in make_probe(images).measure(network)]
    torch.manual_seed(1)
    assert [quality.as_row() for quality in make_probe(images).measure(network)] == first
    assert [quality.as_row() for quality in make_probe(images, seed=1).measure(network)] != first


def test_the_mean_gap_is_over_the_window_and_one_kind_of_rows():
    low, high = index_quality.WINDOW
    numbers = ("cross_entropy", "cross_entropy_ceiling", "top1_ceiling", "top5_ceiling")
    zero = dict.fromkeys(numbers, 0.0) | dict.fromkeys(("kl_gap", "top1", "top5"), Estimate(0.0, 0.0, 0.0, 2))
    rows = [
        (low / 2, "null", 9),
        (0.1, "null", 1),
        (0.8, "null", 2),
        (high + 0.05, "null", 9),
        (0.5, "labelled", 9),
    ]
    qualities = [
        IndexQuality(signal=s, rows=r, query_gaps=torch.tensor([gap, gap + 1.0]), **zero)
        for s, r, gap in rows
    ]
    found = mean_kl_gap(qualities, "null")
    assert found.value == 2.0
    assert (found.low, found.high) == (1.5, 2.5)
