"""Gradients of a denoiser's last layer, which a forward pass gives without a backward one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.nn import functional as F


@contextmanager
def record_features(unet: UNet2DModel) -> Iterator[list[Tensor]]:
    """Collect what the last layer is given in a forward pass, (batch, channel, height, width)."""
    features: list[Tensor] = []
    hook = unet.conv_out.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0]))
    try:
        yield features
    finally:
        hook.remove()


def last_layer_gradients(unet: UNet2DModel, features: Tensor, output: Tensor) -> Tensor:
    """Give the gradients of each output's mean square with respect to the last layer, (batch, parameter).

    Those of D-TRAK (Zheng et al. 2024, arXiv 2311.00500) at one level. A linear layer's gradient is the product of
    what goes in and the slope of the loss at what comes out, which here is the output itself.

    Args:
        unet: The denoiser.
        features: What its last layer was given.
        output: What it made of that, (batch, channel, height, width).
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
