"""Methods side by side: tuned on one part and reported on the other, with every method there is."""

import pytest
import torch

from provgen import faithfulness, retraining
from provgen.attribution.attributor import AttributionScores
from provgen.faithfulness import Split


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_split_takes_subsets_and_queries_in_proportion():
    split = Split.draw(64, 100, calibration=16, seed=0)
    assert (int(split.subsets.sum()), int(split.queries.sum())) == (16, 25)
    again, other = (Split.draw(64, 100, calibration=16, seed=seed) for seed in (0, 1))
    assert torch.equal(again.subsets, split.subsets)
    assert not torch.equal(other.subsets, split.subsets)
    assert int(Split.draw(40, 3, calibration=2, seed=0).queries.sum()) == 1


@pytest.mark.parametrize("calibration", [1, 7, 8])
def test_a_split_leaves_something_to_report(calibration, message_of):
    assert "--calibration-subsets" in message_of(Split.draw, 8, 10, calibration=calibration, seed=0)


@pytest.fixture(scope="module")
def linear():
    """Subset models that are linear in their examples."""
    masks = torch.rand(30, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    effects = rand(12, 40)
    return masks, effects, effects @ masks.double().T


def test_tuning_finds_the_setting_that_is_true(linear):
    masks, effects, outputs = linear
    scores = AttributionScores(
        values=torch.stack([rand(12, 40, seed=5), effects, -effects]), settings=("a", "b", "c")
    )
    split = Split.draw(30, 12, calibration=10, seed=0)
    assert faithfulness.tune(scores, masks, outputs, split) == "b"


def test_tuning_looks_at_nothing_that_is_reported(linear):
    """Turn everything that is reported around: the choice stays."""
    masks, effects, outputs = linear
    scores = AttributionScores(values=torch.stack([effects, -effects]), settings=("a", "b"))
    split = Split.draw(30, 12, calibration=10, seed=0)
    changed = -outputs
    changed[torch.outer(split.queries, split.subsets)] = outputs[torch.outer(split.queries, split.subsets)]
    assert faithfulness.tune(scores, masks, changed, split) == "a"


def test_what_is_reported_was_not_calibrated_on(linear):
    masks, effects, outputs = linear
    split = Split.draw(30, 12, calibration=10, seed=0)
    predicted = faithfulness.reported(effects, masks, split)
    torch.testing.assert_close(predicted, outputs[~split.queries][:, ~split.subsets])


@pytest.fixture(scope="module")
def scored(trained_of, tmp_path_factory):
    """Every method on a tiny run."""
    trained = trained_of("diffusion")
    queries = faithfulness.trace_queries(trained, retraining.make_queries(trained, 4))
    folder = tmp_path_factory.mktemp("gradients")
    methods = faithfulness.make_methods(trained, folder, num_timesteps=(2,))
    return (
        trained,
        queries,
        {name: faithfulness.score(method, trained.data.train, queries) for name, method in methods.items()},
    )


def test_every_method_scores_every_example_for_every_query(scored):
    trained, queries, found = scored
    assert len(found) == 15
    for name, method in found.items():
        for kind in queries:
            values = method.scores[kind].values
            assert values.shape[1:] == (4, len(trained.data.train)), name
            assert values.isfinite().all(), name
        assert method.seconds_per_query > 0
        assert (method.stored_bytes == 0) == (name == "random")
    assert found["TRAK, 2 timesteps"].fit_seconds > 0
    assert found["gradient dot, 2 timesteps"].stored_bytes == found["TRAK, 2 timesteps"].stored_bytes


def test_queries_are_those_of_the_subset_models(scored):
    trained, queries, _ = scored
    images = retraining.make_queries(trained, 4)
    assert queries["holdout"].trajectory is None
    generated = queries["generated"]
    expected = images["generated"].images.float() / 127.5 - 1
    torch.testing.assert_close(generated.images, expected)
    assert generated.class_labels.tolist() == [0, 1, 2, 3]
    # The last step of the trajectory is nearly the image: the same seeds were sampled again.
    last = generated.trajectory.images[-1]
    signal = float(generated.trajectory.signal[-1])
    assert signal > 0.99
    assert (last - generated.images).abs().mean() < 0.2


def test_the_posterior_along_the_trajectory_is_the_trace(scored):
    trained, _, found = scored
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    output = trained.pipeline([0, 1, 2, 3], generator=generators, top_k=3)
    setting = "class told, probabilities, 0.05 < a_t < 0.9, temperature 1"
    scores = found["provenance network, trajectory"].scores["generated"].of(setting)
    torch.testing.assert_close(
        scores.gather(1, output.attribution.example_index), output.attribution.posterior, atol=1e-5, rtol=1e-4
    )


def test_another_kind_of_generator_is_refused(trained_of, tmp_path, message_of):
    message = message_of(faithfulness.make_methods, trained_of("vae"), tmp_path, num_timesteps=(2,))
    assert "generator.kind=diffusion" in message
