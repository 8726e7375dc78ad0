"""The autoencoder: small variational autoencoders by size name, with the encoder feature maps of what they decode."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

# ModelMixin must stand in this module's own namespace: see models/provenance.py.
from diffusers import AutoencoderKL, ModelMixin  # noqa: F401
from torch import Tensor, nn

from provgen.models.diffusion import DENOISER_SIZES, encoder_shapes

LATENT_CHANNELS = 16
"""Length of a latent. More than the divergence leaves in use: the others return to the prior."""


class VaeOutput(NamedTuple):
    """Everything that one training step needs to know.

    A tuple, because Accelerate rebuilds outputs under mixed precision, and can do so to a diffusers output only
    if all fields but the first may be missing.
    """

    mean: Tensor
    """Mean of q(z | image), (batch, latent channel, 1, 1)."""
    log_variance: Tensor
    """Log-variance of q(z | image) in nats, same shape, clamped to [-30, 20]."""
    latents: Tensor
    """Draws from q(z | image), same shape."""
    reconstruction: Tensor
    """Pixels decoded from `latents`, (batch, channel, height, width), not clamped."""
    feature_maps: list[Tensor]
    """The reconstruction, detached, and the encoder's feature maps on it; empty where none were wanted."""


class ImageVae(AutoencoderKL):
    """An AutoencoderKL whose latent is one vector for the whole image.

    The stock latent is a grid of independent normal variables, one for each patch, and nothing makes the patches of
    a sample from the prior fit together. Here the two 1x1 convolutions around the latent span the whole grid.
    Arguments and config are AutoencoderKL's; its weights are not interchangeable.
    """

    # diffusers reads the names of the arguments off this signature when it loads a model.
    @functools.wraps(AutoencoderKL.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        channels = self.config.latent_channels
        grid = self.config.sample_size // 2 ** (len(self.config.block_out_channels) - 1)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, grid)
        self.post_quant_conv = nn.ConvTranspose2d(channels, channels, grid)

    def forward(self, images: Tensor, noise: Tensor, *, with_feature_maps: bool = True) -> VaeOutput:
        """Encode images (batch, channel, height, width) in [-1, 1], draw a latent, decode, and encode what was decoded.

        The feature maps see the reconstruction without its history: what is learned on them never teaches the decoder
        to hide a message in the image. `noise` is standard normal, (batch, *latent_shape(vae)).
        """
        latent = self.encode(images).latent_dist
        latents = latent.mean + latent.std * noise
        reconstruction = self.decode(latents).sample
        return VaeOutput(
            mean=latent.mean,
            log_variance=latent.logvar,
            latents=latents,
            reconstruction=reconstruction,
            feature_maps=self.feature_maps_of(reconstruction.detach()) if with_feature_maps else [],
        )

    def feature_maps_of(self, images: Tensor) -> list[Tensor]:
        """Give images (batch, channel, height, width) and their feature maps, in the order of `encoder_shapes`."""
        hidden = self.encoder.conv_in(images)
        feature_maps = [images, hidden]
        for block in self.encoder.down_blocks:
            # The last residual layer is the stage, as in a denoiser, and not what is left of it after halving.
            for layer in block.resnets:
                hidden = layer(hidden, None)
            feature_maps.append(hidden)
            for halve in block.downsamplers or ():
                hidden = halve(hidden)
        return [*feature_maps, self.encoder.mid_block(hidden)]


def make_vae(size: str, *, image_size: int, image_channels: int) -> ImageVae:
    """Make an autoencoder of the denoiser's channels, convolutions only; `image_size` as in `encoder_shapes`."""
    encoder_shapes(size, image_size, image_channels)  # refuses an impossible image size
    shape = DENOISER_SIZES[size]
    blocks = len(shape.channels)
    vae: ImageVae = ImageVae(
        sample_size=image_size,
        in_channels=image_channels,
        out_channels=image_channels,
        block_out_channels=shape.channels,
        layers_per_block=shape.layers,
        norm_num_groups=shape.groups,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=LATENT_CHANNELS,
        mid_block_add_attention=False,
    )
    return vae


def latent_shape(vae: ImageVae) -> tuple[int, int, int]:
    """Give `(channel, height, width)` of one latent."""
    return (vae.config.latent_channels, 1, 1)
