"""The denoiser under a stopped provenance loss is the denoiser alone, to the last bit; losses fall; clipping."""

import copy

import pytest
import torch
from torch import nn

from provgen import build
from provgen.training.batches import BatchStream
from provgen.training.trainer import MAX_GRADIENT_NORM


@pytest.fixture
def train(new_accelerator, tiny_settings, tiny_data):
    """Train `steps` steps with overrides; return the trainer and the losses of every step."""

    def call(steps, *overrides):
        settings = tiny_settings(*overrides)
        accelerator = new_accelerator(settings.training.mixed_precision)
        trainer = build.make_trainer(settings, tiny_data, accelerator)
        batches = build.make_batches(settings, tiny_data.train, accelerator)
        return trainer, [trainer.step(batches.batch(step), step) for step in range(steps)]

    return call


def weights(trainer, name="denoiser"):
    return {key: value.clone() for key, value in trainer.networks[name].state_dict().items()}


def is_same(first, second) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("precision", [(), ("training.mixed_precision=bf16",)])
def test_a_stopped_gradient_leaves_the_denoiser_bit_identical_to_one_trained_alone(precision, train):
    alone, alone_losses = train(5, "provenance.index_head=none", *precision)
    stopped, stopped_losses = train(
        5,
        "provenance.gradient=stop",
        "provenance.loss_weight=10",
        "provenance.class_loss_weight=10",
        *precision,
    )
    assert is_same(weights(alone), weights(stopped))
    assert is_same(alone.averaged("denoiser"), stopped.averaged("denoiser"))
    for before, after in zip(alone_losses, stopped_losses, strict=True):
        assert torch.equal(before["denoising_loss"], after["denoising_loss"])
    assert set(stopped.networks) == {"denoiser", "provenance"}
    assert set(alone.networks) == {"denoiser"}


@pytest.mark.parametrize("precision", [(), ("training.mixed_precision=bf16",)])
def test_a_joint_gradient_reaches_the_denoiser(precision, train):
    alone, _ = train(5, "provenance.index_head=none", *precision)
    joint, _ = train(5, "provenance.gradient=joint", *precision)
    assert not is_same(weights(alone), weights(joint))


def test_a_stopped_provenance_network_learns_all_the_same(train):
    trainer, _ = train(0, "provenance.gradient=stop")
    before = weights(trainer, "provenance")
    trainer, _ = train(5, "provenance.gradient=stop")
    moved = {
        key for key, value in weights(trainer, "provenance").items() if not torch.equal(value, before[key])
    }
    assert moved == {key for key, _ in trainer.networks["provenance"].named_parameters()}


def test_mixed_precision_is_used_and_keeps_float32_weights(train):
    exact, _ = train(3)
    mixed, _ = train(3, "training.mixed_precision=bf16")
    assert not is_same(weights(exact), weights(mixed))
    assert {value.dtype for value in weights(mixed).values()} == {torch.float32}


def test_training_is_a_function_of_its_settings(train):
    torch.manual_seed(1)
    first, _ = train(3)
    torch.manual_seed(2)
    second, _ = train(3)
    other, _ = train(3, "training.seed=1")
    for name in ("denoiser", "provenance"):
        assert is_same(weights(first, name), weights(second, name))
    assert not is_same(weights(first), weights(other))


def test_losses_fall_on_sixteen_images(new_accelerator, tiny_settings, tiny_data):
    settings = tiny_settings(
        "provenance.loss_weight=0.1", "provenance.class_loss_weight=0.1", "generator.label_dropout=0.5"
    )
    few = tiny_data.train.select(torch.arange(16))
    data = copy.copy(tiny_data)
    object.__setattr__(data, "train", few)
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
    networks = build.averaged_networks(trainer)
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


@pytest.mark.parametrize("targets", ["one_hot", "posterior"])
@pytest.mark.parametrize("label_mixing", [0.0, 0.3])
def test_every_kind_of_target_trains(targets, label_mixing, train):
    _, losses = train(2, f"provenance.targets={targets}", f"provenance.label_mixing={label_mixing}")
    assert all(loss.isfinite() for step in losses for loss in step.values())


def test_more_stages_than_the_denoiser_has_are_refused(train, message_of):
    assert "provenance.shared_stages" in message_of(train, 0, "provenance.shared_stages=5")
    trainer, _ = train(0, "provenance.shared_stages=4")
    assert len(trainer.networks["provenance"].config.stages) == 4
