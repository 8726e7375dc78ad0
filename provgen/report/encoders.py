"""Features that sets of images are compared by: pixels, the generator's own, a torchvision network's, or one's own."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from urllib.error import URLError

import torch
import torch.nn.functional as F
import torchvision.models
from torch import Tensor, nn

from provgen.data.images import to_unit_range
from provgen.errors import InputError
from provgen.pipeline import ProvenancePipeline

IMAGES_AT_ONCE = 256
"""Images that are encoded in one batch."""

LEAST_SIZE = 64
"""Height and width that smaller images are enlarged to for networks of larger ones."""

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and deviation of ImageNet's colours in [0, 1], which torchvision's networks expect."""

Encoder = Callable[[Tensor], Tensor]
"""Images in [-1, 1], (query, channel, height, width), to features, (query, feature)."""


def make_encoder(name: str, pipeline: ProvenancePipeline) -> Encoder:
    """Make an encoder by name.

    Args:
        name: `pixels`, `own` for the generator's last encoder stage, a torchvision classifier, or `module:function` for
            an `Encoder` that can be imported.
        pipeline: Pipeline of the run, whose generator encodes for `own`.

    Raises:
        InputError: The name is none of these, or the weights cannot be downloaded.
    """
    if name == "pixels":
        return lambda images: images.flatten(1)
    if name == "own":
        return lambda images: pipeline.generator.encode(images.to(pipeline.device))
    if ":" in name:
        return _imported(name)
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise InputError(
            "--features must be pixels, own, a torchvision classifier such as resnet18, or module:function, got "
            f"{name!r}"
        )
    try:
        network = torchvision.models.get_model(name, weights="DEFAULT")
    except (URLError, OSError) as error:
        raise InputError(f"the weights of {name} cannot be downloaded ({error}); try --features own") from error
    return classifier_encoder(network.to(pipeline.device), name)


def _imported(name: str) -> Encoder:
    try:
        function = pkgutil.resolve_name(name)
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(f"--features {name} cannot be imported ({error}); put its folder on PYTHONPATH") from error
    if not callable(function):
        raise InputError(f"--features {name} must be a function, from images to features")
    encoder: Encoder = function
    return encoder


def classifier_encoder(network: nn.Module, name: str) -> Encoder:
    """Make an encoder of the inputs of a classifier's last linear layer; grey images are given to all its colours.

    Raises:
        InputError: The network has no linear layer, or cannot read images as small.
    """
    layers = [layer for layer, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise InputError(f"{name} has no linear layer to take features from; try resnet18")
    parent, _, child = layers[-1].rpartition(".")
    setattr(network.get_submodule(parent), child, nn.Identity())
    network.eval().requires_grad_(requires_grad=False)
    device = next(network.parameters()).device
    mean, deviation = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))

    def encode(images: Tensor) -> Tensor:
        size = max(LEAST_SIZE, images.shape[-1])
        enlarged = F.interpolate(images.to(device), size=(size, size), mode="bilinear", antialias=True)
        features: Tensor = network(((enlarged + 1) / 2 - mean) / deviation).flatten(1)
        return features

    try:
        encode(torch.zeros(1, 3, LEAST_SIZE, LEAST_SIZE))
    except (AssertionError, RuntimeError) as error:
        raise InputError(f"{name} cannot read images of {LEAST_SIZE}x{LEAST_SIZE}; try resnet18") from error
    return encode


@torch.no_grad()
def features_of(images: Tensor, encoder: Encoder) -> Tensor:
    """Encode uint8 images (query, channel, height, width) in batches: float (query, feature) on the CPU.

    Raises:
        InputError: The encoder gives something else.
    """
    encoded = [encoder(to_unit_range(batch)) for batch in images.split(IMAGES_AT_ONCE)]
    if bad := [features for features in encoded if not isinstance(features, Tensor) or features.ndim != 2]:
        shape = tuple(getattr(bad[0], "shape", ()))
        raise InputError(f"an encoder must give a tensor (query, feature), got {type(bad[0]).__name__} {shape}")
    return torch.cat([features.float().cpu() for features in encoded])
