"""Posteriors as attributions: the default is what traces say, and every average is worked by hand."""

from dataclasses import replace

import pytest
import torch

from provgen.generators.diffusion import DiffusionGenerator
from provgen.models.diffusion import make_sampling_scheduler, make_training_scheduler
from provgen.models.temperatures import Temperatures, Tracer
from provgen.studies.faithfulness.attributor import LEAST_ALPHA_BAR, Queries
from provgen.studies.faithfulness.posteriors import (
    AVERAGES,
    DEFAULT,
    Average,
    PosteriorAttributor,
    TemperedPosterior,
    closed_form_steps,
    network_steps,
)
from provgen.tracing.calibrate import Untuned
from provgen.tracing.trace import Levels, MeanPosterior, Recorder, ask_closed_form, ask_network, trace

NULL, STEPS = 3, 20
WINDOW = (DEFAULT.low, DEFAULT.high)
UNCONDITIONAL = replace(DEFAULT, is_conditional=False)
LABELS = torch.tensor([0, 2, NULL])


@pytest.fixture(scope="module")
def images(random_images):
    return random_images(12, num_classes=NULL)


@pytest.fixture(scope="module")
def networks(images, tiny_networks):
    return tiny_networks(images)


@pytest.fixture(scope="module")
def generator(networks):
    scheduler = make_sampling_scheduler(make_training_scheduler("linear"))
    return DiffusionGenerator(network=networks[0], scheduler=scheduler)


def sampled(generator, *looks):
    seeds = [torch.Generator().manual_seed(seed) for seed in range(3)]
    steps = generator.sample(LABELS, null_label=NULL, generator=seeds, num_inference_steps=STEPS, guidance_scale=1.0)
    return trace(steps, *looks).images


def noised(generator, images, *looks):
    trace(generator.renoise(images, LABELS, num_inference_steps=STEPS, seed=5), *looks)


@pytest.fixture(scope="module")
def queries(generator):
    trajectory, noisy = (Recorder(least_alpha_bar=LEAST_ALPHA_BAR) for _ in range(2))
    clean = sampled(generator, trajectory)
    noised(generator, clean, noisy)
    return Queries(images=clean, class_labels=LABELS, noisy=noisy.noisy_images(), trajectory=trajectory.noisy_images())


@pytest.fixture(scope="module")
def posteriors(networks, images, closed_form_of):
    closed_form = closed_form_of(images, torch.float32)
    return {
        "network": lambda _: network_steps(*networks),
        "closed form": lambda _: closed_form_steps(closed_form),
    }


@pytest.fixture(scope="module")
def asks(networks, images, closed_form_of):
    """How traces ask the same two."""
    closed_form = closed_form_of(images, torch.float32)
    return {"network": ask_network(networks[1]), "closed form": ask_closed_form(closed_form)}


def attributed(make_posterior, images, queries, along):
    method = PosteriorAttributor(make_posterior, along=along, num_bytes=5)
    method.fit(images)
    return method.attribute(queries)


@torch.no_grad()
def test_what_is_recorded_is_what_is_generated(generator, queries):
    assert torch.equal(queries.images, sampled(generator))
    trajectory, noisy = queries.trajectory, queries.noisy
    assert len(trajectory.images) == len(noisy.images) == len(trajectory.alpha_bars)
    assert (trajectory.alpha_bars.diff() > 0).all()
    level = noisy.alpha_bars[:, None, None, None, None]
    noise = (noisy.images - level.sqrt() * queries.images) / (1 - level).sqrt()
    torch.testing.assert_close(noise[:, :1].expand_as(noise), noise, atol=1e-4, rtol=0)  # the same for every query
    assert noise[:, 0].std() == pytest.approx(1, abs=0.1)


def alike(levels: Levels) -> Levels:
    """Methods that are tuned average steps alike, whatever the schedule."""
    return replace(levels, spans=None)


@torch.no_grad()
@pytest.mark.parametrize("name", ["network", "closed form"])
def test_along_the_trajectory_the_default_is_the_trace(name, generator, images, queries, posteriors, asks):
    look = MeanPosterior(asks[name], alike(Levels.of(generator, STEPS, 1, WINDOW)))
    sampled(generator, look)
    scores = attributed(posteriors[name], images, queries, "trajectory")
    torch.testing.assert_close(scores.under(DEFAULT), look.posterior(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["network", "closed form"])
def test_noised_again_the_default_is_the_trace_of_an_outside_image(name, generator, images, queries, posteriors, asks):
    look = MeanPosterior(asks[name], alike(Levels.of(generator, STEPS, 1, WINDOW)), only_window=True)
    noised(generator, queries.images, look)
    scores = attributed(posteriors[name], images, queries, "noised")
    torch.testing.assert_close(scores.under(DEFAULT), look.posterior(), atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("along", ["trajectory", "noised"])
@pytest.mark.parametrize("name", ["network", "closed form"])
def test_under_temperatures_it_is_the_trace_under_temperatures(
    name, along, generator, images, queries, posteriors, networks, closed_form_of
):
    temperatures = Temperatures(num_levels=2, null_label=NULL, low=0.1, high=0.7)
    temperatures.alpha_bars.copy_(torch.tensor([0.05, 0.9]))
    temperatures.log_temperatures.copy_(torch.arange(8.0).view(2, 2, 2) / 4)
    tracer = {"network": Tracer.NETWORK, "closed form": Tracer.CLOSED_FORM}[name]
    method = TemperedPosterior(posteriors[name], tracer, temperatures, along=along, num_bytes=7)
    method.fit(images)
    ask = {
        "network": ask_network(networks[1], temperatures),
        "closed form": ask_closed_form(closed_form_of(images, torch.float32), temperatures),
    }[name]
    look = MeanPosterior(ask, Levels.of(generator, STEPS, 1, temperatures.window))
    if along == "trajectory":
        sampled(generator, look)
    else:
        noised(generator, queries.images, look)
    found = method.attribute(queries)
    (scores,) = found.values
    torch.testing.assert_close(scores, look.posterior(), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(scores, attributed(posteriors[name], images, queries, along).under(DEFAULT), atol=1e-2)
    assert found.settings == method.settings == (Untuned(),)
    assert method.kept().num_bytes == 7


def test_a_class_excludes_others_unless_it_is_not_known(images, queries, posteriors):
    scores = attributed(posteriors["network"], images, queries, "trajectory")
    conditional, unconditional = scores.under(DEFAULT), scores.under(UNCONDITIONAL)
    assert conditional[0, images.labels != 0].max() < 1e-12
    assert unconditional[0, images.labels != 0].max() > 1e-6
    torch.testing.assert_close(conditional[2], unconditional[2])


def test_images_from_outside_are_noised_whatever_is_asked(images, queries, posteriors):
    outside = Queries(images=queries.images, class_labels=LABELS, noisy=queries.noisy)
    one, other = (attributed(posteriors["closed form"], images, outside, along) for along in ("trajectory", "noised"))
    assert torch.equal(one.values, other.values)


def test_averages_by_hand():
    """Two levels inside, one outside the window; two examples with odds 3 and 1/9 against each other."""
    odds = torch.tensor([3.0, 1 / 9, 5.0])
    log_probs = torch.stack([odds.log(), torch.zeros(3)], dim=1).log_softmax(dim=1)[:, None]

    def found(averaged, high, temperature):
        scores = Average(is_conditional=False, averaged=averaged, low=0.05, high=high, temperature=temperature)(
            log_probs, torch.tensor([0.3, 0.4, 0.95])
        )
        assert float(scores.sum()) == pytest.approx(1)
        return float(scores[0, 0])

    assert found("probabilities", 0.5, 1) == pytest.approx((3 / 4 + 1 / 10) / 2)
    mean_odds = (3 / 9) ** 0.5
    assert found("logarithms", 0.5, 1) == pytest.approx(mean_odds / (1 + mean_odds))
    assert found("logarithms", 0.5, 2) == pytest.approx(mean_odds**0.5 / (1 + mean_odds**0.5))
    assert found("probabilities", 0.99, 1) == pytest.approx((3 / 4 + 1 / 10 + 5 / 6) / 3)


@pytest.mark.parametrize("along", ["trajectory", "noised"])
def test_one_setting_alone_is_the_same_one(images, queries, posteriors, along):
    method = PosteriorAttributor(posteriors["network"], along=along, num_bytes=5)
    method.fit(images)
    everything = method.attribute(queries)
    assert len(everything.settings) == len(set(everything.settings)) == len(AVERAGES)
    for setting in everything.settings[::37]:
        alone = method.attribute(queries, setting)
        assert alone.settings == (setting,)
        torch.testing.assert_close(alone.under(setting), everything.under(setting))
