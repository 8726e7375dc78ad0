"""With the closed form in the network's place nothing is lost; no network beats its ceiling."""

import pytest
import torch

from provgen.data.batches import Batch, fixed_batches
from provgen.evaluation import IndexProbe
from provgen.generators.closed_form import ClosedFormPosterior
from provgen.generators.protocol import Output
from provgen.metrics.index_quality import LEVELS, mean_kl_gap
from provgen.models.provenance import ProvenanceOutput
from provgen.training.targets import ClassMixing


class ExactNetwork:
    """The closed form where a network is expected, softened by a temperature; 1 is exact."""

    def __init__(self, closed_form: ClosedFormPosterior, alpha_bars: torch.Tensor, temperature: float = 1.0) -> None:
        self.closed_form = closed_form
        self.alpha_bars = alpha_bars
        self.temperature = temperature

    def forward(self, batch: Batch) -> tuple[Output, ProvenanceOutput]:
        alpha_bar = self.alpha_bars[batch.timesteps].double()
        a = alpha_bar[:, None, None, None]
        noisy = a.sqrt() * batch.clean_images + (1 - a).sqrt() * batch.noise
        probs = self.closed_form.probs(noisy, alpha_bar, batch.labels)
        logits = probs.clamp_min(1e-300).log() / self.temperature
        output = Output(
            loss=alpha_bar,
            parts={},
            feature_maps=[],
            alpha_bar=alpha_bar,
            class_labels=batch.labels,
            query=noisy,
        )
        return output, ProvenanceOutput(index_logits=logits)


@pytest.fixture
def images(random_images):
    """Close to one another, so that the parent of a noisy image is in doubt at every level."""
    some = random_images(30, num_classes=3, size=4)
    object.__setattr__(some, "images", (some.images // 6) + 100)
    return some


@pytest.fixture
def make_probe(alphas_cumprod):
    """Make a probe of at most twenty queries at every level."""

    def make(images, *, mixing=None, is_conditional=True, seed=0, count=20):
        timesteps = [int((alphas_cumprod - level).abs().argmin()) for level in LEVELS]
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
        shape = tuple(images.images.shape[1:])
        batches = fixed_batches(images, rows, timesteps, noise_shape=shape, seed=seed)
        return IndexProbe(batches, null_label=images.num_classes, is_conditional=is_conditional, mixing=mixing)

    return make


@pytest.fixture
def measure_exact(make_probe, closed_form_of, alphas_cumprod):
    """Measure the closed form itself, softened by a temperature."""

    def measure(images, temperature=1.0, **changed):
        closed_form = closed_form_of(images)
        network = ExactNetwork(closed_form, alphas_cumprod, temperature)
        return make_probe(images, **changed).measure(network, closed_form)

    return measure


def test_the_closed_form_has_no_gap_and_reaches_every_ceiling(images, measure_exact):
    qualities = measure_exact(images)
    assert len(qualities) == 2 * len(LEVELS)
    for quality in qualities:
        assert quality.kl_gap.value == pytest.approx(0, abs=1e-9)
        assert quality.cross_entropy == pytest.approx(quality.cross_entropy_ceiling, abs=1e-9)
        assert quality.top1.value == pytest.approx(quality.top1_ceiling, abs=1e-12)
        assert quality.top5.value == pytest.approx(quality.top5_ceiling, abs=1e-12)
        assert quality.kl_gap.n == 20
    in_doubt = [quality for quality in qualities if quality.cross_entropy_ceiling > 0.1]
    assert len(in_doubt) > 6
    assert mean_kl_gap(qualities, "unconditional").value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_another_temperature_opens_the_gap_and_keeps_the_order(temperature, images, measure_exact):
    qualities = measure_exact(images, temperature)
    for quality in qualities:
        assert quality.kl_gap.value > -1e-12
        assert quality.top1.value == pytest.approx(quality.top1_ceiling, abs=1e-12)
    assert mean_kl_gap(qualities, "unconditional").value > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_no_network_exceeds_a_ceiling(seed, images, make_probe, closed_form_of, tiny_posterior):
    qualities = make_probe(images, seed=seed).measure(tiny_posterior(images, seed=seed), closed_form_of(images))
    for quality in qualities:
        assert quality.kl_gap.value > 0
        assert quality.top1.value <= quality.top1_ceiling + 1e-12
        assert quality.top5.value <= quality.top5_ceiling + 1e-12
    assert sum(quality.top1_ceiling - quality.top1.value for quality in qualities) > 0.1


def test_the_ceiling_of_a_network_that_covers_some_is_over_those(images, make_probe, tiny_posterior):
    covered = torch.arange(0, 30, 2)
    is_covered = torch.zeros(30, dtype=torch.bool).index_fill(0, covered, value=True)
    pixels = images.images.double() / 127.5 - 1
    some, everything = (
        ClosedFormPosterior(pixels, images.labels, null_label=3, covered=mask) for mask in (is_covered, None)
    )
    probe, network = make_probe(images), tiny_posterior(images, covered=covered)
    for quality, uncovered in zip(probe.measure(network, some), probe.measure(network, everything), strict=True):
        assert 0 < quality.kl_gap.value < 100
        assert quality.top1.value <= quality.top1_ceiling + 1e-12
        assert uncovered.kl_gap.value > 1e3, "no network can name what it does not cover"


def test_conditional_rows_have_ceilings_of_their_own(images, measure_exact):
    qualities = measure_exact(images)
    pairs = zip(qualities[::2], qualities[1::2], strict=True)
    for conditional, unconditional in pairs:
        assert (conditional.rows, unconditional.rows) == ("conditional", "unconditional")
        assert conditional.alpha_bar == unconditional.alpha_bar
        assert conditional.cross_entropy_ceiling < unconditional.cross_entropy_ceiling
        assert conditional.top1_ceiling > unconditional.top1_ceiling


def test_a_generator_that_is_given_no_class_has_unconditional_rows_alone(images, measure_exact):
    both, unconditional = measure_exact(images), measure_exact(images, is_conditional=False)
    assert [quality.rows for quality in unconditional] == ["unconditional"] * len(LEVELS)
    assert [q.as_row() for q in unconditional] == [q.as_row() for q in both if q.rows == "unconditional"]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_with_label_mixing_the_floor_is_the_mixed_posteriors_entropy(share, images, measure_exact):
    mixing = ClassMixing(images.labels, num_classes=3, share=share)
    plain, qualities = measure_exact(images), measure_exact(images, mixing=mixing)
    for quality, unmixed in zip(qualities, plain, strict=True):
        assert quality.cross_entropy_ceiling > unmixed.cross_entropy_ceiling
        assert quality.kl_gap.value > 0, "the closed form itself is no longer the optimum"
        assert quality.top1.value == unmixed.top1.value, "the parent is one image, whatever the targets were"


def test_mixed_targets_are_the_optimum_of_a_network_trained_on_them(images, make_probe, closed_form_of, alphas_cumprod):
    mixing = ClassMixing(images.labels, num_classes=3, share=0.3)
    closed_form = closed_form_of(images)

    class Mixed(ClosedFormPosterior):
        def probs(self, *query):
            return mixing(super().probs(*query))

    pixels = images.images.double() / 127.5 - 1
    network = ExactNetwork(Mixed(pixels, images.labels, null_label=3), alphas_cumprod)
    for quality in make_probe(images, mixing=mixing).measure(network, closed_form):
        assert quality.kl_gap.value == pytest.approx(0, abs=1e-9)


def test_a_set_without_labels_has_unconditional_rows_alone(random_images, measure_exact):
    qualities = measure_exact(random_images(8, num_classes=0))
    assert [quality.rows for quality in qualities] == ["unconditional"] * len(LEVELS)
    assert {len(quality.query_gaps) for quality in qualities} == {8}


def test_images_without_a_label_are_among_the_unconditional_rows_alone(images, measure_exact):
    images.labels[::3] = 3
    qualities = measure_exact(images, count=30)
    assert {(quality.rows, quality.kl_gap.n) for quality in qualities} == {("conditional", 20), ("unconditional", 30)}


def test_a_set_of_fewer_than_five_images_has_top_five_of_one(random_images, measure_exact):
    assert all(quality.top5.value == pytest.approx(1) for quality in measure_exact(random_images(3)))


def test_noise_levels_are_those_of_the_batches(images, measure_exact, alphas_cumprod):
    alpha_bars = [quality.alpha_bar for quality in measure_exact(images)[1::2]]
    nearest = [min(alphas_cumprod.tolist(), key=lambda a, at=level: abs(a - at)) for level in LEVELS]
    assert alpha_bars == pytest.approx(nearest, abs=1e-7)


def test_small_chunks_change_nothing(images, make_probe, closed_form_of, tiny_posterior, monkeypatch):
    network, closed_form = tiny_posterior(images), closed_form_of(images)
    whole = make_probe(images).measure(network, closed_form)
    monkeypatch.setattr("provgen.generators.closed_form.MAX_CHUNK_BYTES", 1)
    for quality, expected in zip(make_probe(images).measure(network, closed_form), whole, strict=True):
        assert quality.as_row() == pytest.approx(expected.as_row(), abs=1e-9)


def test_a_probe_is_the_same_whenever_it_is_made(images, make_probe, closed_form_of, tiny_posterior):
    network, closed_form = tiny_posterior(images), closed_form_of(images)

    def measure(seed=0):
        return [quality.as_row() for quality in make_probe(images, seed=seed).measure(network, closed_form)]

    torch.manual_seed(0)
    first = measure()
    torch.manual_seed(1)
    assert measure() == first
    assert measure(seed=1) != first


@pytest.mark.parametrize("beam", [1, 6])
def test_the_recall_of_a_beam_is_the_share_of_the_exhaustive_answer_that_it_names(
    beam, images, make_probe, tiny_posterior
):
    network = tiny_posterior(images, head={"kind": "TwoStageHead", "num_cells": 6, "num_classes": 3})
    probe, answers = make_probe(images), {None: 0, beam: 0}
    for batch in probe.batches:
        output, _ = network.forward(dict(probe.parts(batch))["unconditional"])
        for cells in answers:
            answers[cells] = answers[cells] + network.index_logits(output, cells).softmax(dim=1)
    shares = []
    for whole, some in zip(answers[None].tolist(), answers[beam].tolist(), strict=True):
        best, named = (
            {i for i in sorted(range(30), key=lambda i, row=row: -row[i])[:10] if row[i] > 0} for row in (whole, some)
        )
        shares.append(len(best & named) / len(best))
    recall = probe.beam_recall(network, beam, 10)
    assert recall.value == pytest.approx(sum(shares) / 20)
    assert (recall.value == 1) == (beam == 6)
    assert recall.n == 20


def test_a_set_smaller_than_the_answer_has_a_recall(random_images, make_probe, tiny_posterior):
    images = random_images(6)
    network = tiny_posterior(images, head={"kind": "TwoStageHead", "num_cells": 2, "num_classes": 3})
    assert make_probe(images).beam_recall(network, 2, 10).value == 1
