"""Temperatures: planted ones are found, tables interpolate and keep them, and what smooths them is worked by hand."""

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from provgen.data.images import to_unit_range
from provgen.generators.closed_form import ClosedFormPosterior
from provgen.generators.diffusion import DiffusionGenerator
from provgen.generators.protocol import LastLayer
from provgen.models.diffusion import make_sampling_scheduler, make_training_scheduler
from provgen.models.temperatures import ALL_LEVELS, Temperatures, Tracer
from provgen.tracing import temperatures
from provgen.tracing.attribution import Mixtures, support_limits
from provgen.tracing.temperatures import OwnTemperature, fit_temperature, fit_temperatures, informative_levels
from provgen.tracing.trace import trace

NULL = 3
CPU = torch.device("cpu")
PLANTED = [1.0, 4.0, 30.0]


@pytest.fixture(scope="module")
def train(random_images):
    return random_images(24, num_classes=NULL)


@pytest.fixture(scope="module")
def mixtures(train):
    return Mixtures(train, CPU)


@dataclass(frozen=True, kw_only=True)
class KernelDenoiser(DiffusionGenerator):
    """A denoiser that gives E[x_0 | x_t] under a tempered posterior; of a network it has the feature maps alone."""

    closed_form: ClosedFormPosterior
    told: float
    """Temperature of queries with a class."""
    untold: float
    """Temperature of the others."""

    def step_at(self, noisy, timestep, class_labels, *, number):
        step = super().step_at(noisy, timestep, class_labels, number=number)
        logits = self.closed_form.logits(noisy, step.alpha_bars, class_labels)
        temperature = torch.where(class_labels == NULL, self.untold, self.told)[:, None]
        image = ((logits / temperature).softmax(dim=1) @ self.closed_form.rows).view_as(noisy)
        noise = (noisy - step.alpha_bar.sqrt() * image) / (1 - step.alpha_bar).sqrt()
        step.predict, step.decode = lambda: image, lambda: LastLayer(noisy, noise)
        return step


@dataclass(frozen=True)
class BoastfulNetwork:
    """The closed form where a provenance network is expected, with logits so many times as large."""

    closed_form: ClosedFormPosterior
    factor: float
    config = SimpleNamespace(num_classes=NULL)

    def index_logits(self, feature_maps, alpha_bars, class_labels, class_logits):
        logits = self.factor * self.closed_form.logits(feature_maps[0], alpha_bars, class_labels)
        return logits.clamp_min(torch.finfo(logits.dtype).min)


@pytest.fixture(scope="module")
def denoiser_of(train, tiny_networks):
    """Make a kernel denoiser of some temperature, or of another one without a class."""
    network, _ = tiny_networks(train)
    scheduler = make_sampling_scheduler(make_training_scheduler("linear"))
    closed_form = ClosedFormPosterior(to_unit_range(train.images), train.labels, null_label=NULL)

    def make(told, untold=None):
        parts = {"network": network, "scheduler": scheduler, "closed_form": closed_form}
        return KernelDenoiser(**parts, told=told, untold=untold or told)

    return make


@pytest.mark.parametrize("start", [-3.0, 0.0, 6.0])
@pytest.mark.parametrize("planted", [0.1, *PLANTED])
def test_the_temperature_of_mixtures_is_found_from_anywhere(planted, start, mixtures):
    """Predicted images are mixtures under a temperature: no other gives them as well."""
    logits = 3 * planted * torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    predicted = (logits / planted).softmax(dim=1) @ mixtures.images
    octave, information = fit_temperature(mixtures, logits, predicted, start=start)
    assert 2**octave == pytest.approx(planted, rel=0.05)
    assert information > 0.01


def test_a_noisy_prediction_has_the_temperature_that_a_fine_grid_finds(mixtures):
    random = torch.Generator().manual_seed(1)
    logits = 10 * torch.randn(40, 24, generator=random)
    predicted = (logits / 5).softmax(dim=1) @ mixtures.images
    predicted = predicted + 0.3 * torch.randn(predicted.shape, generator=random)
    grid = torch.linspace(-2, 6, 1601)
    errors = [(((logits / 2**o).softmax(dim=1) @ mixtures.images) - predicted).square().sum() for o in grid]
    best = float(grid[torch.stack(errors).argmin()])
    octave, _ = fit_temperature(mixtures, logits, predicted)
    assert octave == pytest.approx(best, abs=0.06)


@pytest.mark.parametrize("planted", PLANTED[:2])
def test_every_sample_has_the_temperature_of_its_generator(planted, denoiser_of, mixtures):
    """Own trajectories alone; 1 for the closed form, which copies."""
    generator, labels = denoiser_of(planted), torch.arange(4)
    noise = [torch.Generator().manual_seed(number) for number in range(4)]
    options = {"null_label": NULL, "num_inference_steps": 50, "guidance_scale": 1.0}
    own = OwnTemperature(mixtures, generator.closed_form)
    trace(generator.sample(labels, generator=noise, **options), own)
    assert own.octaves().tolist() == [math.log2(planted)] * 4


def test_a_sample_of_a_class_of_one_image_has_temperature_one(denoiser_of, train):
    """Any temperature gives that image."""
    generator, single = denoiser_of(4.0), train.select(torch.tensor([0]))
    label, closed_form = (
        int(single.labels),
        ClosedFormPosterior(to_unit_range(single.images), single.labels, null_label=NULL),
    )
    own = OwnTemperature(Mixtures(single, CPU), closed_form)
    options = {"null_label": NULL, "num_inference_steps": 10, "guidance_scale": 1.0}
    trace(generator.sample(torch.tensor([label] * 2), generator=torch.Generator().manual_seed(0), **options), own)
    assert own.octaves().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("start", [-1.5, 0.0, 3.0])
def test_where_every_temperature_gives_the_same_the_start_is_given_back(start, mixtures):
    """Posteriors that are one image, or all alike, under any temperature that is tried."""
    certain = 1e9 * torch.nn.functional.one_hot(torch.arange(10), 24).float()
    assert fit_temperature(mixtures, certain, mixtures.images[:10], start=start) == (start, 0.0)
    flat = torch.zeros(10, 24)
    assert fit_temperature(mixtures, flat, mixtures.images[:10], start=start) == (start, 0.0)


@pytest.mark.parametrize("start", [0.0, 2.0])
def test_of_a_network_that_knows_nothing_the_posterior_is_wide(start, mixtures):
    """What is predicted is the mean image, whatever the logits: the wider they are mixed the better."""
    random = torch.Generator().manual_seed(2)
    logits = 300 * torch.randn(40, 24, generator=random)
    predicted = mixtures.mean + 0.05 * torch.randn(40, 64, generator=random)
    octave, information = fit_temperature(mixtures, logits, predicted, start=start)
    probs = (logits / 2**octave).softmax(dim=1)
    assert float(torch.special.entr(probs).sum(dim=1).exp().min()) > 0.99 * 24
    assert 0 < information < 0.01, "it is known that it is wide, but not how wide"
    # The limit of wide mixtures is the mean image, and no temperature gives more.
    errors = [float(mixtures.errors(logits, predicted, 2.0**o).sum()) for o in (octave, 24.0)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


@pytest.mark.parametrize("planted", PLANTED)
def test_the_temperature_of_a_denoiser_is_found_at_every_level_of_its_window(
    planted, train, denoiser_of, random_images
):
    """A network whose logits are twice as large has twice the temperature of the closed form."""
    generator, holdout = denoiser_of(planted), random_images(12, num_classes=NULL, seed=9)
    closed_form = generator.closed_form
    table = fit_temperatures(
        generator, BoastfulNetwork(closed_form, 2.0), train, holdout, closed_form=closed_form, seed=0
    )
    low, high = table.window
    assert 0 < low < high < 1
    torch.testing.assert_close(table.alpha_bars.float(), generator.alpha_bars(16))
    fitted = table.log_temperatures[:, :, table.alpha_bars > low].exp()
    expected = torch.full_like(fitted, planted)
    expected[Tracer.NETWORK] *= 2
    torch.testing.assert_close(fitted, expected, rtol=0.05, atol=0)
    assert (table.log_temperatures.diff(dim=2) >= 0).all()
    limits = support_limits(Mixtures(train, CPU), holdout, (1, 8, 8), 0)
    assert (table.config.least_explained, table.config.copy) == (limits.least, limits.copy)
    assert table.config.null_label == NULL


def test_the_window_of_a_denoiser_runs_from_the_prior_to_its_decision(train, denoiser_of, random_images):
    """Measured by hand on samples and noised images of its own: more than the prior, and one percent undecided."""
    generator, holdout = denoiser_of(1.0), random_images(24, num_classes=NULL, seed=9)
    closed_form = generator.closed_form
    network = BoastfulNetwork(closed_form, 1.0)
    low, high = fit_temperatures(generator, network, train, holdout, closed_form=closed_form, seed=0).window
    null = torch.full((24,), NULL)
    shares = {}
    for step in generator.renoise(to_unit_range(holdout.images), null, num_inference_steps=50, seed=3):
        probs = closed_form.probs(step.query, step.alpha_bars, null)
        shares[float(step.alpha_bar)] = float((torch.special.entr(probs).sum(dim=1).exp() / 24).median())
    assert min(share for level, share in shares.items() if level < 0.7 * low) > 0.85
    assert max(share for level, share in shares.items() if level > 1.5 * low) < 0.9
    steps = list(
        generator.sample(
            null, null_label=NULL, generator=torch.Generator().manual_seed(3), num_inference_steps=50, guidance_scale=1
        )
    )
    last = steps[-1].predicted_image
    total = (last - mixtures_mean(train)).square().sum()
    left = {float(s.alpha_bar): float((s.predicted_image - last).square().sum() / total) for s in steps}
    assert min(share for level, share in left.items() if level < 0.3 * high) > 0.01
    assert max(share for level, share in left.items() if 1 - level < (1 - high) / 3) < 0.01


def test_the_window_begins_at_one_level_under_every_schedule(train, denoiser_of, random_images):
    """The closed form does not know the schedule; the cosine one passes from noise to a clear signal in one step."""
    holdout = random_images(24, num_classes=NULL, seed=9)
    lows = []
    for schedule in ("linear", "squaredcos_cap_v2"):
        scheduler = make_sampling_scheduler(make_training_scheduler(schedule))
        generator = replace(denoiser_of(1.0), scheduler=scheduler)
        network = BoastfulNetwork(generator.closed_form, 1.0)
        table = fit_temperatures(generator, network, train, holdout, closed_form=generator.closed_form, seed=0)
        lows.append(table.window[0])
    assert lows[0] == pytest.approx(lows[1], rel=0.05)


def mixtures_mean(train):
    return to_unit_range(train.images).mean(dim=0)


def test_rows_with_a_class_and_without_have_temperatures_of_their_own(train, denoiser_of, random_images):
    generator, holdout = denoiser_of(2.0, 9.0), random_images(12, num_classes=NULL, seed=9)
    closed_form = generator.closed_form
    network = BoastfulNetwork(closed_form, 1.0)
    table = fit_temperatures(generator, network, train, holdout, closed_form=closed_form, seed=0)
    fitted = table.log_temperatures[:, :, table.alpha_bars > table.window[0]].exp()
    expected = torch.tensor([[2.0], [9.0]]).expand_as(fitted).to(fitted)
    torch.testing.assert_close(fitted, expected, rtol=0.05, atol=0)


def test_the_same_seed_gives_the_same_table_and_another_one_nearly(train, denoiser_of, random_images):
    generator, holdout = denoiser_of(4.0), random_images(12, num_classes=NULL, seed=9)
    network = BoastfulNetwork(generator.closed_form, 1.0)
    given = (generator, network, train, holdout)
    first, again, other = (fit_temperatures(*given, closed_form=generator.closed_form, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.log_temperatures, again.log_temperatures)
    assert first.window == again.window
    assert other.window != first.window
    assert other.window == pytest.approx(first.window, rel=0.3)


def test_without_samples_and_held_out_images_nothing_is_tempered(train, generator_of, tiny_networks, closed_form_of):
    """A classifier samples nothing; what its training images explain is known nevertheless."""
    nothing = train.select(torch.arange(0))
    _, provenance = tiny_networks(train)
    exact = closed_form_of(train, torch.float32)
    table = fit_temperatures(generator_of("none", train), provenance, train, nothing, closed_form=exact, seed=0)
    assert table.window == ALL_LEVELS
    assert not table.log_temperatures.any()
    assert table.config.null_label == NULL
    assert 0 < table.config.least_explained < 1


def test_informative_levels_run_from_the_prior_to_one_image(train, denoiser_of, random_images):
    generator, images = denoiser_of(1.0), to_unit_range(random_images(40, seed=9).images)
    found = informative_levels(generator, generator.closed_form, images, null_label=NULL, count=7)
    places = torch.logit(torch.tensor(found, dtype=torch.float64))
    torch.testing.assert_close(places.diff(), places.diff().mean().expand(6))
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(4))
    numbers = []
    for level in found:
        noisy, null = level**0.5 * images + (1 - level) ** 0.5 * noise, torch.full((40,), NULL)
        probs = generator.closed_form.probs(noisy, torch.full((40,), level), null)
        numbers.append(float(torch.special.entr(probs).sum(dim=1).exp().median()))
    assert numbers == sorted(numbers, reverse=True)
    assert numbers[0] == pytest.approx(0.9 * 24, rel=0.1)
    assert numbers[-1] == pytest.approx(1.1, abs=0.2)


@pytest.fixture
def table():
    """Two tracers and two kinds of rows at four levels, all of their own."""
    made = Temperatures(num_levels=4, null_label=NULL, low=0.1, high=0.8, least_explained=0.3, copy=0.97)
    made.alpha_bars.copy_(torch.tensor([0.01, 0.1, 0.5, 0.99], dtype=torch.float64))
    rising = torch.tensor([1.0, 1.5, 4.0, 20.0], dtype=torch.float64)
    made.log_temperatures.copy_((torch.tensor([[1, 2], [3, 4]])[:, :, None] * rising).log())
    return made


ROWS = {(Tracer.NETWORK, 0): 1, (Tracer.NETWORK, NULL): 2, (Tracer.CLOSED_FORM, 2): 3, (Tracer.CLOSED_FORM, NULL): 4}


@pytest.mark.parametrize(("tracer", "label"), ROWS)
def test_a_table_gives_the_fitted_temperatures_at_its_levels_and_rises_between_them(tracer, label, table):
    def at(levels):
        levels = torch.as_tensor(levels, dtype=torch.float64)
        return table.temperature(tracer, levels, torch.full((len(levels),), label)) / ROWS[tracer, label]

    torch.testing.assert_close(at([0.01, 0.1, 0.5, 0.99]), torch.tensor([1.0, 1.5, 4.0, 20.0]).double())
    between = at(torch.linspace(0.01, 0.99, 500, dtype=torch.float64))
    assert (between.diff() > 0).all()
    assert (between.log().diff() < math.log(1.5)).all(), "without a jump"
    torch.testing.assert_close(at([1e-6, 0.001]), torch.ones(2).double())
    torch.testing.assert_close(at([0.991, 0.9999]), torch.full((2,), 20.0).double())


def test_each_query_has_the_temperature_of_its_own_level_and_label(table):
    levels, labels = torch.tensor([0.1, 0.1, 0.5, 0.99]), torch.tensor([0, NULL, NULL, 1])
    found = table.temperature(Tracer.NETWORK, levels, labels)
    torch.testing.assert_close(found, torch.tensor([1.5, 3.0, 8.0, 20.0]))
    assert found.dtype == levels.dtype


def test_a_new_table_is_one_everywhere_and_has_the_window_of_all():
    fresh = Temperatures(null_label=NULL)
    levels = torch.tensor([1e-4, 0.5, 0.9999])
    for tracer in Tracer:
        assert fresh.temperature(tracer, levels, torch.tensor([0, NULL, 1])).tolist() == [1, 1, 1]
    assert fresh.window == ALL_LEVELS


def test_a_table_is_saved_and_loaded(table, tmp_path):
    table.save_pretrained(tmp_path)
    loaded = Temperatures.from_pretrained(tmp_path)
    levels, labels = torch.linspace(0.005, 0.995, 50), torch.arange(50) % 4
    for tracer in Tracer:
        assert torch.equal(loaded.temperature(tracer, levels, labels), table.temperature(tracer, levels, labels))
    assert loaded.window == (0.1, 0.8)
    assert (loaded.config.least_explained, loaded.config.copy, loaded.config.null_label) == (0.3, 0.97, NULL)


def levels_of(octaves, information):
    """Levels with the octaves and the information of both tracers, (tracer, rows, level)."""
    return [
        temperatures._Level(
            alpha_bar=0.1 * (n + 1), octaves=octaves[..., n], information=information[..., n], prior_share=0.5,
            samples=torch.zeros(1, 1),
        )
        for n in range(octaves.shape[-1])
    ]  # fmt: skip


def test_temperatures_that_rise_are_left_alone():
    rising = np.cumsum(np.random.default_rng(0).random((2, 2, 6)), axis=-1)
    np.testing.assert_allclose(temperatures._rising(levels_of(rising, np.ones((2, 2, 6)))), rising)


def test_temperatures_that_fall_are_averaged_by_what_is_known_of_each():
    octaves = np.zeros((2, 2, 4))
    octaves[0, 0] = [0, 3, 1, 5]
    octaves[0, 1] = [4, 3, 2, 1]
    information = np.ones((2, 2, 4))
    information[0, 0] = [1, 1, 3, 1]
    found = temperatures._rising(levels_of(octaves, information))
    np.testing.assert_allclose(found[0, 0], [0, 1.5, 1.5, 5])  # (3 * 1 + 1 * 3) / 4
    np.testing.assert_allclose(found[0, 1], [2.5] * 4)
    np.testing.assert_allclose(found[1], 0)


def test_levels_that_nothing_is_known_of_hardly_count():
    octaves, information = np.zeros((2, 2, 3)), np.zeros((2, 2, 3))
    octaves[:], information[:] = [5, 2, 3], [0, 0.5, 0.5]
    np.testing.assert_allclose(temperatures._rising(levels_of(octaves, information))[1, 1], [2, 2, 3], atol=1e-3)


def test_rows_that_nothing_was_fitted_for_are_as_the_others():
    octaves, information = np.zeros((2, 2, 3)), np.zeros((2, 2, 3))
    octaves[0, 1], information[0, 1] = [1, 2, 4], 1.0
    octaves[1, 0], information[1, 0] = [3, 5, 6], 1.0
    found = temperatures._rising(levels_of(octaves, information))
    np.testing.assert_allclose(found, [[[1, 2, 4]] * 2, [[3, 5, 6]] * 2])


@pytest.mark.parametrize(
    ("falling", "limit", "expected"),
    [
        ([1.0, 0.8, 0.2, 0.0], 0.5, 0.0),  # half of the way from -1 to 1
        ([1.0, 0.8, 0.4, 0.0], 0.5, 0.5),  # three quarters of it
        ([1.0, 0.4, 0.2, 0.0], 0.5, -3 + 2 * 5 / 6),
        ([1.0, 0.4, 0.8, 0.0], 0.5, 1 + 2 * 3 / 8),  # for good
        ([1.0, 0.9, 0.8, 0.7], 0.5, 3.0),  # never: the last level
    ],
)
def test_where_values_fall_below_a_limit_by_hand(falling, limit, expected):
    """Levels at log signal-to-noise ratios of -3, -1, 1 and 3, between which values are straight lines."""
    found = temperatures._crossing(np.array([-3.0, -1.0, 1.0, 3.0]), np.array(falling), limit)
    assert math.log(found / (1 - found)) == pytest.approx(expected)


def test_what_is_below_a_limit_from_the_start_never_crosses_it():
    assert temperatures._crossing(np.array([-1.0, 1.0]), np.array([0.3, 0.1]), 0.5) == 0
