"""The provenance network: which training example does a noisy image come from?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# ModelMixin must stand in this module's own namespace: `DiffusionPipeline.from_pretrained` looks it up here.
# `model_index.json` stores this module's path, so moving the module breaks saved pipelines.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from provgen.models import index_heads
from provgen.models.embedding import OwnEncoder, StageEmbedding


@dataclass
class ProvenanceOutput(BaseOutput):
    """Logits of the provenance network."""

    index_logits: Tensor
    """Logits of sources, (batch, train); examples that a class label rules out, or that are not covered, have the
    lowest finite value."""
    class_logits: Tensor | None = None
    """Logits of classes, (batch, class); None for a network without a class head."""


class ProvenanceNetwork(ModelMixin, ConfigMixin):
    """Index and class heads on the encoder feature maps of a generator (arXiv 2510.03361).

    Models p(i | x_t, t, y). A row that carries a class label is restricted to the examples of that class; a row
    with the null label, `num_classes`, ranges over all of them. The first `shared_stages` feature maps are the
    generator's, the others the network's own. The class head reads the last stage.
    """

    @register_to_config
    def __init__(
        self,
        *,
        stages: list[list[int]],
        shared_stages: int,
        head: dict[str, Any],
        num_examples: int,
        num_covered: int,
        num_classes: int,
        width: int = 64,
        has_class_head: bool = True,
        beam: int | None = None,  # noqa: ARG002 - register_to_config keeps it
        fingerprint: str = "",  # noqa: ARG002 - register_to_config keeps it
    ) -> None:
        """Build the heads.

        Args:
            stages: `[channels, height]` of the image and of every encoder stage of the generator.
            shared_stages: Feature maps read from the generator, 0 to all; the rest are built here.
            head: `kind`, the name of a class in `models/index_heads.py`, and its own arguments.
            num_examples: Training examples, in the order of the example index.
            num_covered: Those that the index head can name.
            num_classes: Classes without the null label; 0 for a set without labels.
            width: Embedding channels.
            has_class_head: Whether a class head is built; one that is not trained must not be.
            beam: Cells a two-stage head looks into while tracing; None looks into all.
            fingerprint: Fingerprint of the training set (`data/manifest.py`); the outputs mean nothing for another.
        """
        super().__init__()
        shapes = [(channels, size) for channels, size in stages]
        self.own_encoder = OwnEncoder(shapes, shared=shared_stages)
        arguments = {name: value for name, value in head.items() if name != "kind"}
        make_head = getattr(index_heads, head["kind"])
        self.index_head = make_head(shapes[1:], num_examples=num_covered, width=width, **arguments)
        self.class_head: nn.Module | None = None
        if has_class_head:
            self.class_head = nn.Sequential(
                StageEmbedding(shapes[-1:], width), nn.SiLU(), nn.Linear(width, num_classes)
            )
        self.example_labels: Tensor
        self.register_buffer("example_labels", torch.full((num_examples,), num_classes))
        self.covered: Tensor
        self.register_buffer("covered", torch.arange(num_covered))

    @torch.no_grad()
    def start(self, images: Tensor, labels: Tensor, covered: Tensor, *, at_images: bool = True) -> None:
        """Set everything that depends on the training set; arguments as in `models/index_heads.py`.

        `covered` are the examples that the index head can name, int64 (covered,), ascending.
        """
        self.example_labels.copy_(labels)
        self.covered.copy_(covered)
        self.index_head.start(images[covered], labels[covered], at_images=at_images)

    def forward(
        self, feature_maps: list[Tensor], alpha_bar: Tensor, class_labels: Tensor, class_logits: Tensor | None = None
    ) -> ProvenanceOutput:
        """Predict sources and class from the image and the generator's feature maps, (batch, channel, height, width).

        `alpha_bar` (batch,) are noise levels, `class_labels`, int64 (batch,), what the generator was given.
        `class_logits` (batch, class) are those of a generator that is a classifier; the network has no class head then.
        """
        # float32 under autocast too: a softmax over thousands of examples needs the digits.
        with torch.autocast(alpha_bar.device.type, enabled=False):
            read = self._read(feature_maps, alpha_bar)
            if self.class_head is not None:
                class_logits = self.class_head(read[-1:])
            index_logits = self._index_logits(read, alpha_bar, class_labels, class_logits, None)
        return ProvenanceOutput(index_logits=index_logits, class_logits=class_logits)

    def index_logits(
        self,
        feature_maps: list[Tensor],
        alpha_bar: Tensor,
        class_labels: Tensor,
        class_logits: Tensor | None = None,
        beam: int | None = None,
    ) -> Tensor:
        """Give the index logits (batch, train) alone, as traces need them; arguments as in `forward`."""
        with torch.autocast(alpha_bar.device.type, enabled=False):
            read = self._read(feature_maps, alpha_bar)
            return self._index_logits(read, alpha_bar, class_labels, class_logits, beam)

    def embed(self, feature_maps: list[Tensor], alpha_bar: Tensor) -> Tensor:
        """Give what the index head compares with its prototypes, (batch, width); arguments as in `forward`."""
        with torch.autocast(alpha_bar.device.type, enabled=False):
            embedding: Tensor = self.index_head.embedding(self._read(feature_maps, alpha_bar))
        return embedding

    def last_feature_map(self, feature_maps: list[Tensor], alpha_bar: Tensor) -> Tensor:
        """Give the last stage that the heads read, (batch, channel, height, width); arguments as in `forward`."""
        return self._read(feature_maps, alpha_bar)[-1]

    def ruled_out(self, class_labels: Tensor) -> Tensor:
        """Say which examples a class label excludes, bool (batch, train); the null label excludes none."""
        has_class = class_labels.ne(self.config.num_classes)
        return has_class[:, None] & (class_labels[:, None] != self.example_labels[None, :])

    def _read(self, feature_maps: list[Tensor], alpha_bar: Tensor) -> list[Tensor]:
        shared = [stage.to(self.dtype) for stage in feature_maps[: self.config.shared_stages + 1]]
        return list(self.own_encoder(shared, alpha_bar))

    def _index_logits(
        self, read: list[Tensor], alpha_bar: Tensor, class_labels: Tensor, class_logits: Tensor | None, beam: int | None
    ) -> Tensor:
        wide = torch.promote_types(read[0].dtype, torch.float32)
        searched = {} if beam is None else {"beam": beam}
        logits: Tensor = self.index_head(read, alpha_bar.to(wide), class_labels, class_logits, **searched)
        # Finite, so that 0 x log(0) in a cross-entropy is 0 and not NaN.
        lowest = torch.finfo(logits.dtype).min
        if len(self.covered) < len(self.example_labels):
            everywhere = logits.new_full((len(logits), len(self.example_labels)), lowest)
            logits = everywhere.index_copy(1, self.covered, logits)
        return logits.masked_fill(self.ruled_out(class_labels), lowest)
