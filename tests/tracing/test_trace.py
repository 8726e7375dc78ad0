"""Looks fed with steps worked out by hand: commitment, window, top k, features of the last step, records, redraws."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from provgen.generators.protocol import LastLayer, Step
from provgen.models.classifier import CLEAN_ALPHA_BAR
from provgen.models.diffusion import last_layer_gradients
from provgen.models.temperatures import ALL_LEVELS, Temperatures, Tracer
from provgen.tracing.attribution import Explained
from provgen.tracing.trace import (
    CreditFeatures,
    Draw,
    Levels,
    MeanPosterior,
    NoisyImages,
    Recorder,
    ask_closed_form,
    late_level,
    level_spans,
    resample,
    trace,
)

WINDOW = (0.05, 0.9)
EVERY_STEP = Levels(None, WINDOW)


def step_of(query, alpha_bar, number=0, **more) -> Step:
    """A step whose query is what `ask` below answers."""
    return Step(
        number=number,
        timestep=more.pop("timestep", 0),
        alpha_bar=torch.tensor(alpha_bar, dtype=torch.float64),
        query=query,
        class_labels=torch.zeros(len(query), dtype=torch.int64),
        encode=more.pop("encode", list),
        predict=more.pop("predict", lambda: query),
        **more,
    )


def ask(step: Step) -> torch.Tensor:
    return step.query


def posterior_of(*rows, alpha_bars=None, levels=EVERY_STEP, **more) -> MeanPosterior:
    """Trace given posteriors, one (query, train) a step; all inside the window unless told otherwise."""
    look = MeanPosterior(ask, levels, **more)
    levels_of_steps = alpha_bars or [0.5] * len(rows)
    steps = [
        step_of(torch.as_tensor(probs, dtype=torch.float64), alpha_bar, number)
        for number, (probs, alpha_bar) in enumerate(zip(rows, levels_of_steps, strict=True))
    ]
    assert trace(steps, look) is steps[-1]
    return look


def one_query(*rows, **more) -> MeanPosterior:
    return posterior_of(*([row] for row in rows), **more)


ALL = torch.ones(3, dtype=torch.bool)
FIRST, SECOND = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]
HALF, UNDECIDED = [0.5, 0.3, 0.2], [0.4, 0.3, 0.3]


def entropy_of(row):
    return -sum(p * math.log(p) for p in row if p > 0)


def test_a_trace_shows_every_step_to_every_look_in_turn():
    steps = [step_of(torch.zeros(1, 1), 0.5, number) for number in range(3)]
    seen = []
    last = trace(
        iter(steps), lambda step: seen.append(("a", step.number)), lambda step: seen.append(("b", step.number))
    )
    assert seen == [(name, number) for number in range(3) for name in "ab"]
    assert last is steps[2]
    assert trace(iter(steps)) is steps[2]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([UNDECIDED, UNDECIDED, UNDECIDED], -1),
        ([FIRST, FIRST, FIRST], 0),
        ([UNDECIDED, FIRST, FIRST], 1),
        ([SECOND, SECOND, FIRST], 2),
        ([FIRST, SECOND, FIRST, FIRST], 2),
        ([FIRST, UNDECIDED, FIRST], 2),
        ([FIRST, FIRST, UNDECIDED], -1),
        ([FIRST, FIRST, SECOND], 2),
        ([HALF, HALF, HALF], -1),
        ([HALF, FIRST], 1),
        ([FIRST, HALF], -1),
        ([FIRST], 0),
    ],
)
def test_commitment_is_the_first_step_from_which_the_final_source_holds_more_than_half(steps, expected):
    look = one_query(*steps)
    assert look.commitment_step().tolist() == [expected]
    assert look.attribution(1, is_trajectory=True, reachable=ALL).commitment_step.tolist() == [expected]


def test_commitment_is_decided_query_by_query():
    look = posterior_of([FIRST, UNDECIDED, SECOND], [FIRST, SECOND, UNDECIDED], alpha_bars=[0.4, 0.6])
    assert look.commitment_step().tolist() == [0, 1, -1]


def test_steps_that_were_not_traced_count():
    look = one_query(*[[0.9, 0.1]] * 7, [0.5, 0.5], [0.9, 0.1], levels=Levels(range(7, 9), WINDOW))
    assert look.commitment_step().tolist() == [8]


def test_steps_between_traced_ones_count_as_the_next():
    between = [SECOND] * 3
    rows = [*[SECOND] * 7, UNDECIDED, *between, UNDECIDED, *between, FIRST, *between, FIRST]
    look = one_query(*rows, levels=Levels(range(7, 20, 4), WINDOW))
    assert look.commitment_step().tolist() == [15]
    assert look.posterior().tolist() == [pytest.approx([0.6, 0.2, 0.2])]


def test_the_late_entropy_is_that_of_the_cleanest_level_of_the_window():
    look = one_query(UNDECIDED, HALF, FIRST, alpha_bars=[0.2, 0.85, 0.97])
    assert look.late_entropy().tolist() == pytest.approx([entropy_of(HALF)])
    clean = one_query(HALF, levels=Levels(None, ALL_LEVELS), alpha_bars=[CLEAN_ALPHA_BAR])
    assert clean.late_entropy().tolist() == pytest.approx([entropy_of(HALF)])


@pytest.mark.parametrize(("levels", "expected"), [([0.2, 0.85, 0.97], 1), ([0.2], 0), ([0.01, 0.95, 0.99], 2)])
def test_the_late_level_is_the_cleanest_of_the_window_or_else_the_last(levels, expected):
    assert late_level(levels, WINDOW) == expected


def test_outside_images_have_no_commitment():
    attribution = one_query(FIRST, FIRST).attribution(2, is_trajectory=False, reachable=ALL)
    assert attribution.commitment_step.tolist() == [-1]
    assert attribution.commitment_step.dtype == torch.int64


def test_the_posterior_is_the_mean_over_the_levels_inside_the_window():
    low, high = WINDOW
    alpha_bars = [low / 2, low, 0.3, 0.7, high, (1 + high) / 2]
    look = one_query(SECOND, SECOND, FIRST, UNDECIDED, SECOND, SECOND, alpha_bars=alpha_bars)
    expected = torch.tensor([[0.6, 0.2, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(look.posterior(), expected)


def test_a_step_counts_for_the_log_signal_to_noise_ratios_around_it():
    """The integral of a line over the ratio, however unevenly its levels lie: the trapezoidal rule is exact."""
    levels = torch.tensor([0.02, 0.03, 0.3, 0.31, 0.8], dtype=torch.float64)
    places, spans = torch.logit(levels), level_spans(levels).double()
    assert float(spans.sum()) == pytest.approx(float(places[-1] - places[0]))
    mean = float(((2 + 3 * places) * spans).sum() / spans.sum())
    assert mean == pytest.approx(2 + 3 * float(places[0] + places[-1]) / 2)
    assert level_spans(levels[2:3]).tolist() == [1.0]


def test_the_posterior_does_not_depend_on_how_often_one_part_is_looked_at():
    """Posteriors that change evenly with the ratio, at few levels and at many of which most are clean."""
    few = torch.logit(torch.tensor([0.1, 0.8], dtype=torch.float64))
    many = torch.cat([few[:1], torch.linspace(float(few[1]) - 0.5, float(few[1]), 20, dtype=torch.float64)])
    found = []
    for places in (few, many):
        shares = (places - few[0]) / (few[1] - few[0])
        rows = [[float(share), 1 - float(share), 0] for share in shares]
        spans = dict(enumerate(level_spans(places.sigmoid()).tolist()))
        found.append(one_query(*rows, alpha_bars=places.sigmoid().tolist(), levels=Levels(None, WINDOW, spans)))
    torch.testing.assert_close(found[0].posterior(), torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(found[1].posterior(), found[0].posterior(), rtol=1e-6, atol=1e-6)


def test_another_window_takes_other_levels_and_all_levels_take_the_clean_image():
    for window, expected in (((0.0, 0.4), SECOND), ((0.4, 0.95), UNDECIDED), ((0.95, 1.0), FIRST)):
        levels = Levels(None, window)
        look = one_query(SECOND, UNDECIDED, FIRST, alpha_bars=[0.3, 0.7, 0.9999], levels=levels)
        assert look.posterior().tolist() == [expected]
    alone = one_query(FIRST, alpha_bars=[CLEAN_ALPHA_BAR], levels=Levels(None, ALL_LEVELS))
    assert alone.posterior().tolist() == [FIRST]


def test_without_any_level_of_the_window_there_is_no_posterior():
    with pytest.raises(AssertionError, match="no noise level"):
        one_query(FIRST, alpha_bars=[0.01]).posterior()


def test_levels_outside_the_window_still_count_as_steps():
    look = one_query(UNDECIDED, FIRST, FIRST, alpha_bars=[0.01, 0.5, 0.99])
    attribution = look.attribution(1, is_trajectory=True, reachable=ALL)
    assert attribution.commitment_step.tolist() == [1]
    assert attribution.step_entropy.shape == (1, 3)
    torch.testing.assert_close(attribution.alpha_bar, torch.tensor([0.01, 0.5, 0.99]))


def test_only_the_window_is_asked_where_nothing_else_counts():
    asked = []
    look = MeanPosterior(lambda step: asked.append(step.number) or step.query, EVERY_STEP, only_window=True)
    rows = torch.tensor([UNDECIDED]), torch.tensor([FIRST]), torch.tensor([SECOND])
    trace([step_of(row, level, n) for n, (row, level) in enumerate(zip(rows, [0.01, 0.5, 0.99], strict=True))], look)
    assert asked == [1]
    attribution = look.attribution(1, is_trajectory=False, reachable=ALL)
    assert attribution.alpha_bar.tolist() == [0.5]
    assert attribution.step_entropy.tolist() == [pytest.approx([entropy_of(FIRST)])]


def test_steps_that_are_not_traced_are_not_asked():
    asked = []
    look = MeanPosterior(lambda step: asked.append(step.number) or step.query, Levels(range(1, 6, 2), WINDOW))
    trace([step_of(torch.tensor([FIRST]), 0.5, number) for number in range(6)], look)
    assert asked == [1, 3, 5]


def test_the_top_k_is_sorted_and_the_rest_is_named():
    look = posterior_of(
        [[0.1, 0.5, 0.05, 0.35], [0.7, 0.1, 0.15, 0.05]],
        [[0.2, 0.4, 0.05, 0.35], [0.5, 0.3, 0.15, 0.05]],
        alpha_bars=[0.3, 0.6],
    )
    reachable = torch.tensor([True, False, False, True])
    attribution = look.attribution(2, is_trajectory=True, reachable=reachable)
    assert attribution.example_index.tolist() == [[1, 3], [0, 1]]
    expected = torch.tensor([[0.45, 0.35], [0.6, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(attribution.posterior, expected)
    torch.testing.assert_close(attribution.weight, expected)
    torch.testing.assert_close(attribution.mass_not_shown, torch.tensor([0.2, 0.2], dtype=torch.float64))
    torch.testing.assert_close(attribution.mass_unreachable, torch.tensor([0.5, 0.35], dtype=torch.float64))
    entropies = [entropy_of(row) for row in ([0.15, 0.45, 0.05, 0.35], [0.6, 0.2, 0.15, 0.05])]
    torch.testing.assert_close(attribution.entropy, torch.tensor(entropies, dtype=torch.float64))
    assert len(attribution) == 2


def test_credit_ranks_the_sources_and_the_posterior_stays_what_it_is():
    credit = torch.tensor([[0.2, 0.1, 0.7]], dtype=torch.float64)
    attribution = one_query(FIRST, FIRST).attribution(2, is_trajectory=True, reachable=ALL, credit=credit)
    assert attribution.example_index.tolist() == [[2, 0]]
    assert attribution.weight.tolist() == [[0.7, 0.2]]
    assert attribution.posterior.tolist() == [pytest.approx([0.1, 0.8])]
    assert attribution.mass_not_shown.tolist() == [pytest.approx(0.1)]


def test_the_original_of_a_copy_comes_before_all_others_and_keeps_its_own_weight():
    """Three queries, of which the first and the last are copies of the source with the least credit."""
    rows = [FIRST, FIRST, SECOND]
    credit = torch.tensor([[0.2, 0.1, 0.7], [0.2, 0.1, 0.7], [0.2, 0.3, 0.5]], dtype=torch.float64)
    by_nearest = torch.tensor([0.97, 0.94, 0.95])
    explained = Explained(
        share=torch.ones(3),
        by_nearest=by_nearest,
        by_class_mean=torch.zeros(3),
        nearest=torch.tensor([1, 1, 0]),
        least=torch.full((3,), 0.2),
        copy=torch.full((3,), 0.95),
    )
    look = posterior_of(rows, rows)
    found = look.attribution(2, is_trajectory=True, reachable=ALL, credit=credit, explained=explained)
    assert found.example_index.tolist() == [[1, 2], [2, 0], [0, 2]]
    assert found.weight.tolist() == [[0.1, 0.7], [0.7, 0.2], [0.2, 0.5]]
    assert found.posterior.tolist() == [pytest.approx(row) for row in ([0.1, 0.1], [0.1, 0.8], [0.1, 0.1])]
    assert found.explained is explained
    plain = look.attribution(1, is_trajectory=True, reachable=ALL, explained=explained)
    assert plain.example_index.tolist() == [[1], [0], [0]], "without a credit head as well"


def test_what_is_explained_is_not_known_without_training_images():
    found = one_query(FIRST).attribution(1, is_trajectory=True, reachable=ALL).explained
    assert found.share.isnan().all()
    assert found.nearest.tolist() == [-1]


def test_everything_shown_leaves_nothing_and_never_less_than_nothing():
    rows = torch.rand(50, 7, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    look = MeanPosterior(ask, EVERY_STEP)
    look(step_of(rows, 0.5))
    attribution = look.attribution(7, is_trajectory=False, reachable=torch.ones(7, dtype=torch.bool))
    assert (attribution.mass_not_shown >= 0).all()
    assert attribution.mass_not_shown.max() < 1e-6
    assert not attribution.mass_unreachable.any()


def test_entropies_are_kept_level_by_level():
    look = one_query([1 / 3] * 3, [1, 0, 0], alpha_bars=[0.2, 0.6])
    attribution = look.attribution(1, is_trajectory=True, reachable=ALL)
    torch.testing.assert_close(attribution.step_entropy, torch.tensor([[math.log(3), 0]], dtype=torch.float64))


def test_a_row_of_zeros_has_no_entropy_and_no_source_that_holds_it():
    look = one_query([0, 0, 0], [0, 0, 0])
    attribution = look.attribution(1, is_trajectory=True, reachable=ALL)
    assert attribution.step_entropy.tolist() == [[0, 0]]
    assert attribution.entropy.tolist() == [0]
    assert attribution.commitment_step.tolist() == [-1]
    assert attribution.mass_not_shown.tolist() == [1]


@pytest.mark.parametrize("window", [WINDOW, (0.3, 0.95), ALL_LEVELS])
@pytest.mark.parametrize("steps", [20, 50, 1000])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_so_many_steps_are_chosen_back_from_the_last(window, steps, every, random_images, generator_of):
    denoising = generator_of("diffusion", random_images(4))
    levels = Levels.of(denoising, steps, every, window)
    alpha_bars = denoising.alpha_bars(steps)
    traced = [n for n in range(steps) if alpha_bars[n] > window[0] and (steps - 1 - n) % every == 0]
    assert list(levels.numbers) == traced
    assert levels.window == window


def test_a_level_on_the_edge_of_the_window_is_not_traced(random_images, generator_of):
    denoising = generator_of("diffusion", random_images(4))
    edge = float(denoising.alpha_bars(20)[7])
    assert Levels.of(denoising, 20, 1, (edge, 0.9)).numbers == range(8, 20)


@pytest.mark.parametrize("kind", ["vae", "none"])
def test_without_noise_levels_every_step_is_traced_and_averaged(kind, random_images, generator_of):
    levels = Levels.of(generator_of(kind, random_images(4)), 50, 3, WINDOW)
    steps = [step_of(torch.zeros(1, 1), CLEAN_ALPHA_BAR, number) for number in range(9)]
    assert all(levels.has(step) for step in steps)
    assert {levels.span(step) for step in steps} == {1.0}


def test_passing_over_every_step_that_counts_is_refused(random_images, generator_of, message_of):
    message = message_of(Levels.of, generator_of("diffusion", random_images(4)), 20, 20, WINDOW)
    assert "trace_every=20 passes over all of 20 steps" in message


def test_the_closed_form_is_asked_about_the_query_of_the_step(random_images, closed_form_of):
    images = random_images(5)
    noisy = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    step = step_of(noisy, 0.3)
    expected = closed_form_of(images).probs(noisy, torch.full((5,), 0.3), torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(ask_closed_form(closed_form_of(images))(step), expected)


def test_the_closed_form_under_a_temperature_is_its_posterior_to_the_power_of_its_inverse(
    random_images, closed_form_of
):
    images = random_images(6)
    noisy = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    step = step_of(noisy, 0.3)
    step.class_labels = torch.tensor([0, 1, 3, 3])
    temperatures = Temperatures(null_label=3)
    temperatures.log_temperatures[Tracer.NETWORK] = 7.0  # the other tracer's, which must not count
    temperatures.log_temperatures[Tracer.CLOSED_FORM] = torch.tensor([[2.5], [4.0]]).log()
    powers = closed_form_of(images).probs(noisy, step.alpha_bars, step.class_labels)
    powers = powers ** (1 / torch.tensor([[2.5], [2.5], [4.0], [4.0]], dtype=torch.float64))
    found = ask_closed_form(closed_form_of(images), temperatures)(step)
    torch.testing.assert_close(found, powers / powers.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("temperature", [None, 0.01, 1.0, 300.0])
def test_a_class_without_examples_has_no_sources_under_any_temperature(temperature, random_images, closed_form_of):
    images = random_images(4, num_classes=3)
    closed_form = closed_form_of(images.select(torch.tensor([0, 1, 3])))  # of classes 0, 1 and 0 again
    step = step_of(torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), 0.3)
    step.class_labels = torch.tensor([2, 0])
    temperatures = None if temperature is None else Temperatures(null_label=3)
    if temperatures is not None:
        temperatures.log_temperatures.fill_(math.log(temperature))
    found = ask_closed_form(closed_form, temperatures)(step)
    assert not found[0].any()
    assert found[1, 1] == 0
    assert float(found[1].sum()) == pytest.approx(1)


class Embedding:
    """Stands for a provenance network: the embedding is the first three features of the second feature map."""

    def embed(self, feature_maps, alpha_bars):
        assert alpha_bars.shape == (len(feature_maps[0]),)
        return feature_maps[1]


def features_of(seen, levels, pixels=None, *, denoiser=None, decode=None, clear_from=1.0) -> CreditFeatures:
    """Look at embeddings (step, query, feature) and pixels at the levels of a sampling run."""
    pixels = torch.zeros(*seen.shape[:2], 1, 1, 1, dtype=seen.dtype) if pixels is None else pixels
    look = CreditFeatures(Embedding(), denoiser=denoiser, clear_from=clear_from)
    for number, level in enumerate(levels):
        maps = [pixels[number], seen[number]]
        last_layer = None if decode is None else partial(decode, number)
        look(step_of(pixels[number], level, number, encode=lambda maps=maps: maps, decode=last_layer))
    return look


def test_features_are_the_embedding_then_the_pixels():
    draws = torch.Generator().manual_seed(0)
    seen, pixels = torch.randn(1, 4, 3, generator=draws), torch.randn(1, 4, 1, 2, 2, generator=draws)
    found = features_of(seen, [0.96], pixels).features()
    torch.testing.assert_close(found, torch.cat([seen[0], pixels[0].flatten(1)], dim=1) / 0.96**0.5)


def test_features_in_half_precision_are_nearly_those_in_double():
    seen = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half, double = features_of(seen.half(), [0.9, 0.9999]).features(), features_of(seen, [0.9, 0.9999]).features()
    assert half.dtype == torch.float16
    torch.testing.assert_close(half, double.half(), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("last", [0.3, 0.8, 0.99])
def test_only_the_last_step_is_looked_at_and_only_when_it_is_asked_for(last):
    seen = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    passes, look = [], CreditFeatures(Embedding())
    for number, level in enumerate([0.1, 0.2, 0.25, last]):
        maps = [torch.zeros(2, 1, 1, 1, dtype=torch.float64), seen[number]]
        look(step_of(maps[0], level, number, encode=lambda maps=maps, n=number: passes.append(n) or maps))
    assert passes == []
    for _ in range(2):
        torch.testing.assert_close(look.features()[:, :3], seen[3] / last**0.5)
    assert passes == [3]


@pytest.mark.parametrize(("clear_from", "expected"), [(0.9, 1), (0.96, 2), (1.0, 2)])
def test_gradients_are_the_directions_of_the_first_clear_step_or_the_last(
    clear_from, expected, random_images, tiny_networks
):
    denoiser, _ = tiny_networks(random_images(4))
    draws, passes = torch.Generator().manual_seed(0), []
    inputs = torch.randn(3, 2, denoiser.conv_out.in_channels, 8, 8, generator=draws)
    layers = [LastLayer(of_step, denoiser.conv_out(of_step).detach()) for of_step in inputs]

    def decode(number):
        passes.append(number)
        return layers[number]

    seen, levels = torch.randn(3, 2, 3, generator=draws), [0.5, 0.95, 0.99]
    look = features_of(seen, levels, denoiser=denoiser, decode=decode, clear_from=clear_from)
    gradients = last_layer_gradients(denoiser, *layers[expected])
    plain = features_of(seen, levels).features()
    torch.testing.assert_close(look.features(), torch.cat([plain, F.normalize(gradients, dim=1)], dim=1))
    torch.testing.assert_close(look.features()[:, 4:].norm(dim=1), torch.ones(2))
    assert passes == [expected], "one pass of the decoder, at one level"


@pytest.mark.parametrize("least", [0.01, 0.2])
def test_a_recorder_keeps_the_steps_that_are_not_too_noisy(least):
    levels = [least / 2, least, 0.5]
    images = torch.randn(3, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    recorder = Recorder(least_alpha_bar=least)
    trace([step_of(images[n], level, n, timestep=900 - n) for n, level in enumerate(levels)], recorder)
    kept = recorder.noisy_images()
    assert torch.equal(kept.images, images[1:])
    assert kept.timesteps.tolist() == [899, 898]
    assert kept.alpha_bars.tolist() == pytest.approx([least, 0.5])
    first = kept.first(2)
    assert isinstance(first, NoisyImages)
    assert torch.equal(first.images, images[1:, :2])
    assert torch.equal(first.timesteps, kept.timesteps)
    assert torch.equal(first.alpha_bars, kept.alpha_bars)


def drawn(rows, seen) -> Draw:
    """A draw whose posteriors, images and features are given: one row a query."""
    posterior, exact = posterior_of(rows, rows), posterior_of(rows, [row[::-1] for row in rows])
    features = features_of(torch.stack([seen, -seen]), [0.95, 0.99])
    return Draw(seen.clone(), posterior, exact, features)


def test_putting_a_draw_in_place_gives_those_rows_all_of_it():
    seen = torch.arange(12.0, dtype=torch.float64).view(4, 3)
    whole, again = drawn([FIRST, HALF, SECOND, UNDECIDED], seen), drawn([UNDECIDED, FIRST], -7 - seen[:2])
    whole.put(torch.tensor([3, 1]), again)
    expected_seen = torch.stack([seen[0], -7 - seen[1], seen[2], -7 - seen[0]])
    expected = drawn([FIRST, FIRST, SECOND, UNDECIDED], expected_seen)
    assert torch.equal(whole.images, expected.images)
    assert torch.equal(whole.features.features(), expected.features.features())
    for one, other in ((whole.posterior, expected.posterior), (whole.closed_form, expected.closed_form)):
        first, second = (look.attribution(3, is_trajectory=True, reachable=ALL) for look in (one, other))
        names = [name for name in vars(first) if name != "explained"]
        assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


def test_putting_a_draw_without_looks_puts_its_images_and_its_posterior():
    seen = torch.arange(6.0).view(2, 3)
    whole, again = (
        Draw(seen * sign, posterior_of(rows), None, None) for sign, rows in ((1, [FIRST, HALF]), (-1, [SECOND]))
    )
    again.images = again.images[:1]
    whole.put(torch.tensor([1]), again)
    assert whole.images.tolist() == [seen[0].tolist(), (-seen[0]).tolist()]
    assert whole.posterior.posterior().tolist() == [FIRST, SECOND]
    assert whole.closed_form is None
    assert whole.features is None


@pytest.mark.parametrize(("most", "expected_times"), [(0, [0, 0, 0]), (1, [0, 1, 1]), (2, [0, 2, 1]), (9, [0, 3, 1])])
def test_rows_are_drawn_again_until_they_are_undecided_enough_or_for_so_many_times(most, expected_times):
    """Three queries with as many certain draws before an undecided one: none, three and one."""
    left, asked = [0, 3, 1], []

    def draw(rows):
        asked.append(rows.tolist())
        certain = [left[row] > 0 for row in rows.tolist()]
        for row in rows.tolist():
            left[row] -= 1
        images = torch.tensor([[float(len(asked))]]).repeat(len(rows), 1)
        return Draw(images, posterior_of([FIRST if sure else UNDECIDED for sure in certain]), None, None)

    result, times = resample(draw, 3, below=(entropy_of(FIRST) + entropy_of(UNDECIDED)) / 2, most=most)
    assert times.tolist() == expected_times
    assert times.dtype == torch.int64
    assert asked == [[0, 1, 2], *([1, 2] if n == 0 else [1] for n in range(max(expected_times)))]
    assert result.images.flatten().tolist() == [1.0 + n for n in expected_times], "the last draw is kept"
    decided = [n > most for n in [0, 3, 1]]
    assert result.posterior.posterior().tolist() == [FIRST if sure else UNDECIDED for sure in decided]
