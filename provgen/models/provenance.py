"""The provenance network: which training example does a noisy image come from?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# ModelMixin must stand in this module's own namespace: `DiffusionPipeline.from_pretrained` looks it up here.
# `model_index.json` stores this module's path, so moving the module breaks saved pipelines.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from provgen.models.index_heads import ClassIndependentHead, StageEmbedding


@dataclass
class ProvenanceOutput(BaseOutput):
    """Logits of the provenance network."""

    index_logits: Tensor
    """(batch, train); examples that a given class label rules out have the lowest finite value."""
    class_logits: Tensor | None = None
    """(batch, class); None for a network without a class head."""


class ProvenanceNetwork(ModelMixin, ConfigMixin):
    """Index and class heads on the encoder stages of a denoiser (arXiv 2510.03361).

    Models p(i | x_t, t, y). A row that carries a class label is restricted to the examples of that class; a row
    with the null label, `num_classes`, ranges over all of them. The class head reads the last shared stage.
    """

    @register_to_config
    def __init__(
        self,
        *,
        stages: list[list[int]],
        num_examples: int,
        num_classes: int,
        width: int = 64,
        has_class_head: bool = True,
        fingerprint: str = "",  # noqa: ARG002 - register_to_config keeps it
    ) -> None:
        """Build the heads.

        Args:
            stages: `[channels, height]` of every encoder stage read, from the stem on.
            num_examples: Training examples, in the order of the example index.
            num_classes: Classes without the null label; 0 for a set without labels.
            width: Embedding channels.
            has_class_head: Whether a class head is built; one that is not trained must not be.
            fingerprint: Of the training set (`data/manifest.py`); the outputs mean nothing for another.
        """
        super().__init__()
        shapes = [(channels, size) for channels, size in stages]
        self.index_head = ClassIndependentHead(shapes, num_examples=num_examples, width=width)
        self.class_head: nn.Module | None = None
        if has_class_head:
            self.class_head = nn.Sequential(
                StageEmbedding(shapes[-1:], width), nn.SiLU(), nn.Linear(width, num_classes)
            )
        self.example_labels: Tensor
        self.register_buffer("example_labels", torch.full((num_examples,), num_classes))

    def forward(self, stages: list[Tensor], signal: Tensor, class_labels: Tensor) -> ProvenanceOutput:
        """Predict sources and class from one forward pass of the denoiser.

        Args:
            stages: What `record_stages` collected, each (batch, channel, height, width); later stages than the
                network was built for are ignored.
            signal: a_t, the cumulative alpha of each row's noise level, (batch,).
            class_labels: int64 (batch,); `num_classes` is the null label.
        """
        class_logits = None
        if self.class_head is not None:
            with torch.autocast(signal.device.type, enabled=False):
                class_logits = self.class_head(self._shared(stages)[-1:])
        return ProvenanceOutput(
            index_logits=self.index_logits(stages, signal, class_labels), class_logits=class_logits
        )

    def index_logits(self, stages: list[Tensor], signal: Tensor, class_labels: Tensor) -> Tensor:
        """Give the index logits (batch, train) alone; arguments as in `forward`."""
        # float32 under autocast too: a softmax over thousands of examples needs the digits.
        with torch.autocast(signal.device.type, enabled=False):
            shared = self._shared(stages)
            wide = torch.promote_types(shared[0].dtype, torch.float32)
            logits: Tensor = self.index_head(shared, signal.to(wide))
        # Finite, so that 0 x log(0) in a cross-entropy is 0 and not NaN.
        return logits.masked_fill_(self.ruled_out(class_labels), torch.finfo(logits.dtype).min)

    def _shared(self, stages: list[Tensor]) -> list[Tensor]:
        dtype = self.index_head.bias.dtype
        return [stage.to(dtype) for stage in stages[: len(self.config.stages)]]

    def ruled_out(self, class_labels: Tensor) -> Tensor:
        """Say which examples a class label excludes, bool (batch, train); the null label excludes none."""
        is_null = class_labels.eq(self.config.num_classes)
        return ~is_null[:, None] & (class_labels[:, None] != self.example_labels[None, :])
