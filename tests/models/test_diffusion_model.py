"""Encoder feature maps as announced, hooks that leave no trace, and image sizes that cannot be halved."""

import pytest
import torch

from provgen.models.diffusion import (
    DENOISER_SIZES,
    encoder_feature_maps,
    encoder_shapes,
    make_denoiser,
    make_sampling_scheduler,
    make_training_scheduler,
    record_feature_maps,
)


def hooks_of(module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def noisy_images(denoiser, count=2):
    config = denoiser.config
    shape = (count, config.in_channels, config.sample_size, config.sample_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def forward(denoiser, count=2, label=1):
    labels = torch.full((count,), label)
    return denoiser(noisy_images(denoiser, count), torch.full((count,), 10), class_labels=labels).sample


@pytest.mark.parametrize(
    ("size", "image_size", "channels"), [("tiny", 8, 1), ("small", 12, 3), ("medium", 28, 1), ("large", 8, 3)]
)
def test_recorded_stages_have_the_announced_shapes(size, image_size, channels):
    denoiser = make_denoiser(size, image_size=image_size, image_channels=channels, num_classes=2)
    with torch.no_grad(), record_feature_maps(denoiser) as feature_maps:
        predicted = forward(denoiser)
    assert predicted.shape == (2, channels, image_size, image_size)
    assert [tuple(stage.shape) for stage in feature_maps] == [
        (2, width, height, height) for width, height in encoder_shapes(size, image_size, channels)
    ]
    assert len(feature_maps) == len(DENOISER_SIZES[size].channels) + 3
    assert torch.equal(feature_maps[0], noisy_images(denoiser))


def test_stages_feed_the_prediction():
    denoiser = make_denoiser("tiny", image_size=8, image_channels=1, num_classes=2)
    with record_feature_maps(denoiser) as feature_maps:
        predicted = forward(denoiser)
    gradients = torch.autograd.grad(predicted.sum(), feature_maps[1:])
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_hooks_are_gone_after_recording_even_after_an_error():
    denoiser = make_denoiser("tiny", image_size=8, image_channels=1, num_classes=2)
    with record_feature_maps(denoiser) as feature_maps:
        assert hooks_of(denoiser) == 5
        forward(denoiser)
    assert hooks_of(denoiser) == 0
    forward(denoiser)
    assert len(feature_maps) == 5
    with pytest.raises(ZeroDivisionError), record_feature_maps(denoiser):
        _ = 1 / 0
    assert hooks_of(denoiser) == 0


@torch.no_grad()
def test_the_encoder_alone_gives_the_stages_of_a_whole_pass():
    denoiser = make_denoiser("medium", image_size=28, image_channels=1, num_classes=2)
    decoded = []
    denoiser.up_blocks[0].register_forward_hook(lambda *_: decoded.append(True))
    with record_feature_maps(denoiser) as feature_maps:
        forward(denoiser)
    assert decoded == [True]
    alone = encoder_feature_maps(denoiser, noisy_images(denoiser), torch.tensor(10), torch.full((2,), 1))
    assert decoded == [True]
    assert len(alone) == len(feature_maps)
    assert all(torch.equal(a, b) for a, b in zip(alone, feature_maps, strict=True))
    assert hooks_of(denoiser) == 1, "the test's own"


@torch.no_grad()
def test_other_errors_of_the_encoder_are_not_swallowed():
    denoiser = make_denoiser("tiny", image_size=8, image_channels=1, num_classes=2)
    with pytest.raises(ValueError, match="class_labels"):
        encoder_feature_maps(denoiser, noisy_images(denoiser), torch.tensor(10), None)
    assert hooks_of(denoiser) == 0


def test_recording_changes_no_prediction():
    denoiser = make_denoiser("tiny", image_size=8, image_channels=1, num_classes=2)
    with torch.no_grad():
        alone = forward(denoiser)
        with record_feature_maps(denoiser):
            recorded = forward(denoiser)
    assert torch.equal(alone, recorded)


@pytest.mark.parametrize(("size", "image_size"), [("tiny", 9), ("small", 5), ("medium", 30), ("large", 6)])
def test_an_image_size_that_cannot_be_halved_is_refused(size, image_size, message_of):
    for message in (
        message_of(make_denoiser, size, image_size=image_size, image_channels=1, num_classes=2),
        message_of(encoder_shapes, size, image_size, 1),
    ):
        assert "data.image_size" in message
        assert f"got {image_size}" in message


@pytest.mark.parametrize(("size", "image_size"), [("tiny", 10), ("medium", 28)])
def test_an_image_size_that_can_be_halved_is_taken(size, image_size):
    denoiser = make_denoiser(size, image_size=image_size, image_channels=1, num_classes=2)
    with torch.no_grad():
        assert forward(denoiser).shape[-1] == image_size


def test_every_class_and_the_null_label_condition_the_prediction():
    denoiser = make_denoiser("tiny", image_size=8, image_channels=1, num_classes=2)
    with torch.no_grad():
        outputs = [forward(denoiser, label=label) for label in range(3)]
    assert not any(torch.equal(outputs[i], outputs[i - 1]) for i in range(3))
    with pytest.raises(IndexError):
        forward(denoiser, label=3)


def test_the_sampler_starts_at_the_noisiest_level_of_training_and_ends_at_the_image():
    training = make_training_scheduler("squaredcos_cap_v2")
    sampler = make_sampling_scheduler(training)
    sampler.set_timesteps(10)
    assert sampler.timesteps[0] == 999
    assert torch.equal(sampler.alphas_cumprod, training.alphas_cumprod)
    assert sampler.final_alpha_cumprod == 1
