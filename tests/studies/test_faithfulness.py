"""Methods side by side: tuned on one part and reported on the other, with every method there is."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr

from provgen.metrics.datamodeling import predicted_outputs
from provgen.pipeline import ProvenancePipeline
from provgen.studies.faithfulness import retraining
from provgen.studies.faithfulness.attributor import Method, MethodLabel
from provgen.studies.faithfulness.baselines import BANDWIDTHS, PixelKernel
from provgen.studies.faithfulness.methods import make_methods, trace_queries, tuned_scores
from provgen.studies.faithfulness.posteriors import DEFAULT
from provgen.studies.faithfulness.tuning import Split, Tuned, best_in_hindsight, fields_of, tune
from provgen.tracing.calibrate import AttributionScores


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_split_takes_the_first_subsets_and_a_quarter_of_the_queries():
    split = Split.first(torch.arange(64), 100, calibration=16)
    assert split.subsets.nonzero().flatten().tolist() == list(range(16))
    assert int(split.queries.sum()) == 25
    more = Split.first(torch.arange(128), 100, calibration=16)
    assert torch.equal(more.subsets[:64], split.subsets)
    assert torch.equal(more.queries, split.queries), "subset models that come later are not calibrated on"
    assert int(Split.first(torch.arange(40), 3, calibration=2).queries.sum()) == 1
    assert Split.first(torch.arange(16), 8, calibration=16, left=0).subsets.all()


@pytest.mark.parametrize("calibration", [1, 7, 8])
def test_a_split_leaves_something_to_report(calibration, message_of):
    assert "--calibration-subsets" in message_of(Split.first, torch.arange(8), 10, calibration=calibration)


@pytest.fixture(scope="module")
def linear():
    """Subset models that are linear in their examples."""
    masks = torch.rand(30, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    effects = rand(12, 40)
    return masks, effects, effects @ masks.double().T


def test_tuning_finds_the_setting_that_is_true(linear):
    masks, effects, outputs = linear
    scores = AttributionScores(
        values=torch.stack([rand(12, 40, seed=5), effects, -effects]),
        settings=("a", "b", "c"),
        distance_to_default=(0, 0, 0),
    )
    split = Split.first(torch.arange(30), 12, calibration=10)
    assert tune({"a kind": scores}, masks, {"a kind": outputs}, split) == "b"


def test_tuning_on_two_kinds_takes_the_best_of_both(linear):
    masks, effects, outputs = linear
    half = effects + rand(12, 40, seed=7)
    kinds = {
        "first": AttributionScores(
            values=torch.stack([effects, half, -effects]),
            settings=("a", "b", "c"),
            distance_to_default=(0, 0, 0),
        ),
        "second": AttributionScores(
            values=torch.stack([-effects, half, effects]),
            settings=("a", "b", "c"),
            distance_to_default=(0, 0, 0),
        ),
    }
    split = Split.first(torch.arange(30), 12, calibration=10)
    assert tune(kinds, masks, dict.fromkeys(kinds, outputs), split) == "b"


def test_tuning_looks_at_nothing_that_is_reported(linear):
    """Turn everything that is reported around: the choice stays."""
    masks, effects, outputs = linear
    scores = AttributionScores(values=torch.stack([effects, -effects]), settings=("a", "b"), distance_to_default=(0, 0))
    split = Split.first(torch.arange(30), 12, calibration=10)
    changed = -outputs
    changed[torch.outer(split.queries, split.subsets)] = outputs[torch.outer(split.queries, split.subsets)]
    assert tune({"a kind": scores}, masks, {"a kind": changed}, split) == "a"


def test_of_settings_that_may_be_the_best_the_usual_one_is_taken(linear):
    masks, effects, outputs = linear
    split = Split.first(torch.arange(30), 12, calibration=16)
    # Two that are as noisy as one another: either may be a little better by luck.
    noisy = [effects + rand(12, 40, seed=seed) for seed in (3, 4)]
    values = {"a": noisy[0], "b": noisy[1], "wrong": rand(12, 40, seed=5), "true": effects}

    def tuned(**unusual):
        scores = AttributionScores(
            values=torch.stack([values[name] for name in unusual]),
            settings=tuple(unusual),
            distance_to_default=tuple(unusual.values()),
        )
        return tune({"a kind": scores}, masks, {"a kind": outputs}, split)

    by_luck = tuned(a=0, b=0, wrong=0)
    assert by_luck in ("a", "b")
    assert tuned(a=0, b=1, wrong=2) == "a"
    assert tuned(a=1, b=0, wrong=2) == "b"
    assert tuned(a=1, b=1, wrong=0) == by_luck
    assert (tuned(a=1, b=2, wrong=0), tuned(a=2, b=1, wrong=0)) == ("a", "b"), "the nearest, not the best"
    assert tuned(a=0, b=0, wrong=0, true=3) == "true"


def test_best_in_hindsight_is_the_best_on_the_reported_part():
    """By brute force; a setting that is good on the calibration part alone does not count."""
    random = torch.Generator().manual_seed(0)
    values, masks = torch.randn(4, 8, 30, generator=random), torch.rand(20, 30, generator=random) < 0.5
    split = Split.first(torch.arange(20), 8, calibration=6)
    outputs = predicted_outputs(values[0], masks) + 3 * torch.randn(8, 20, generator=random)
    calibrated = split.queries[:, None] & split.subsets
    outputs = torch.where(calibrated, predicted_outputs(values[1], masks), outputs)
    scores = AttributionScores(values=values, settings=(0, 1, 2, 3), distance_to_default=(0, 1, 2, 3))
    each = [
        [
            spearmanr(predicted_outputs(of_setting, masks)[query][~split.subsets], outputs[query][~split.subsets])[0]
            for query in range(8)
            if not split.queries[query]
        ]
        for of_setting in values
    ]
    best = max(sum(of_setting) / len(of_setting) for of_setting in each)
    assert best_in_hindsight(scores, masks, outputs, split) == pytest.approx(best)
    assert best == pytest.approx(sum(each[0]) / len(each[0])), "not the one that is perfect on the calibration part"


def test_a_missing_calibration_model_is_noticed(message_of):
    subsets = torch.tensor([0, 1, 3, 4, 5])
    assert "the first 3" in message_of(Split.first, subsets, 10, calibration=3)
    assert Split.first(subsets, 10, calibration=2).subsets.tolist() == [True, True, False, False, False]


@pytest.fixture(scope="module")
def scored(trained_of, tmp_path_factory):
    """Every method on a tiny run, the default average or the first setting of each."""
    trained = trained_of("diffusion")
    queries = trace_queries(trained, retraining.make_queries(trained, 4))
    folder = tmp_path_factory.mktemp("gradients")
    found = {}
    for method in make_methods(trained, folder, num_timesteps=(2,)):
        found[method.name] = tuned_scores(
            method.attributor,
            trained.data.train,
            queries,
            lambda _, scores: DEFAULT if DEFAULT in scores.settings else scores.settings[0],
            lambda _, scores: float(len(scores.settings)),
        )
    return trained, queries, found


def test_every_method_scores_every_example_for_every_query(scored):
    trained, queries, found = scored
    assert {"random", "pixel kernel", "closed form, noised", "DAS without residual, 2 timesteps"} < set(found)
    for name, tuned in found.items():
        for kind in queries:
            assert tuned.scores[kind].shape == (4, len(trained.data.train)), name
            assert tuned.scores[kind].isfinite().all(), name
        assert set(tuned.hindsight) == set(queries), name
        assert (tuned.cost.stored_bytes == 0) == (name == "random")
        assert tuned.cost.seconds_per_query > 0
    pixels, weights = (found[f"{name}, noised"].cost.stored_bytes for name in ("closed form", "provenance network"))
    assert pixels == trained.data.train.images.numel() == 40 * 64
    assert weights == 4 * sum(p.numel() for p in trained.pipeline.provenance.parameters())


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
    assert float(generated.trajectory.alpha_bars[-1]) > 0.99
    assert (last - generated.images).abs().mean() < 0.2


def test_a_run_that_generates_other_images_is_refused(trained_of, message_of):
    trained = trained_of("diffusion")
    queries = retraining.make_queries(trained, 2)
    other = {"generated": replace(queries["generated"], images=255 - queries["generated"].images)}
    assert "provgen retrain" in message_of(trace_queries, trained, other)


def test_the_tempered_posterior_along_the_trajectory_is_the_trace(scored):
    """Without a credit head."""
    trained, _, found = scored
    parts = trained.pipeline.components | {"credit": None}
    pipeline = ProvenancePipeline(**parts).with_manifest(trained.pipeline.manifest)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    output = pipeline([0, 1, 2, 3], generator=generators, top_k=3)
    scores = found["tempered provenance network, trajectory"].scores["generated"]
    torch.testing.assert_close(
        scores.gather(1, output.attribution.example_index), output.attribution.posterior, atol=1e-5, rtol=1e-4
    )


def test_the_default_trace_is_the_weight_that_the_pipeline_gives(scored):
    """Along the trajectory of samples, and of images from outside."""
    trained, _, found = scored
    assert not any(name.startswith("calibrated trace") for name in found)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    generated = trained.pipeline([0, 1, 2, 3], generator=generators, top_k=40, output_type="pt").attribution
    held_out = retraining.make_queries(trained, 4)["holdout"]
    outside = trained.pipeline.attribute(held_out.images, class_labels=held_out.labels, top_k=40)
    for name, kind, attribution in (("trajectory", "generated", generated), ("noised", "holdout", outside)):
        weights = torch.zeros(4, 40).scatter(1, attribution.example_index, attribution.weight)
        scores = found[f"default trace, {name}"].scores[kind]
        torch.testing.assert_close(scores, weights, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("steps", [0, 3, 2000])
def test_timesteps_divide_the_noise_levels(steps, trained_of, tmp_path, message_of):
    trained = trained_of("diffusion")
    assert "--timesteps" in message_of(make_methods, trained, tmp_path, num_timesteps=(10, steps))


def test_another_kind_of_generator_is_refused(trained_of, message_of):
    assert "generator.kind=diffusion" in message_of(retraining.make_queries, trained_of("vae"), 3)


def test_what_was_tuned_is_read_back(tmp_path, message_of):
    kernel, other = (Method(MethodLabel(name=name), PixelKernel()) for name in ("pixel kernel", "another"))
    settings = {"pixel kernel": fields_of(BANDWIDTHS[3]), "another": {"share": 7.0}}
    tuned = Tuned(calibration_queries=[3, 1], timesteps=[10], settings=settings)
    tuned.save(tmp_path / "tuned.json")
    again = Tuned.load(tmp_path / "tuned.json")
    assert again == tuned
    assert again.setting(kernel) == BANDWIDTHS[3]
    assert again.ranking_key("pixel kernel") != again.ranking_key("another")
    assert "run that first" in message_of(again.setting, other)
    assert "pixel kernel" in message_of(tuned.require, ["tarot"])
    assert "provgen faithfulness" in message_of(Tuned.load, tmp_path / "other.json")
    (tmp_path / "old.json").write_text('{"schema_version": 1, "settings": {}}')
    assert "provgen faithfulness" in message_of(Tuned.load, tmp_path / "old.json")


def test_every_setting_is_told_from_the_others_by_its_fields(trained_of, tmp_path):
    for method in make_methods(trained_of("diffusion"), tmp_path, num_timesteps=(2,)):
        for setting in (method.attributor.settings[0], method.attributor.settings[-1]):
            tuned = Tuned(calibration_queries=[], timesteps=[2], settings={method.name: fields_of(setting)})
            tuned.save(tmp_path / "tuned.json")
            assert Tuned.load(tmp_path / "tuned.json").setting(method) == setting
        fields = [str(fields_of(setting)) for setting in method.attributor.settings]
        assert len(set(fields)) == len(fields), method.name
