"""The denoiser: small class-conditional UNets by size name, the feature maps others may read, and its last layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.models.unets.unet_2d_blocks import DownBlock2D
from torch import Tensor, nn
from torch.nn import functional as F

from provgen.errors import InputError


@dataclass(frozen=True)
class DenoiserSize:
    """Channels of each down block, residual layers in each, and groups of group normalisation."""

    channels: tuple[int, ...]
    layers: int
    groups: int


NUM_TRAIN_TIMESTEPS = 1000
"""Noise levels of the forward process. Not a setting: the schedules' betas are made for this number."""
DENOISER_SIZES = {
    "tiny": DenoiserSize(channels=(8, 16), layers=1, groups=4),
    "small": DenoiserSize(channels=(16, 32), layers=1, groups=4),
    "medium": DenoiserSize(channels=(32, 64, 64), layers=1, groups=8),
    "large": DenoiserSize(channels=(64, 128, 128), layers=2, groups=16),
}


def make_denoiser(size: str, *, image_size: int, image_channels: int, num_classes: int) -> UNet2DModel:
    """Make a UNet; class `num_classes` is the null label, `image_size` as in `encoder_shapes`.

    Convolutions only: at these sizes the receptive field covers the image, and attention would make one
    process and several differ by more than rounding.
    """
    encoder_shapes(size, image_size, image_channels)  # refuses an impossible image size
    shape = DENOISER_SIZES[size]
    blocks = len(shape.channels)
    return UNet2DModel(
        sample_size=image_size,
        in_channels=image_channels,
        out_channels=image_channels,
        block_out_channels=shape.channels,
        layers_per_block=shape.layers,
        norm_num_groups=shape.groups,
        down_block_types=("DownBlock2D",) * blocks,
        up_block_types=("UpBlock2D",) * blocks,
        add_attention=False,
        num_class_embeds=num_classes + 1,
    )


def make_training_scheduler(beta_schedule: str, prediction: str = "epsilon") -> DDPMScheduler:
    """Make the forward process, and say what the denoiser predicts of it; both by their diffusers names."""
    return DDPMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS, beta_schedule=beta_schedule, prediction_type=prediction
    )


def make_sampling_scheduler(training_scheduler: DDPMScheduler) -> DDIMScheduler:
    """Make the deterministic sampler of the same noise levels; it starts at the noisiest one."""
    return DDIMScheduler.from_config(
        training_scheduler.config, clip_sample=True, timestep_spacing="trailing", set_alpha_to_one=True
    )


def denoiser_target(
    scheduler: DDPMScheduler | DDIMScheduler, images: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """Give what a denoiser learns to predict, (batch, channel, height, width).

    That is the noise e, or the velocity sqrt(a) e - sqrt(1 - a) x of images x (Salimans and Ho 2022, arXiv 2202.00512),
    in which noise is told apart from images at every level alike.
    """
    if scheduler.config.prediction_type == "epsilon":
        return noise
    velocity: Tensor = scheduler.get_velocity(images, noise, timesteps)
    return velocity


def denoised(
    scheduler: DDPMScheduler | DDIMScheduler, noisy: Tensor, output: Tensor, alpha_bar: Tensor
) -> tuple[Tensor, Tensor]:
    """Give the image and the noise that a denoiser's output means, each as `noisy` (query, channel, height, width).

    Noise levels `alpha_bar` are a scalar or (query, 1, 1, 1).
    """
    kept, lost = alpha_bar.to(noisy).sqrt(), (1 - alpha_bar.to(noisy)).sqrt()
    if scheduler.config.prediction_type == "epsilon":
        return (noisy - lost * output) / kept, output
    return kept * noisy - lost * output, lost * noisy + kept * output


def encoder_shapes(size: str, image_size: int, image_channels: int) -> list[tuple[int, int]]:
    """List `(channels, height)` of the image and of every encoder stage: stem, each down block, middle block.

    Raises:
        InputError: `image_size` cannot be halved once per down block.
    """
    channels = DENOISER_SIZES[size].channels
    multiple = 2 ** (len(channels) - 1)
    if image_size % multiple:
        raise InputError(
            f"data.image_size must be a multiple of {multiple} for generator.size={size}, got {image_size}"
        )
    down = [(width, image_size // 2**depth) for depth, width in enumerate(channels)]
    return [(image_channels, image_size), (channels[0], image_size), *down, down[-1]]


@contextmanager
def record_feature_maps(denoiser: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the noisy image and the encoder feature maps of the forward pass inside, as `encoder_shapes` orders them.

    They are (batch, channel, height, width). `denoiser` is a UNet2DModel, wrapped by Accelerate or not.
    """
    unet = extract_model_from_parallel(denoiser)
    assert isinstance(unet, UNet2DModel)
    feature_maps: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        feature_maps.append(output)

    def keep_stage(block: DownBlock2D, _inputs: object, output: tuple[Tensor, tuple[Tensor, ...]]) -> None:
        # A down block returns (downsampled, all its residual outputs); the last residual layer is the stage.
        feature_maps.append(output[1][len(block.resnets) - 1])

    with ExitStack() as hooks:
        hooks.enter_context(unet.conv_in.register_forward_pre_hook(lambda _m, inputs: feature_maps.append(inputs[0])))
        hooks.enter_context(unet.conv_in.register_forward_hook(keep))
        for block in unet.down_blocks:
            hooks.enter_context(block.register_forward_hook(keep_stage))
        hooks.enter_context(unet.mid_block.register_forward_hook(keep))
        yield feature_maps


def encoder_feature_maps(unet: UNet2DModel, images: Tensor, timestep: Tensor, class_labels: Tensor) -> list[Tensor]:
    """Give what `record_feature_maps` collects, without the decoder, which is more than half of a forward pass.

    Images are noisy, (batch, channel, height, width), `timestep` an int64 scalar or (batch,), labels int64 (batch,).
    """

    def stop(_module: nn.Module, _inputs: object) -> None:
        raise _EncoderDone

    stops = unet.up_blocks[0].register_forward_pre_hook(stop)
    with stops, record_feature_maps(unet) as feature_maps, suppress(_EncoderDone):
        unet(images, timestep, class_labels=class_labels)
    return feature_maps


class _EncoderDone(Exception):  # noqa: N818 - a signal, not an error
    """The decoder would be next."""


@contextmanager
def record_features(unet: UNet2DModel) -> Iterator[list[Tensor]]:
    """Collect what the last layer is given in a forward pass, (batch, channel, height, width)."""
    features: list[Tensor] = []
    with unet.conv_out.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0])):
        yield features


def last_layer_gradients(unet: UNet2DModel, features: Tensor, output: Tensor) -> Tensor:
    """Give the gradients of each output's mean square with respect to the last layer, (batch, parameter).

    Those of D-TRAK (Zheng et al. 2024, arXiv 2311.00500) at one level. A linear layer's gradient is the product of what
    goes in, `features`, and the slope of the loss at `output`, both (batch, channel, height, width).
    """
    last = unet.conv_out
    slopes = 2 * output / output[0].numel()
    # Slopes around every pixel instead of features around every pixel: fewer numbers to copy, and kernels turn around.
    height, width = (size - 1 - int(pad) for size, pad in zip(last.kernel_size, last.padding, strict=True))
    around = F.unfold(slopes, last.kernel_size, padding=(height, width)).unflatten(1, (slopes.shape[1], -1))
    weights = torch.einsum("bokp,bip->boik", around.flip(2), features.flatten(2)).flatten(1)
    return torch.cat([weights, slopes.sum(dim=(2, 3))], dim=1)


def num_last_layer(unet: UNet2DModel) -> int:
    """Count the parameters of the last layer."""
    return sum(parameter.numel() for parameter in unet.conv_out.parameters())
