"""The wiring: launches that cannot work, batches that do not divide, and what a run may change."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from provgen import build
from provgen.data.manifest import Manifest
from provgen.generators.classifier import ClassifierGenerator
from provgen.generators.diffusion import DiffusionGenerator
from provgen.generators.vae import VaeGenerator
from provgen.models.diffusion import encoder_shapes
from provgen.run import RunFolder
from provgen.settings_file import load_settings

KINDS = {"diffusion": DiffusionGenerator, "vae": VaeGenerator, "none": ClassifierGenerator}


def test_processes_that_do_not_know_of_one_another_are_refused(accelerator, monkeypatch, message_of):
    # The accelerator of this process is alone; now a launcher claims to have started three.
    assert accelerator.num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = message_of(build.make_accelerator)
    assert "started 3 processes, but each runs alone" in message
    assert "--multi_gpu --num_processes 3" in message
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert build.make_accelerator().num_processes == 1


@pytest.mark.parametrize("kind", ["diffusion", "vae", "none"])
def test_both_networks_depend_on_the_seed_and_on_nothing_global(kind, accelerator, tiny_settings, tiny_data):
    def weights(seed):
        # Two own feature maps, so that some weights of either network are random.
        chosen = (f"generator.kind={kind}", "provenance.shared_stages=2", f"training.seed={seed}")
        settings = tiny_settings(*chosen)
        trainer = build.make_trainer(settings, tiny_data, accelerator)
        build.make_batches(settings, tiny_data.train, accelerator).batch(0)
        return [network.state_dict() for network in trainer.networks.values()]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = weights(0), weights(1)
    for network, same, changed in zip(first, again, other, strict=True):
        assert all(torch.equal(value, same[key]) for key, value in network.items())
        assert any(not torch.equal(value, changed[key]) for key, value in network.items())


@pytest.mark.parametrize("kind", ["diffusion", "vae", "none"])
def test_the_generator_starts_the_same_whatever_its_provenance_network_is(kind, accelerator, tiny_settings, tiny_data):
    alone, *others = (
        build.make_trainer(tiny_settings(f"generator.kind={kind}", override), tiny_data, accelerator)
        for override in (
            "provenance.index_head=none",
            "provenance.width=7",
            "provenance.shared_stages=0",
            "provenance.index_head=two_stage",
        )
    )
    name = alone.generator.name
    expected = alone.networks[name].state_dict()
    for trainer in others:
        weights = trainer.networks[name].state_dict()
        assert weights.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in weights.items())


def test_the_provenance_network_knows_its_training_set(accelerator, tiny_settings, tiny_data):
    network = build.make_trainer(tiny_settings(), tiny_data, accelerator).networks["provenance"]
    assert torch.equal(network.example_labels, tiny_data.train.labels)
    assert network.config.fingerprint == tiny_data.manifest.fingerprint
    assert network.config.num_examples == len(tiny_data.train) == 40
    coordinates = network.index_head.prototypes.points.detach().double()
    pixels = (tiny_data.train.images.double() / 127.5 - 1).flatten(1)
    expected = torch.linalg.svdvals(pixels - pixels.mean(0))[:16]
    torch.testing.assert_close(torch.linalg.svdvals(coordinates), expected, rtol=1e-4, atol=1e-4)


def test_a_network_of_a_third_knows_the_third_alone(accelerator, tiny_settings, tmp_path):
    settings = tiny_settings("provenance.coverage=0.3")
    data = build.open_data(settings, RunFolder(tmp_path / "none"))
    network = build.make_trainer(settings, data, accelerator).networks["provenance"]
    covered = data.covered.nonzero().flatten()
    assert torch.equal(network.covered, covered)
    assert len(covered) == 12
    assert set(data.train.labels[covered].tolist()) == set(range(10)), "every class can be named"
    assert torch.equal(network.example_labels, data.train.labels)
    # As many coordinates as there are covered examples, about their own mean.
    pixels = (data.train.images[covered].double() / 127.5 - 1).flatten(1)
    found = torch.linalg.svdvals(network.index_head.prototypes.points.detach().double())
    torch.testing.assert_close(found, torch.linalg.svdvals(pixels - pixels.mean(0)), rtol=1e-4, atol=1e-4)


def test_what_is_covered_is_chosen_once_and_kept_in_the_manifest(tiny_settings, tmp_path):
    chosen = ("provenance.coverage=0.3", "provenance.coverage_rule=entropy")
    settings = tiny_settings(*chosen, f"output_dir={tmp_path / 'run'}")
    first, again = (build.open_data(settings, RunFolder(tmp_path / "none")) for _ in range(2))
    assert torch.equal(first.covered, again.covered)
    folder = build.start_run(settings, first, writes=True)
    # Another rule would choose others, but the run has begun.
    reopened = build.open_data(tiny_settings("provenance.coverage=0.9"), folder)
    assert torch.equal(reopened.covered, first.covered)
    assert int(reopened.covered.sum()) == 12


def test_rules_choose_different_examples(tiny_settings, tmp_path):
    chosen = [
        build.open_data(
            tiny_settings("provenance.coverage=0.3", f"provenance.coverage_rule={rule}"), RunFolder(tmp_path)
        ).covered
        for rule in ("stratified", "k_center", "entropy")
    ]
    assert not any(torch.equal(chosen[i], chosen[i - 1]) for i in range(3))


def test_everything_is_covered_unless_asked_otherwise(tiny_data):
    assert tiny_data.covered.all()
    assert len(tiny_data.covered) == 40


def test_coverage_below_one_of_every_class_is_refused(tiny_settings, tmp_path, message_of):
    settings = tiny_settings("provenance.coverage=0.1")
    message = message_of(build.open_data, settings, RunFolder(tmp_path / "none"))
    assert "provenance.coverage" in message
    assert "got 4" in message


def test_an_unknown_head_is_refused_with_those_there_are(accelerator, tiny_settings, tiny_data, message_of):
    message = message_of(build.make_trainer, tiny_settings("provenance.index_head=three_stage"), tiny_data, accelerator)
    assert "provenance.index_head must be" in message
    assert all(name in message for name in [*build.HEADS, "none", "three_stage"])


@pytest.mark.parametrize(
    "overrides",
    [
        ("provenance.index_head=class_conditional",),
        ("provenance.index_head=two_stage", "provenance.cells=classes"),
    ],
)
def test_a_head_that_needs_classes_is_refused_where_there_are_none(
    overrides, accelerator, tiny_settings, random_images, message_of
):
    images = random_images(12, num_classes=0)
    data = build.RunData(train=images, holdout=images, manifest=Manifest.of(images, images))
    message = message_of(build.make_trainer, tiny_settings(*overrides), data, accelerator)
    assert overrides[0] in message
    kmeans = tiny_settings("provenance.index_head=two_stage")
    assert "provenance" in build.make_trainer(kmeans, data, accelerator).networks


def test_more_cells_than_examples_are_refused(accelerator, tiny_settings, tiny_data, message_of):
    chosen = ("provenance.index_head=two_stage", "provenance.num_cells=41")
    message = message_of(build.make_trainer, tiny_settings(*chosen), tiny_data, accelerator)
    assert "provenance.num_cells" in message
    assert "40" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("provenance.index_head=class_conditional",),
            {"num_classes": 10, "num_slots": 4, "has_unlabelled": False, "has_class_branch": True},
        ),
        (("provenance.index_head=two_stage",), {"num_classes": 10, "cells": "kmeans", "num_cells": 2}),
        (
            ("provenance.index_head=two_stage", "provenance.num_cells=9"),
            {"num_classes": 10, "cells": "kmeans", "num_cells": 9},
        ),
        (
            ("provenance.index_head=two_stage", "provenance.cells=classes"),
            {"num_classes": 10, "cells": "classes", "num_cells": 10},
        ),
    ],
)
def test_heads_are_sized_by_the_training_set(overrides, expected, accelerator, tiny_settings, tiny_data):
    network = build.make_trainer(tiny_settings(*overrides), tiny_data, accelerator).networks["provenance"]
    assert {name: value for name, value in network.config.head.items() if name != "kind"} == expected
    assert network.config.beam == (4 if "two_stage" in overrides[0] else None)


def test_mixing_is_made_of_what_the_settings_say(tiny_settings, tiny_data):
    def mixed(*overrides):
        chosen = tiny_settings(*overrides).provenance
        mixing = build.make_mixing(chosen, tiny_data, torch.device("cpu"))
        return None if mixing is None else mixing(torch.eye(40, dtype=torch.float64))

    labels = tiny_data.train.labels
    is_same = labels[:, None] == labels[None, :]
    assert mixed() is None
    of_class = mixed("provenance.label_mixing=0.4")
    expected = 0.6 * torch.eye(40) + 0.4 * is_same / is_same.sum(1)
    torch.testing.assert_close(of_class, expected.double())
    near = mixed("provenance.label_mixing=1", "provenance.mixing=neighbors", "provenance.num_neighbors=1")
    pixels = tiny_data.train.images.double().flatten(1)
    distances = torch.cdist(pixels, pixels).fill_diagonal_(float("inf")).masked_fill(~is_same, float("inf"))
    assert torch.equal(near.argmax(1), distances.argmin(1))
    assert torch.equal(near.amax(1), torch.ones(40, dtype=torch.float64))


def test_prototypes_can_start_anywhere(accelerator, tiny_settings, tiny_data):
    at_images, anywhere = (
        build.make_trainer(tiny_settings(f"provenance.start={start}"), tiny_data, accelerator)
        .networks["provenance"]
        .index_head.prototypes
        for start in ("images", "random")
    )
    assert at_images.bias.any()
    assert not anywhere.bias.any()
    assert float(anywhere.points.detach().std()) == pytest.approx(1 / 16**0.5, rel=0.2), "width 16"


def test_the_split_is_disjoint_and_a_function_of_its_seed(tiny_settings, tmp_path):
    folder = RunFolder(tmp_path / "none")
    first, again, other = (
        build.open_data(tiny_settings("data.holdout_fraction=0.1", f"data.split_seed={seed}"), folder)
        for seed in (0, 0, 1)
    )
    assert not set(first.train.paths) & set(first.holdout.paths)
    assert first.train.paths == again.train.paths
    assert first.train.paths != other.train.paths
    assert len(first.train) == 40


def test_a_run_keeps_its_manifest_and_its_settings(tiny_settings, tiny_data, tmp_path, message_of):
    settings = replace(tiny_settings(), output_dir=str(tmp_path / "run"))
    folder = build.start_run(settings, tiny_data, writes=True)
    manifest = folder.manifest.read_bytes()
    assert load_settings(folder.config, []) == settings
    reopened = build.open_data(settings, folder)
    assert reopened.train.paths == tiny_data.train.paths

    longer = replace(settings, training=replace(settings.training, max_steps=99, log_every=1, checkpoint_every=7))
    build.start_run(longer, tiny_data, writes=True)
    assert load_settings(folder.config, []) == longer
    assert folder.manifest.read_bytes() == manifest

    other = replace(settings, generator=replace(settings.generator, label_dropout=0.7))
    message = message_of(build.start_run, other, tiny_data, writes=True)
    assert "generator.label_dropout=0.2" in message
    assert "generator.label_dropout=0.7" in message
    assert load_settings(folder.config, []) == longer


def test_a_generator_without_provenance_network_has_nothing_to_trace_with(
    tiny_settings, tiny_data, tmp_path, message_of
):
    settings = replace(tiny_settings("provenance.index_head=none"), output_dir=str(tmp_path / "run"))
    build.start_run(settings, tiny_data, writes=True)
    message = message_of(build.open_trained_run, tmp_path / "run", torch.device("cpu"))
    assert "without a provenance network" in message


def test_a_run_without_a_pipeline_says_how_to_finish_it(tiny_settings, tiny_data, tmp_path, message_of):
    build.start_run(replace(tiny_settings(), output_dir=str(tmp_path / "run")), tiny_data, writes=True)
    assert "provgen train --config" in message_of(build.open_trained_run, tmp_path / "run", torch.device("cpu"))


@pytest.mark.parametrize("name", ["none", "config.yaml"])
def test_what_is_no_run_is_refused(name, tmp_path, message_of):
    assert "provgen train" in message_of(build.open_trained_run, tmp_path / name, torch.device("cpu"))


@pytest.mark.parametrize(
    ("num_classes", "overrides"),
    [
        (3, ("provenance.index_head=none", "provenance.class_loss_weight=0")),
        (0, ("provenance.index_head=none",)),
        (
            3,
            (
                "provenance.index_head=class_conditional",
                "provenance.gradient=stop",
                "provenance.class_loss_weight=0",
            ),
        ),
    ],
)
def test_a_classifier_with_nothing_to_learn_is_refused(
    num_classes, overrides, accelerator, tiny_settings, tiny_data, random_images, message_of
):
    images = random_images(8, num_classes=num_classes)
    data = replace(tiny_data, train=images, manifest=Manifest.of(images, images.select(torch.arange(0))))
    settings = tiny_settings("generator.kind=none", *overrides)
    assert "provenance.class_loss_weight" in message_of(build.make_trainer, settings, data, accelerator)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_choose_the_kind_of_generator(kind, generator_of, random_images):
    assert type(generator_of(kind, random_images(9))) is KINDS[kind]


def test_without_saying_so_it_is_a_denoiser(tiny_settings, random_images):
    settings, images = tiny_settings(), random_images(9)
    network = build.make_network(settings, images)
    assert isinstance(build.make_generator(settings, images, network), DiffusionGenerator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["tiny", "medium"])
def test_all_kinds_have_stages_of_the_same_shapes(kind, size, tiny_settings, random_images):
    settings = tiny_settings(f"generator.kind={kind}", f"generator.size={size}")
    assert build.stage_shapes(settings, random_images(4, channels=3, size=12)) == encoder_shapes(size, 12, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_size_that_cannot_be_halved_is_refused(kind, tiny_settings, random_images, message_of):
    settings = tiny_settings(f"generator.kind={kind}")
    message = message_of(build.make_network, settings, random_images(4, size=9))
    assert "data.image_size must be a multiple of 2" in message


def test_only_a_denoiser_is_given_labels_some_of_the_time(tiny_settings):
    settings = [tiny_settings(f"generator.kind={kind}", "generator.label_dropout=0.3") for kind in KINDS]
    assert [build.label_dropout(each) for each in settings] == [0.3, 1.0, 1.0]


@pytest.mark.parametrize(
    ("overrides", "has_head"),
    [
        ((), True),
        (("provenance.class_loss_weight=0",), False),
        (("provenance.class_loss_weight=0", "provenance.index_head=class_conditional"), True),
        (("provenance.index_head=none",), True),
    ],
)
def test_a_classifier_has_a_class_head_where_something_trains_it(overrides, has_head, generator_of, random_images):
    network = generator_of("none", random_images(9), *overrides).network
    assert (network.class_head is not None) == has_head
    assert network.config.num_classes == (3 if has_head else 0)


def test_images_without_classes_have_no_class_head(generator_of, random_images):
    assert generator_of("none", random_images(4, num_classes=0)).network.class_head is None


def test_losses_weigh_their_parts_as_the_settings_say(generator_of, random_images):
    images = random_images(4)
    assert generator_of("vae", images, "generator.kl_weight=0.2").kl_weight == 0.2
    assert generator_of("none", images, "provenance.class_loss_weight=0.3").class_loss_weight == 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_of_batches_has_noise_of_the_generator_s_shape(kind, generator_of, tiny_settings, tiny_data):
    batch = build.make_stream(tiny_settings(f"generator.kind={kind}"), tiny_data.train).batch(0)
    assert batch.noise.shape[1:] == generator_of(kind, tiny_data.train).noise_shape
    is_given = batch.labels < tiny_data.train.num_classes
    assert bool(is_given.any()) == (kind == "diffusion")


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_run_has_the_generator_of_its_pipeline_and_its_losses(kind, trained_of):
    trained = trained_of(kind)
    generator, of_pipeline = trained.generator, trained.pipeline.generator
    assert type(generator) is type(of_pipeline) is KINDS[kind]
    assert generator.network is of_pipeline.network is trained.pipeline.network
    batch = build.make_stream(trained.settings, trained.data.train).batch(0)
    with torch.no_grad():
        first, second = (each.forward(batch) for each in (generator, of_pipeline))
    torch.testing.assert_close(first.query, second.query)
    assert first.parts.keys() == second.parts.keys()
    for name, part in first.parts.items():
        torch.testing.assert_close(part, second.parts[name])
    if kind == "none":
        torch.testing.assert_close(first.loss, 0.01 * first.parts["class_loss"])
    if kind == "diffusion":
        steps = [g.alpha_bars(20) for g in (generator, of_pipeline)]
        assert torch.equal(*steps), "both sample at the same levels"


def test_the_closed_form_of_a_run_can_be_of_what_is_covered(trained):
    covered = torch.arange(40) < 30
    whole, part = trained.closed_form(), trained.closed_form(covered=covered)
    query = (
        torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((5,), 0.05),
        torch.full((5,), 10),
    )  # fmt: skip
    expected = whole.probs(*query)[:, covered]
    torch.testing.assert_close(part.probs(*query)[:, covered], expected / expected.sum(1, keepdim=True))
    assert not part.probs(*query)[:, ~covered].any()


def test_a_run_of_before_data_max_bytes_resumes_and_may_change_it(tmp_path, tiny_settings, tiny_data):
    settings = tiny_settings(f"output_dir={tmp_path}")
    folder = build.start_run(settings, tiny_data, writes=True)
    lines = folder.config.read_text(encoding="utf-8").splitlines(keepends=True)
    folder.config.write_text("".join(line for line in lines if "max_bytes" not in line), encoding="utf-8")
    changed = replace(settings, data=replace(settings.data, max_bytes=2**20))
    build.start_run(changed, tiny_data, writes=True)
    assert load_settings(folder.config, []).data.max_bytes == 2**20


def test_training_images_that_are_all_alike_are_refused(tmp_path, tiny_settings, message_of):
    for number in range(5):
        Image.new("L", (8, 8), 7).save(tmp_path / f"{number}.png")
    settings = tiny_settings("data.source=folder", f"data.path={tmp_path}", "data.max_train_images=null")
    message = message_of(build.open_data, settings, RunFolder(tmp_path / "run"))
    assert message.startswith("all 5 training images are alike")
