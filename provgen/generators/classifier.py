"""The paper's own system, without any generator: a classifier of clean images, whose images come from outside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from provgen.data.batches import Batch
from provgen.errors import InputError
from provgen.generators.protocol import Generator, Output, Step
from provgen.models.classifier import CLEAN_ALPHA_BAR


@dataclass(frozen=True, kw_only=True)
class ClassifierGenerator(Generator):
    """A classifier of clean images; its steps are one, the image as it is."""

    network: Any
    """ImageClassifier, wrapped by Accelerate or not."""
    image_shape: tuple[int, ...]
    """Shape of an image."""
    class_loss_weight: float = 1.0
    """Weight of the class cross-entropy, in training."""

    name: ClassVar[str] = "classifier"
    loss_name: ClassVar[str] = "class_loss"
    loss_text: ClassVar[str] = "Cross-entropy of the class (nats), times its weight"
    can_sample: ClassVar[bool] = False
    reads_noise: ClassVar[bool] = False

    @property
    def components(self) -> dict[str, Any]:
        """Parts of a pipeline, by their names in it."""
        return {"classifier": self.network}

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of an image; batches hold noise for every kind."""
        return self.image_shape

    def forward(self, batch: Batch, *, with_feature_maps: bool = True) -> Output:  # noqa: ARG002 - they cost nothing
        """Predict the class of the clean images; images without a class have no loss."""
        output = self.network(batch.clean_images)
        # Zero, but of every weight: processes that train together wait for the gradient of each.
        loss = 0 * output.feature_maps[-1].flatten(1).sum(dim=1)
        parts = {}
        if output.class_logits is not None:
            parts["class_loss"] = _class_losses(output.class_logits, batch.clean_labels)
            loss = self.class_loss_weight * parts["class_loss"]
        return Output(
            loss=loss,
            parts=parts,
            feature_maps=output.feature_maps,
            alpha_bar=batch.clean_images.new_full((len(batch.indices),), CLEAN_ALPHA_BAR),
            class_labels=batch.labels,
            query=batch.clean_images,
            class_logits=output.class_logits,
        )

    def sample(
        self,
        class_labels: Tensor,
        *,
        null_label: int,  # noqa: ARG002 - see DiffusionGenerator
        generator: torch.Generator | list[torch.Generator] | None,  # noqa: ARG002
        num_inference_steps: int,  # noqa: ARG002
        guidance_scale: float,  # noqa: ARG002
    ) -> Iterator[Step]:
        """Refuse: there is no generator.

        Raises:
            InputError: Always.
        """
        raise no_generator(len(class_labels))

    @torch.no_grad()
    def renoise(
        self,
        images: Tensor,
        class_labels: Tensor,
        *,
        num_inference_steps: int,  # noqa: ARG002 - see DiffusionGenerator
        seed: int,  # noqa: ARG002
    ) -> Iterator[Step]:
        """Show the images as they are, in one step."""
        output = self.network(images)
        yield Step(
            number=0,
            timestep=0,
            alpha_bar=images.new_tensor(CLEAN_ALPHA_BAR),
            query=images,
            class_labels=class_labels,
            encode=lambda: list(output.feature_maps),
            predict=lambda: images,
            class_logits=output.class_logits,
        )

    def encode(self, images: Tensor) -> Tensor:
        """Give the last feature map of images in [-1, 1], flattened, (query, feature)."""
        feature_maps: list[Tensor] = self.network(images).feature_maps
        return feature_maps[-1].flatten(1)


def no_generator(count: int) -> InputError:
    """Say why `count` images cannot be generated."""
    return InputError(
        f"cannot generate {count} images: this run has generator.kind=none; "
        "trace images with `provgen attribute`, or train with generator.kind=diffusion"
    )


def _class_losses(class_logits: Tensor, labels: Tensor) -> Tensor:
    has_class = labels < class_logits.shape[1]
    losses = F.cross_entropy(class_logits, labels.clamp_max(class_logits.shape[1] - 1), reduction="none")
    return losses * has_class
