"""From trained networks to what is looked at: averaged weights, fixed queries, class metrics with known answers."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from provgen import build, evaluation
from provgen.data.manifest import Manifest
from provgen.errors import InputError
from provgen.generators.losses import denoiser_divergence, generator_losses
from provgen.metrics.index_quality import LEVELS, mean_kl_gap
from provgen.models.temperatures import Temperatures, Tracer
from provgen.pipeline import ProvenancePipeline
from provgen.run import RunFolder
from provgen.tracing.calibrate import default_credit_head

KINDS = ("diffusion", "vae", "none")


@pytest.fixture
def trainer_of(accelerator, tiny_settings, tiny_data, tmp_path):
    """Train two steps; give the trainer, its settings and its data."""

    def call(*overrides):
        settings = tiny_settings(*overrides)
        data = tiny_data
        if settings.provenance.coverage < 1:
            data = build.open_data(settings, RunFolder(tmp_path / "none"))
        trainer = build.make_trainer(settings, data, accelerator)
        batches = build.make_batches(settings, data.train, accelerator)
        for step in range(2):
            trainer.step(batches.batch(step), step)
        return trainer, settings, data

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_networks_are_copies_that_do_not_train(kind, trainer_of):
    trainer, _, _ = trainer_of(f"generator.kind={kind}")
    networks = evaluation.averaged_networks(trainer)
    assert networks.keys() == trainer.networks.keys()
    for name, network in networks.items():
        expected = trainer.averaged(name)
        assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())
        assert network is not trainer.networks[name]
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert all(parameter.requires_grad for parameter in trainer.networks[name].parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_probe_asks_covered_examples_alone_at_the_levels_of_the_kind(kind, generator_of, tiny_settings, tmp_path):
    settings = tiny_settings(f"generator.kind={kind}", "provenance.coverage=0.3")
    data = build.open_data(settings, RunFolder(tmp_path))
    generator = generator_of(kind, data.train)
    probe, again = (evaluation.make_probe(generator, settings, data) for _ in range(2))
    assert len(probe.batches) == (12 if kind == "diffusion" else 1)
    for batch, other in zip(probe.batches, again.batches, strict=True):
        assert torch.equal(batch.indices.sort().values, data.covered.nonzero().flatten())
        assert torch.equal(batch.noise, other.noise)
        assert torch.equal(batch.indices, other.indices)
    assert probe.is_conditional == (kind == "diffusion")


@pytest.mark.parametrize(("size", "expected"), [(8, 256), (32, 195), (64, 48), (128, 32)])
def test_large_images_are_probed_fewer(size, expected, random_images, generator_of, tiny_settings):
    """At most 200 000 numbers in all, but 32 images in any case."""
    images = random_images(300, size=size)
    holdout = images.select(torch.arange(0))
    data = build.RunData(train=images, holdout=holdout, manifest=Manifest.of(images, holdout))
    generator = generator_of("none", random_images(4))
    probe = evaluation.make_probe(generator, tiny_settings("generator.kind=none"), data)
    assert [len(batch.indices) for batch in probe.batches] == [expected]


@pytest.mark.parametrize("has_holdout", [True, False])
def test_probe_levels_run_from_knowing_nothing_to_naming_one_image(has_holdout, generator_of, tiny_data):
    """The effective number of sources of noised images by hand: nearly all at the first level, one at the last."""
    generator, train = generator_of("diffusion", tiny_data.train), tiny_data.train
    data = tiny_data if has_holdout else replace(tiny_data, holdout=tiny_data.holdout.select(torch.arange(0)))
    levels = evaluation.probe_levels(generator, data)
    assert len(levels) == 12
    places = torch.logit(torch.tensor(levels, dtype=torch.float64))
    torch.testing.assert_close(places.diff(), places.diff().mean().expand(11))
    assert places.diff()[0] > 0
    images = (data.holdout if has_holdout else train).images[:32].double() / 127.5 - 1
    rows = train.images.double().flatten(1) / 127.5 - 1
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    effective = []
    for level in (levels[0], levels[-1]):
        noisy = (level**0.5 * images + (1 - level) ** 0.5 * noise).flatten(1)
        probs = (-torch.cdist(noisy, level**0.5 * rows).square() / (2 * (1 - level))).softmax(dim=1)
        effective.append(float(torch.special.entr(probs).sum(dim=1).exp().median()))
    assert 0.8 * 40 < effective[0] < 40
    assert 1 <= effective[1] < 1.5


@pytest.fixture
def few_levels(monkeypatch):
    """Three levels."""
    monkeypatch.setattr(evaluation, "NUM_LEVELS", 3)


@pytest.mark.usefixtures("few_levels")
@pytest.mark.parametrize("coverage", [1.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_index_metrics_stay_below_their_ceilings_for_every_kind(kind, coverage, trainer_of):
    trainer, settings, data = trainer_of(f"generator.kind={kind}", f"provenance.coverage={coverage}")
    network = evaluation.averaged_posterior(trainer)
    ceiling = evaluation.make_ceiling(network.generator, data)
    qualities = evaluation.make_probe(network.generator, settings, data).measure(network, ceiling)
    assert {quality.rows for quality in qualities} == (
        {"conditional", "unconditional"} if kind == "diffusion" else {"unconditional"}
    )
    for quality in qualities:
        assert 0 <= quality.kl_gap.value < 100
        assert quality.top1.value <= quality.top1_ceiling + 1e-9
        assert quality.kl_gap.n == (40 if coverage == 1 else 12) or quality.rows == "conditional"
    if kind == "none":
        assert qualities[0].top1_ceiling == pytest.approx(1)
        assert qualities[0].cross_entropy_ceiling == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mixing", ["class", "neighbors"])
def test_the_ceiling_of_mixed_targets_is_raised(mixing, trainer_of):
    trainer, settings, data = trainer_of(
        "generator.kind=none", "provenance.label_mixing=0.5", f"provenance.mixing={mixing}"
    )
    network = evaluation.averaged_posterior(trainer)
    ceiling = evaluation.make_ceiling(network.generator, data)
    (quality,) = evaluation.make_probe(network.generator, settings, data).measure(network, ceiling)
    # The parent is certain, so that the floor is the entropy of a row of the mixing itself.
    mixed = build.make_mixing(settings.provenance, data, torch.device("cpu"))
    rows = mixed(torch.eye(40, dtype=torch.float64))
    expected = float(torch.special.entr(rows).sum(1).mean())
    assert quality.cross_entropy_ceiling == pytest.approx(expected, abs=1e-6)
    assert expected > 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_class_metrics_are_measured_for_every_kind(kind, trained_of):
    trained = trained_of(kind)
    holdout, train = trained.data.holdout, trained.data.train
    qualities = evaluation.class_qualities(evaluation.posterior_of(trained), trained.settings, train, holdout)
    levels = evaluation.CLASS_LEVELS if kind == "diffusion" else [0.9999]
    assert list(qualities) == pytest.approx(list(levels), abs=0.01)
    for quality in qualities.values():
        row = quality.as_row()
        assert row["n"] == len(holdout)
        assert all(0 <= value <= 1 for name, value in row.items() if name != "n")
        assert quality.class_accuracy is not None
        assert quality.consistency_top1_baseline == pytest.approx(0.1, abs=0.02), "ten classes, evenly"


def test_a_training_image_names_itself_in_the_closed_form_of_a_classifier(trained_of):
    trained = trained_of("none")
    network, train = evaluation.posterior_of(trained), trained.data.train
    (quality,) = evaluation.class_qualities(network, trained.settings, train, train).values()
    assert quality.consistency_top1_closed_form == 1
    assert quality.knn_accuracy_closed_form == 1
    with torch.no_grad():
        logits = trained.pipeline.classifier(train.images.float() / 127.5 - 1).class_logits
    expected = float((logits.argmax(1) == train.labels).double().mean())
    assert quality.class_accuracy.value == pytest.approx(expected)


def test_class_metrics_are_of_images_the_network_is_told_nothing_of(trained_of):
    trained = trained_of("diffusion")
    network, train = evaluation.posterior_of(trained), trained.data.train
    quality = next(iter(evaluation.class_qualities(network, trained.settings, train, train).values()))
    # At the noisiest level a network of twenty steps cannot know the class; told it, it would always.
    assert quality.consistency_top1.value < 0.9
    assert quality.consistency_top1_closed_form < 1


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_the_generator_are_those_of_every_image(kind, trained_of):
    trained = trained_of(kind)
    network, images = trained.pipeline.network, trained.data.holdout
    losses = generator_losses(trained.generator, images, draws=2, seed=0).mean(dim=1)
    assert losses.shape == (len(images),)
    assert losses.isfinite().all()
    if kind == "none":
        logits = network(images.images.float() / 127.5 - 1).class_logits
        expected = 0.01 * F.cross_entropy(logits, images.labels, reduction="none")
        torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize(("kind", "head"), [("diffusion", "none"), ("vae", "none"), ("vae", "class_independent")])
def test_samples_are_those_of_the_pipeline(kind, head, trainer_of):
    trainer, _, data = trainer_of(f"generator.kind={kind}", f"provenance.index_head={head}")
    sampled = evaluation.sample(evaluation.make_pipeline(trainer, data), data, count=3)
    pipe = evaluation.make_pipeline(trainer, data)
    pipe.set_progress_bar_config(disable=True)
    labels = [0, 1, 2] if kind == "diffusion" else None
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    expected = pipe(labels, batch_size=3, generator=generators, top_k=None, output_type="pt")
    assert torch.equal(sampled.images, expected.images)
    assert (sampled.attribution is None) == (sampled.closed_form is None) == (head == "none")


def test_a_generator_without_provenance_network_saves_no_pipeline(trainer_of, tmp_path):
    for head in ("none", "class_independent"):
        folder = RunFolder(tmp_path / head)
        trainer, _, data = trainer_of(f"provenance.index_head={head}")
        evaluation.save_pipeline(trainer, data, folder, temperatures=None, has_credit=False)
        assert folder.pipeline.is_dir() == (head != "none")


@pytest.mark.parametrize("has_credit", [False, True])
def test_a_pipeline_is_saved_with_its_temperatures_and_at_the_end_with_credit(has_credit, trainer_of, tmp_path):
    folder = RunFolder(tmp_path / "run")
    trainer, _, data = trainer_of()
    given = Temperatures(num_levels=2, null_label=10, low=0.2, high=0.6)
    given.log_temperatures.copy_(torch.arange(8.0).view(2, 2, 2))
    evaluation.save_pipeline(trainer, data, folder, temperatures=given, has_credit=has_credit)
    loaded = ProvenancePipeline.from_pretrained(folder.pipeline)
    assert loaded.window == (0.2, 0.6)
    assert torch.equal(loaded.temperatures.log_temperatures, given.log_temperatures)
    assert (loaded.credit is not None) == has_credit
    if has_credit:
        network = evaluation.averaged_posterior(trainer)
        expected = default_credit_head(network.generator, network.provenance, data.train)
        torch.testing.assert_close(loaded.credit.state_dict(), expected.state_dict())


def test_without_temperatures_a_pipeline_has_those_that_fit_the_averaged_weights(trainer_of):
    trainer, _, data = trainer_of()
    network = evaluation.averaged_posterior(trainer)
    expected = evaluation.fit(network.generator, network.provenance, data)
    found = evaluation.make_pipeline(trainer, data).temperatures
    assert found.window == expected.window
    assert torch.equal(found.log_temperatures, expected.log_temperatures)
    assert found.log_temperatures.any()
    again = evaluation.make_pipeline(trainer, data, temperatures=expected)
    assert again.temperatures is expected


@pytest.mark.usefixtures("few_levels")
@pytest.mark.parametrize("head", ["class_independent", "two_stage"])
def test_an_evaluation_holds_every_level_the_gaps_and_the_recall_of_a_beam(head, trainer_of):
    trainer, settings, data = trainer_of(f"provenance.index_head={head}", "provenance.beam=2")
    probe = evaluation.make_probe(trainer.generator, settings, data)
    network = evaluation.averaged_posterior(trainer)
    measured, temperatures = evaluation.evaluate(probe, trainer, data)
    again = evaluation.fit(network.generator, network.provenance, data)
    assert torch.equal(temperatures.log_temperatures, again.log_temperatures)
    qualities = probe.measure(network, evaluation.make_ceiling(network.generator, data))
    assert measured["index_quality"] == [quality.as_row() for quality in qualities]
    assert len(qualities) == 2 * 3
    assert measured["temperatures"] == evaluation.temperature_rows(temperatures)
    for rows in ("conditional", "unconditional"):
        assert measured[f"kl_gap_{rows}"] == mean_kl_gap(qualities, rows).value
        assert measured[f"kl_gap_{rows}_low"] <= measured[f"kl_gap_{rows}"] <= measured[f"kl_gap_{rows}_high"]
    assert ("beam_recall10" in measured) == (head == "two_stage")
    if head == "two_stage":
        assert measured["beam_recall10"] == probe.beam_recall(network, 2, 10).value
        assert 0 < measured["beam_recall10_low"] <= measured["beam_recall10_high"] <= 1
    json.dumps(measured, allow_nan=False)


def test_rows_of_temperatures_are_those_from_the_window_on():
    table = Temperatures(num_levels=3, low=0.2)
    table.alpha_bars.copy_(torch.tensor([0.1, 0.25, 0.5]))
    table.log_temperatures[Tracer.NETWORK] = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]).log()
    table.log_temperatures[Tracer.CLOSED_FORM] = torch.tensor([[1.5, 3.0, 6.0], [12.0, 24.0, 48.0]]).log()
    names = ("alpha_bar", "network_conditional", "network_unconditional")
    names += ("closed_form_conditional", "closed_form_unconditional")
    expected = [(0.25, 2, 16, 3, 24), (0.5, 4, 32, 6, 48)]
    assert evaluation.temperature_rows(table) == [pytest.approx(dict(zip(names, row, strict=True))) for row in expected]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_so_large_a_share_of_held_out_images_has_less_late_entropy_than_the_limit(kind, share, trained_of):
    trained = trained_of(kind)
    holdout, pipeline = trained.data.holdout, trained.pipeline
    limit = evaluation.late_entropy_limit(trained.pipeline, trained.data.holdout, share)
    labels = holdout.labels if kind == "diffusion" else None
    traced = pipeline.attribute(holdout.images, top_k=1, class_labels=labels)
    # Outside images are traced inside the window alone, so the last level is its cleanest.
    late = traced.step_entropy[:, -1]
    # Where many are as sure as one another, no more are below, and no fewer are at most there.
    below, at_most = ((late < limit + by).double().mean().item() for by in (-1e-6, 1e-6))
    assert below <= share + 0.5 / len(holdout)
    assert at_most >= share - 0.5 / len(holdout)
    assert evaluation.late_entropy_limit(trained.pipeline, trained.data.holdout, 0.0) == pytest.approx(
        float(late.min()), rel=1e-5
    )
    assert evaluation.late_entropy_limit(trained.pipeline, trained.data.holdout, 1.0) == pytest.approx(
        float(late.max()), rel=1e-5
    )


def test_without_held_out_images_there_is_no_limit(trained):
    with pytest.raises(InputError, match="this run has none"):
        evaluation.late_entropy_limit(trained.pipeline, trained.data.holdout.select(torch.arange(0)), 0.01)


def test_evidence_is_taken_from_whole_posteriors(trained):
    """The same from posteriors over all training images, one image at a time."""
    train, pipeline = trained.data.train, trained.pipeline
    images, labels = train.images[:5], train.labels[:5]
    found = evaluation.evidence_of(trained, images, labels)
    closed = trained.closed_form()
    for row in range(len(images)):
        traces = [
            pipeline.attribute(
                images[row : row + 1], top_k=len(train), closed_form=some, trace_every=evaluation.EVIDENCE_EVERY
            )
            for some in (None, closed)
        ]
        dense = [torch.zeros(len(train)).scatter(0, t.example_index[0], t.posterior[0]) for t in traces]
        first, second = (set(some.topk(10).indices.tolist()) for some in dense)
        assert found.top[row] == pytest.approx(float(dense[0].max()), rel=1e-4)
        assert found.of_class[row] == pytest.approx(float(dense[0][train.labels == labels[row]].sum()), rel=1e-4)
        assert found.agreement[row] == len(first & second) / 10
        entropy = float(torch.special.entr(dense[0].double()).sum().exp())
        assert found.sources[row] == pytest.approx(entropy, rel=1e-3)
        assert found.late_entropy[row] == pytest.approx(float(traces[0].step_entropy[0, -1]), rel=1e-3)
    asked_nothing = evaluation.evidence_of(trained, images, torch.full_like(labels, train.num_classes))
    assert asked_nothing.of_class.tolist() == [1] * 5


@pytest.mark.parametrize(
    ("num_classes", "is_conditional", "expected"),
    [(3, True, [0, 1, 2, 0, 1]), (3, False, [None] * 5), (0, True, [None] * 5)],
)
def test_classes_are_sampled_in_turn(num_classes, is_conditional, expected, random_images):
    train = random_images(6, num_classes=num_classes)
    assert evaluation.classes_in_turn(train, 5, is_conditional=is_conditional) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_is_asked_about_what_its_generator_made_of_a_batch(kind, trained_of):
    trained = trained_of(kind)
    network, data = evaluation.posterior_of(trained), trained.data
    batch = evaluation.make_probe(network.generator, trained.settings, data).batches[0]
    output, predicted = network.forward(batch)
    expected = trained.generator.forward(batch)
    torch.testing.assert_close(output.query, expected.query)
    logits = trained.pipeline.provenance(
        expected.feature_maps, expected.alpha_bar, expected.class_labels, expected.class_logits
    ).index_logits
    torch.testing.assert_close(predicted.index_logits, logits)
    torch.testing.assert_close(network.index_logits(output), logits)
    assert predicted.index_logits.shape == (40, len(data.train))
    assert not predicted.index_logits.requires_grad


def test_the_divergence_is_measured_at_every_level_and_by_its_timestep(trained):
    generator, train = trained.generator, trained.data.train
    images = train.select(torch.arange(3))
    found = evaluation.divergence_by_step(generator, train, images)
    assert list(found) == generator.timesteps(LEVELS)
    closed_form = generator.closed_form(train, dtype=torch.float64, device=torch.device("cpu"))
    steps = list(found)[:2]
    expected = denoiser_divergence(generator, closed_form, images, timesteps=steps, seed=0)
    for row, step in enumerate(steps):
        torch.testing.assert_close(found[step], expected[:, row], rtol=1e-4, atol=1e-4)
