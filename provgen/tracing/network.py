"""The trained networks as a posterior over training examples."""

from __future__ import annotations

import torch
from diffusers import ModelMixin
from torch import Tensor

from provgen.data.batches import Batch
from provgen.generators.observers import Observation, Observer
from provgen.models.provenance import ProvenanceNetwork, ProvenanceOutput


class NetworkPosterior:
    """p(i | query, y) by the provenance network, for any batch its generator can be run on."""

    def __init__(self, observer: Observer, network: ModelMixin, provenance: ProvenanceNetwork) -> None:
        self.observer = observer
        self.network = network
        self.provenance = provenance

    @torch.no_grad()
    def observe(self, batch: Batch) -> tuple[Observation, ProvenanceOutput]:
        """Run the generator, and the network on its feature maps."""
        observation = self.observer.observe(self.network, batch.to(self.provenance.device))
        return observation, self.provenance(
            observation.feature_maps,
            observation.alpha_bar,
            observation.class_labels,
            observation.class_logits,
        )

    @torch.no_grad()
    def index_logits(self, observation: Observation, beam: int | None = None) -> Tensor:
        """Give index logits (query, train) for what was observed, of the best `beam` cells only if given."""
        logits: Tensor = self.provenance.index_logits(
            observation.feature_maps,
            observation.alpha_bar,
            observation.class_labels,
            observation.class_logits,
            beam,
        )
        return logits
