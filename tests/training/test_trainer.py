"""The generator under a stopped provenance loss is the generator alone, to the last bit; losses fall; clipping."""

import copy

import pytest
import torch
from torch import nn

from provgen import build, evaluation
from provgen.data.batches import BatchStream
from provgen.data.manifest import Manifest
from provgen.run import RunFolder
from provgen.training.trainer import MAX_GRADIENT_NORM

LOSSES = {
    "diffusion": {"denoising_loss"},
    "vae": {"reconstruction_loss", "latent_divergence"},
    "none": {"class_loss"},
}
"""What each kind of generator logs of its own loss."""

NETWORKS = {"diffusion": "denoiser", "vae": "vae", "none": "classifier"}

HEADS = ("class_independent", "class_conditional", "two_stage")

BF16 = "training.mixed_precision=bf16"


@pytest.fixture
def train(new_accelerator, tiny_settings, tiny_data, tmp_path):
    """Train `steps` steps with overrides; return the trainer and the losses of every step."""

    def call(steps, *overrides):
        settings = tiny_settings(*overrides)
        accelerator = new_accelerator(settings.training.mixed_precision)
        data = tiny_data
        if settings.provenance.coverage < 1:
            data = build.open_data(settings, RunFolder(tmp_path / "none"))
        trainer = build.make_trainer(settings, data, accelerator)
        batches = build.make_batches(settings, data.train, accelerator)
        return trainer, [trainer.step(batches.batch(step), step) for step in range(steps)]

    return call


def weights(trainer, name=None):
    network = trainer.networks[name or trainer.generator.name]
    return {key: value.clone() for key, value in network.state_dict().items()}


def is_same(first, second) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("precision", [(), (BF16,)])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_stopped_gradient_leaves_the_generator_bit_identical_to_one_trained_alone(kind, precision, train):
    chosen = (f"generator.kind={kind}", *precision)
    steps = 5 if kind == "diffusion" else 3
    alone, alone_losses = train(steps, "provenance.index_head=none", *chosen)
    # The class loss of a classifier is its own.
    strong = "provenance.loss_weight=10", f"provenance.class_loss_weight={0.01 if kind == 'none' else 10}"
    stopped, stopped_losses = train(steps, "provenance.gradient=stop", *strong, *chosen)
    name = NETWORKS[kind]
    assert is_same(weights(alone), weights(stopped))
    assert is_same(alone.averaged(name), stopped.averaged(name))
    for before, after in zip(alone_losses, stopped_losses, strict=True):
        assert all(torch.equal(before[loss], after[loss]) for loss in LOSSES[kind])
    assert set(stopped.networks) == {name, "provenance"}
    assert set(alone.networks) == {name}


@pytest.mark.parametrize("kind", NETWORKS)
def test_no_head_reaches_the_generator_past_a_stopped_gradient(kind, train):
    chosen = (f"generator.kind={kind}", "provenance.gradient=stop", "provenance.loss_weight=10")
    # On two feature maps of the generator and two of its own.
    heads = [f"provenance.index_head={head}" for head in ("none", "class_conditional", "two_stage")]
    alone, *stopped = (train(2, head, "provenance.shared_stages=2", *chosen)[0] for head in heads)
    assert all(is_same(weights(alone), weights(each)) for each in stopped)


@pytest.mark.parametrize(("kind", "precision"), [("diffusion", ()), ("diffusion", (BF16,)), ("vae", ()), ("none", ())])
def test_a_joint_gradient_reaches_the_generator(kind, precision, train):
    chosen = (f"generator.kind={kind}", *precision)
    alone, _ = train(3, "provenance.index_head=none", *chosen)
    joint, _ = train(3, "provenance.gradient=joint", *chosen)
    assert not is_same(weights(alone), weights(joint))


@pytest.mark.parametrize("kind", NETWORKS)
def test_sharing_nothing_leaves_the_generator_as_it_is_alone(kind, train):
    # Its own encoder starts from the image, or from what an autoencoder decodes, which is detached.
    chosen = (f"generator.kind={kind}", "provenance.shared_stages=0")
    alone, _ = train(2, "provenance.index_head=none", *chosen)
    joint, _ = train(2, "provenance.gradient=joint", "provenance.loss_weight=10", *chosen)
    assert is_same(weights(alone), weights(joint))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_stopped_provenance_network_learns_all_the_same(kind, train):
    chosen = (f"generator.kind={kind}", "provenance.gradient=stop")
    before = weights(train(0, *chosen)[0], "provenance")
    trainer, _ = train(3, *chosen)
    moved = {key for key, value in weights(trainer, "provenance").items() if not torch.equal(value, before[key])}
    assert moved == {key for key, _ in trainer.networks["provenance"].named_parameters()}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("kind", "shared_stages"),
    [("diffusion", "0"), ("diffusion", "2"), ("diffusion", "null"), ("vae", "2"), ("none", "2")],
)
def test_every_head_trains_however_much_is_shared(kind, head, shared_stages, train):
    trainer, losses = train(
        2,
        f"generator.kind={kind}",
        f"provenance.index_head={head}",
        f"provenance.shared_stages={shared_stages}",
        "generator.label_dropout=0.5",
    )
    assert all(loss.isfinite() for step in losses for loss in step.values())
    assert {"index_loss", "provenance_gradient_norm"} | LOSSES[kind] <= set(losses[0])
    # Embeddings start at zero, so what lies before them has no gradient in the first step.
    assert without_gradient(trainer) == []


def without_gradient(trainer) -> list[str]:
    """Name the parameters whose gradient was zero, or not there, in every step so far."""
    return [
        f"{name}.{key}"
        for name, network in trainer.networks.items()
        for key, parameter in network.named_parameters()
        if parameter.grad is None or not trainer.optimizer.state[parameter]["exp_avg_sq"].any()
    ]


def test_mixed_precision_is_used_and_keeps_float32_weights(train):
    exact, _ = train(3)
    mixed, _ = train(3, BF16)
    assert not is_same(weights(exact), weights(mixed))
    assert {value.dtype for value in weights(mixed).values()} == {torch.float32}


@pytest.mark.parametrize("kind", NETWORKS)
def test_training_is_a_function_of_its_settings(kind, train):
    chosen = f"generator.kind={kind}"
    torch.manual_seed(1)
    first, _ = train(2, chosen)
    torch.manual_seed(2)
    second, _ = train(2, chosen)
    other, _ = train(2, chosen, "training.seed=1")
    for name in first.networks:
        assert is_same(weights(first, name), weights(second, name))
    assert not is_same(weights(first), weights(other))


@pytest.mark.parametrize("head", [HEADS[0], *[pytest.param(head, marks=pytest.mark.slow) for head in HEADS[1:]]])
def test_losses_fall_on_sixteen_images(head, new_accelerator, tiny_settings, tiny_data):
    settings = tiny_settings(
        f"provenance.index_head={head}",
        "provenance.loss_weight=0.1",
        "provenance.class_loss_weight=0.1",
        "generator.label_dropout=0.5",
    )
    few = tiny_data.train.select(torch.arange(16))
    data = copy.copy(tiny_data)
    object.__setattr__(data, "train", few)
    object.__setattr__(data, "manifest", Manifest.of(few, tiny_data.holdout))
    trainer = build.make_trainer(settings, data, new_accelerator())
    stream = BatchStream(few, batch_size=32, num_train_timesteps=1000, label_dropout=0.5, seed=0)
    losses = [trainer.step(stream.batch(step), step) for step in range(60)]
    for name in ("denoising_loss", "index_loss", "class_loss"):
        values = torch.stack([loss[name] for loss in losses])
        assert values.isfinite().all()
        assert values[-15:].mean() < 0.9 * values[:15].mean(), name


def test_the_two_networks_are_clipped_apart(train):
    trainer, _ = train(1, "provenance.loss_weight=1e4")
    for network in trainer.networks.values():
        norm = nn.utils.get_total_norm([p.grad for p in network.parameters()])
        assert norm <= MAX_GRADIENT_NORM * (1 + 1e-4)
    clipped = nn.utils.get_total_norm([p.grad for p in trainer.networks["provenance"].parameters()])
    assert clipped == pytest.approx(MAX_GRADIENT_NORM, rel=1e-3)


def test_the_step_size_warms_up_linearly_and_stays(train):
    for steps, share in ((1, 0.2), (3, 0.6), (5, 1.0), (7, 1.0)):
        trainer, _ = train(steps, "training.warmup_steps=5", "training.learning_rate=1e-2")
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(share * 1e-2)
    trainer, _ = train(1, "training.warmup_steps=0", "training.learning_rate=1e-2")
    assert trainer.optimizer.param_groups[0]["lr"] == 1e-2


def test_averaged_weights_lag_behind_and_without_averaging_they_are_the_weights(train):
    lagging, _ = train(4, "training.ema_decay=0.9")
    assert not is_same(lagging.averaged("denoiser"), weights(lagging))
    averaged, _ = train(4, "training.ema_decay=0")
    for name in ("denoiser", "provenance"):
        torch.testing.assert_close(averaged.averaged(name), weights(averaged, name), rtol=0, atol=1e-6)


def test_averaging_leaves_the_trained_weights_alone(train):
    trainer, _ = train(2)
    before = weights(trainer)
    networks = evaluation.averaged_networks(trainer)
    assert is_same(before, weights(trainer))
    assert is_same(dict(networks["denoiser"].state_dict()), trainer.averaged("denoiser"))
    assert not any(p.requires_grad for network in networks.values() for p in network.parameters())


@pytest.mark.parametrize(
    ("override", "has_class_loss"),
    [
        ("generator.label_dropout=0", False),
        ("provenance.class_loss_weight=0", False),
        ("generator.label_dropout=1", True),
        ("provenance.shared_stages=1", True),
    ],
)
def test_a_class_head_that_is_not_trained_is_not_built(override, has_class_loss, train):
    trainer, losses = train(1, override)
    assert ("class_loss" in losses[0]) == has_class_loss
    assert (trainer.networks["provenance"].class_head is not None) == has_class_loss
    assert all(p.grad is not None for p in trainer.networks["provenance"].parameters())


MIXINGS = {
    "none": (),
    "class": ("provenance.label_mixing=0.3",),
    "neighbors": ("provenance.label_mixing=0.3", "provenance.mixing=neighbors", "provenance.num_neighbors=3"),
    "neighbors alone": ("provenance.label_mixing=1", "provenance.mixing=neighbors"),
}


@pytest.mark.parametrize(
    ("kind", "targets", "mixing"),
    [
        *[("diffusion", "posterior", mixing) for mixing in MIXINGS],
        ("diffusion", "one_hot", "none"),
        ("diffusion", "one_hot", "class"),
        ("vae", "one_hot", "none"),
        ("vae", "posterior", "neighbors"),
        ("none", "one_hot", "neighbors"),
        ("none", "posterior", "class"),
    ],
)
def test_every_kind_of_target_trains(kind, targets, mixing, train):
    _, losses = train(2, f"provenance.targets={targets}", f"generator.kind={kind}", *MIXINGS[mixing])
    assert all(loss.isfinite() for step in losses for loss in step.values())


@pytest.mark.parametrize(
    ("kind", "rule", "targets"),
    [
        ("diffusion", "stratified", "posterior"),
        ("diffusion", "k_center", "one_hot"),
        ("diffusion", "entropy", "posterior"),
        ("vae", "stratified", "posterior"),
        ("none", "stratified", "one_hot"),
    ],
)
def test_a_network_that_covers_a_third_trains_and_has_no_more_prototypes(kind, rule, targets, train):
    chosen = ("provenance.coverage=0.3", f"provenance.coverage_rule={rule}", f"provenance.targets={targets}")
    trainer, losses = train(3, *chosen, f"generator.kind={kind}")
    assert all(loss.isfinite() for step in losses for loss in step.values())
    # Not about 1e38, as rows would cost whose example the network cannot name.
    values = [float(step["index_loss"]) for step in losses]
    assert 0 < max(values) < 1000
    assert without_gradient(trainer) == []
    network = trainer.networks["provenance"]
    assert network.index_head.prototypes.points.shape == (12, 16)
    assert len(network.example_labels) == 40


def test_more_stages_than_the_denoiser_has_are_refused(train, message_of):
    message = message_of(train, 0, "provenance.shared_stages=5")
    assert "provenance.shared_stages must be null or 0 to 4" in message
    trainer, _ = train(0, "provenance.shared_stages=4")
    assert trainer.networks["provenance"].config.shared_stages == 4
    everything, _ = train(0)
    assert everything.networks["provenance"].config.shared_stages == 4
