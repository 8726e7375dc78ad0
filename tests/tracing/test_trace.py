"""Hand-worked trajectories: commitment, window, top k, and what is not shown."""

import math

import pytest
import torch

from provgen.models.classifier import CLEAN_ALPHA_BAR
from provgen.tracing.attribution import Attribution, check_top_k, entropy
from provgen.tracing.trace import WINDOW, TrajectoryTrace
from provgen.tracing.tracer import ALL_LEVELS


def trace_of(*steps, alpha_bars=None) -> TrajectoryTrace:
    """Trace one query through posteriors over three examples, all inside the window unless told otherwise."""
    trace = TrajectoryTrace()
    for probs, alpha_bar in zip(steps, alpha_bars or [0.5] * len(steps), strict=True):
        trace.add(torch.tensor([probs], dtype=torch.float64), alpha_bar)
    return trace


ALL = torch.ones(3, dtype=torch.bool)
FIRST, SECOND = [0.8, 0.1, 0.1], [0.1, 0.8, 0.1]
HALF, UNDECIDED = [0.5, 0.3, 0.2], [0.4, 0.3, 0.3]


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
    assert trace_of(*steps).commitment_step().tolist() == [expected]
    assert trace_of(*steps).attribution(1, is_trajectory=True, reachable=ALL).commitment_step.tolist() == [expected]


def test_commitment_is_decided_query_by_query():
    trace = TrajectoryTrace()
    trace.add(torch.tensor([FIRST, UNDECIDED, SECOND]), 0.4)
    trace.add(torch.tensor([FIRST, SECOND, UNDECIDED]), 0.6)
    assert trace.commitment_step().tolist() == [0, 1, -1]


def test_steps_that_were_not_traced_count():
    trace = TrajectoryTrace(first_step=7)
    for probs in ([[0.5, 0.5]], [[0.9, 0.1]]):
        trace.add(torch.tensor(probs), 0.5)
    assert trace.commitment_step().tolist() == [8]


def test_steps_between_traced_ones_count_as_the_next():
    trace = TrajectoryTrace(first_step=7, every=4)
    for probs in (UNDECIDED, UNDECIDED, FIRST, FIRST):
        trace.add(torch.tensor([probs]), 0.5)
    assert trace.commitment_step().tolist() == [15]


def test_the_late_entropy_is_that_of_the_cleanest_level_of_the_window():
    trace = trace_of(UNDECIDED, HALF, FIRST, alpha_bars=[0.2, 0.85, 0.97])
    expected = -sum(p * math.log(p) for p in HALF)
    assert trace.late_entropy().tolist() == pytest.approx([expected])


def test_outside_images_have_no_commitment():
    attribution = trace_of(FIRST, FIRST).attribution(2, is_trajectory=False, reachable=ALL)
    assert attribution.commitment_step.tolist() == [-1]
    assert attribution.commitment_step.dtype == torch.int64


def test_the_posterior_is_the_mean_over_the_levels_inside_the_window():
    low, high = WINDOW
    alpha_bars = [low / 2, low, 0.3, 0.7, high, (1 + high) / 2]
    trace = trace_of(SECOND, SECOND, FIRST, UNDECIDED, SECOND, SECOND, alpha_bars=alpha_bars)
    expected = torch.tensor([[0.6, 0.2, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(trace.posterior(), expected)


def test_another_window_takes_other_levels_and_all_levels_take_the_clean_image():
    for window, expected in (((0.0, 0.4), SECOND), ((0.4, 0.95), UNDECIDED), ((0.95, 1.0), FIRST)):
        trace = TrajectoryTrace(window=window)
        for probs, alpha_bar in ((SECOND, 0.3), (UNDECIDED, 0.7), (FIRST, 0.9999)):
            trace.add(torch.tensor([probs], dtype=torch.float64), alpha_bar)
        assert trace.posterior().tolist() == [expected]
    alone = TrajectoryTrace(window=ALL_LEVELS)
    alone.add(torch.tensor([FIRST]), CLEAN_ALPHA_BAR)
    torch.testing.assert_close(alone.posterior(), torch.tensor([FIRST]))


def test_levels_outside_the_window_still_count_as_steps():
    trace = trace_of(UNDECIDED, FIRST, FIRST, alpha_bars=[0.01, 0.5, 0.99])
    attribution = trace.attribution(1, is_trajectory=True, reachable=ALL)
    assert attribution.commitment_step.tolist() == [1]
    assert attribution.step_entropy.shape == (1, 3)
    torch.testing.assert_close(attribution.alpha_bar, torch.tensor([0.01, 0.5, 0.99]))


def test_the_top_k_is_sorted_and_the_rest_is_named():
    trace = TrajectoryTrace()
    trace.add(torch.tensor([[0.1, 0.5, 0.05, 0.35], [0.7, 0.1, 0.15, 0.05]], dtype=torch.float64), 0.3)
    trace.add(torch.tensor([[0.2, 0.4, 0.05, 0.35], [0.5, 0.3, 0.15, 0.05]], dtype=torch.float64), 0.6)
    reachable = torch.tensor([True, False, False, True])
    attribution = trace.attribution(2, is_trajectory=True, reachable=reachable)
    assert attribution.example_index.tolist() == [[1, 3], [0, 1]]
    expected = torch.tensor([[0.45, 0.35], [0.6, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(attribution.posterior, expected)
    torch.testing.assert_close(attribution.weight, expected)
    torch.testing.assert_close(attribution.mass_not_shown, torch.tensor([0.2, 0.2], dtype=torch.float64))
    torch.testing.assert_close(attribution.mass_unreachable, torch.tensor([0.5, 0.35], dtype=torch.float64))
    entropies = [-sum(p * math.log(p) for p in row) for row in ([0.15, 0.45, 0.05, 0.35], [0.6, 0.2, 0.15, 0.05])]
    torch.testing.assert_close(attribution.entropy, torch.tensor(entropies, dtype=torch.float64))
    assert len(attribution) == 2


def test_everything_shown_leaves_nothing_and_never_less_than_nothing():
    rows = torch.rand(50, 7, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    trace = TrajectoryTrace()
    trace.add(rows, 0.5)
    attribution = trace.attribution(7, is_trajectory=False, reachable=torch.ones(7, dtype=torch.bool))
    assert (attribution.mass_not_shown >= 0).all()
    assert attribution.mass_not_shown.max() < 1e-6
    assert not attribution.mass_unreachable.any()


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_entropy_of_a_uniform_row_is_the_log_of_its_length(count):
    assert float(entropy(torch.full((1, count), 1 / count, dtype=torch.float64))) == pytest.approx(math.log(count))


def test_entropy_of_a_certain_row_is_zero():
    assert entropy(torch.eye(3)).tolist() == [0, 0, 0]


def test_entropies_are_kept_level_by_level():
    attribution = trace_of([1 / 3] * 3, [1, 0, 0], alpha_bars=[0.2, 0.6]).attribution(
        1, is_trajectory=True, reachable=ALL
    )
    torch.testing.assert_close(attribution.step_entropy, torch.tensor([[math.log(3), 0]], dtype=torch.float64))


def test_joining_attributions_joins_their_queries():
    rows = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
    parts = []
    for part in (rows, rows[:2], rows[2:]):
        trace = TrajectoryTrace()
        trace.add(part, 0.2)
        trace.add(part.flip(1), 0.5)
        reachable = torch.tensor([True, True, False, True])
        parts.append(trace.attribution(2, is_trajectory=True, reachable=reachable))
    joined = Attribution.concatenate(parts[1:])
    assert all(torch.equal(value, getattr(joined, name)) for name, value in vars(parts[0]).items())


@pytest.mark.parametrize("top_k", [0, -1, 6])
def test_an_impossible_top_k_is_refused(top_k, message_of):
    message = message_of(check_top_k, top_k, 5)
    assert "top_k must be between 1 and 5" in message
    assert f"got {top_k}" in message
    check_top_k(1, 5)
    check_top_k(5, 5)


def test_coordinates_are_the_best_guess_from_noisy_ones():
    """Under x_t = sqrt(a) x + sqrt(1 - a) eps, weights of a / (1 - a) give the least squares estimate of x."""
    levels, noisy = (
        [0.9, 0.95, 0.99],
        torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    )
    trace = TrajectoryTrace()
    for level, images in zip(levels, noisy, strict=True):
        trace.place(images, level)
    design = torch.tensor([[(level / (1 - level)) ** 0.5] for level in levels], dtype=torch.float64)
    seen = torch.stack([
        some / (1 - level) ** 0.5 for some, level in zip(noisy, levels, strict=True)
    ]).flatten(1)  # fmt: skip
    expected = torch.linalg.lstsq(design, seen).solution.view(4, 6)
    torch.testing.assert_close(trace.coordinates(1), expected)
    # All alike, and under so high a power the cleanest alone.
    clean = noisy / torch.tensor(levels).double().sqrt()[:, None, None]
    torch.testing.assert_close(trace.coordinates(0), clean.mean(dim=0), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(trace.coordinates(40), clean[2], atol=1e-6, rtol=1e-6)


def test_coordinates_in_half_precision_are_nearly_those_in_double():
    """With many steps the weights of clear levels are beyond half precision."""
    seen = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half, double = TrajectoryTrace(), TrajectoryTrace()
    for some, level in zip(seen, (0.99, 0.9999), strict=True):
        half.place(some.half(), level, some[:, :3].float())
        double.place(some, level, some[:, :3])
    torch.testing.assert_close(half.coordinates(2), double.coordinates(2).half(), atol=2e-3, rtol=2e-3)
