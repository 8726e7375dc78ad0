"""The paper's own system: a convolutional classifier of clean images, whose feature maps a provenance network reads."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import ConfigMixin, ModelMixin  # ModelMixin in this namespace: see models/provenance.py
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from provgen.models.embedding import OwnEncoder

CLEAN_ALPHA_BAR = 0.9999
"""alpha_bar that stands for "no noise": the closed form at this level names exact copies and nothing else."""


@dataclass
class ClassifierOutput(BaseOutput):
    """Feature maps and class of a batch of images."""

    feature_maps: list[Tensor]
    """The image, then every stage, (batch, channel, height, width) each."""
    class_logits: Tensor | None = None
    """(batch, class); None without a class head."""


class ImageClassifier(ModelMixin, ConfigMixin):
    """A convolutional encoder and, where there are classes to learn, a linear class head on its last stage."""

    @register_to_config
    def __init__(self, *, stages: list[list[int]], num_classes: int) -> None:
        """Build the encoder from `[channels, height]` of the image and of every stage; 0 classes, no class head."""
        super().__init__()
        shapes = [(channels, size) for channels, size in stages]
        self.encoder = OwnEncoder(shapes, shared=0, reads_level=False)
        channels, size = shapes[-1]
        self.class_head = nn.Linear(channels * size**2, num_classes) if num_classes else None

    def forward(self, images: Tensor) -> ClassifierOutput:
        """Encode images (batch, channel, height, width) in [-1, 1]."""
        feature_maps = [images, *self.encoder([images], images.new_ones(len(images)))]
        class_logits = None if self.class_head is None else self.class_head(feature_maps[-1].flatten(1))
        return ClassifierOutput(feature_maps=feature_maps, class_logits=class_logits)
