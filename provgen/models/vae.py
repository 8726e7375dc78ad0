"""The autoencoder: diffusers' AutoencoderKL in small sizes, with one global latent vector per image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from typing import Any

from diffusers import AutoencoderKL, ModelMixin  # noqa: F401 - looked up here: see models/provenance.py
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from provgen.models.diffusion import DENOISER_SIZES, encoder_shapes

LATENT_CHANNELS = 16
"""Numbers in a latent. A latent per position reconstructs better, but its prior knows nothing of how positions
belong together, and samples are then no images."""


@dataclass
class VaeOutput(BaseOutput):
    """One forward pass: encode, sample, decode, and encode what was decoded."""

    mean: Tensor
    """Of the latent's Gaussian, (batch, latent, 1, 1)."""
    log_variance: Tensor
    """In nats, same shape."""
    latents: Tensor
    """Sampled, same shape."""
    reconstruction: Tensor
    """(batch, channel, height, width)."""
    stages: list[Tensor]
    """The reconstruction, then the encoder's stages on it, (batch, channel, height, width) each; empty if not
    asked for."""


class ImageVae(AutoencoderKL):
    """AutoencoderKL whose latent is a vector: the quantisation layers reach over the whole grid."""

    @wraps(AutoencoderKL.__init__)  # the same arguments, as the saved configuration is read by them
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        latent, blocks = self.config.latent_channels, len(self.config.block_out_channels)
        grid = self.config.sample_size // 2 ** (blocks - 1)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, grid)
        self.post_quant_conv = nn.ConvTranspose2d(latent, latent, grid)

    def forward(self, images: Tensor, noise: Tensor, *, with_stages: bool = True) -> VaeOutput:
        """Do all that a training step needs in one call, as distributed training wants it.

        Args:
            images: In [-1, 1], (batch, channel, height, width).
            noise: Standard normal, (batch, latent, 1, 1).
            with_stages: Whether the reconstruction is encoded again. It is detached first: a loss on the stages
                trains the encoder, and cannot teach the decoder to hide marks in the images.
        """
        latent = self.encode(images).latent_dist
        latents = latent.mean + latent.std * noise
        reconstruction = self.decode(latents).sample
        return VaeOutput(
            mean=latent.mean,
            log_variance=latent.logvar,
            latents=latents,
            reconstruction=reconstruction,
            stages=self.stages_of(reconstruction.detach()) if with_stages else [],
        )

    def stages_of(self, images: Tensor) -> list[Tensor]:
        """Give images (batch, channel, height, width) and the encoder's stages on them, as `vae_stage_shapes` lists."""
        encoder = self.encoder
        stages = [images, encoder.conv_in(images)]
        sample = stages[-1]
        for block in encoder.down_blocks:
            for layer in block.resnets:
                sample = layer(sample, temb=None)
            stages.append(sample)
            for layer in block.downsamplers or []:
                sample = layer(sample)
        stages.append(encoder.mid_block(sample))
        return stages


def make_vae(size: str, *, image_size: int, image_channels: int) -> ImageVae:
    """Make an autoencoder with the channels of the denoiser of that size.

    Raises:
        InputError: `image_size` cannot be halved once per down block.
    """
    encoder_shapes(size, image_size, image_channels)  # refuses an impossible image size
    shape = DENOISER_SIZES[size]
    blocks = len(shape.channels)
    return ImageVae(
        in_channels=image_channels,
        out_channels=image_channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=shape.channels,
        layers_per_block=shape.layers,
        norm_num_groups=shape.groups,
        latent_channels=LATENT_CHANNELS,
        sample_size=image_size,
        mid_block_add_attention=False,
    )


def latent_shape(vae: ImageVae) -> tuple[int, int, int]:
    """Give the shape of one latent."""
    return (vae.config.latent_channels, 1, 1)
