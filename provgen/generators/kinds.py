"""What differs between the kinds of generators: network, forward pass, feature maps, and closed form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from diffusers import DDPMScheduler, ModelMixin, UNet2DModel
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.generators.closed_form import ClosedFormPosterior, LatentPosterior, Posterior
from provgen.generators.observers import ClassifierObserver, DiffusionObserver, Observer, VaeObserver
from provgen.models.classifier import ImageClassifier
from provgen.models.diffusion import encoder_shapes, make_denoiser, make_training_scheduler
from provgen.models.vae import LATENT_CHANNELS, ImageVae, make_vae
from provgen.settings import Settings


class Kind(ABC):
    """One kind of generator with its settings; where kinds agree, they take what stands here."""

    def __init__(self, settings: Settings, train: ImageSet) -> None:
        self.settings = settings
        self.channels, self.image_size = train.images.shape[1:3]
        self.num_classes = train.num_classes

    @property
    def label_dropout(self) -> float:
        """Share of rows whose label the generator is not told; all, unless it can be told."""
        return 1.0

    @abstractmethod
    def make_network(self) -> ModelMixin:
        """Make the generator's network, randomly initialised."""

    @abstractmethod
    def make_observer(self, device: torch.device) -> Observer:
        """Make the forward pass that training and evaluation share."""

    def shapes(self) -> list[tuple[int, int]]:
        """List `(channels, height)` of the image and of every encoder stage."""
        return encoder_shapes(self.settings.generator.size, self.image_size, self.channels)

    def noise_shape(self) -> tuple[int, ...]:
        """Give the shape of the noise of one image."""
        return (self.channels, self.image_size, self.image_size)

    def timesteps(self, levels: Sequence[float]) -> list[int]:  # noqa: ARG002 - see DiffusionKind
        """Give the timesteps nearest to values of alpha_bar; without noise levels there is one, 0."""
        return [0]

    def closed_form(
        self,
        network: ModelMixin,  # noqa: ARG002 - see VaeKind
        train: ImageSet,
        *,
        dtype: torch.dtype,
        device: torch.device,
        covered: Tensor | None = None,
    ) -> Posterior:
        """Make the exact posterior over the training images, or over those that are `covered`, bool (train,)."""
        images = to_unit_range(train.images, dtype).to(device)
        labels = train.labels.to(device)
        mask = None if covered is None else covered.to(device)
        return ClosedFormPosterior(images, labels, null_label=train.num_classes, covered=mask)


def make_kind(settings: Settings, train: ImageSet) -> Kind:
    """Choose by `generator.kind`."""
    kinds: dict[str, type[Kind]] = {"diffusion": DiffusionKind, "vae": VaeKind, "none": ClassifierKind}
    return kinds[settings.generator.kind](settings, train)


class DiffusionKind(Kind):
    """A denoiser of noised images."""

    @property
    def label_dropout(self) -> float:
        """Share of rows whose label the denoiser is not told."""
        return self.settings.generator.label_dropout

    @property
    def noise_scheduler(self) -> DDPMScheduler:
        """The forward process."""
        return make_training_scheduler(self.settings.generator.beta_schedule)

    def make_network(self) -> UNet2DModel:
        """Make the denoiser."""
        return make_denoiser(
            self.settings.generator.size,
            image_size=self.image_size,
            image_channels=self.channels,
            num_classes=self.num_classes,
        )

    def make_observer(self, device: torch.device) -> Observer:
        """Make the forward pass on noised images."""
        return DiffusionObserver(self.noise_scheduler, device)

    def timesteps(self, levels: Sequence[float]) -> list[int]:
        """Give the timesteps nearest to values of alpha_bar."""
        alpha_bar = self.noise_scheduler.alphas_cumprod
        return [int((alpha_bar - level).abs().argmin()) for level in levels]


class VaeKind(Kind):
    """An autoencoder whose latents are sampled from the prior."""

    def make_network(self) -> ImageVae:
        """Make the autoencoder."""
        return make_vae(self.settings.generator.size, image_size=self.image_size, image_channels=self.channels)

    def make_observer(self, device: torch.device) -> Observer:  # noqa: ARG002 - Kind
        """Make the forward pass on clean images."""
        return VaeObserver(self.settings.generator.kl_weight)

    def noise_shape(self) -> tuple[int, ...]:
        """Give the shape of a latent."""
        return (LATENT_CHANNELS, 1, 1)

    def closed_form(
        self,
        network: ModelMixin,
        train: ImageSet,
        *,
        dtype: torch.dtype,
        device: torch.device,
        covered: Tensor | None = None,
    ) -> Posterior:
        """Make the posterior over training images given a latent, by the encoder as it stands."""
        assert isinstance(network, ImageVae)
        return LatentPosterior.of(
            network,
            to_unit_range(train.images),
            train.labels,
            null_label=train.num_classes,
            covered=covered,
            dtype=dtype,
            device=device,
        )


class ClassifierKind(Kind):
    """A classifier of clean images, without any generator."""

    def make_network(self) -> ImageClassifier:
        """Make the classifier."""
        chosen = self.settings.provenance
        # The two-branch head needs p(y) even where no class loss is wanted.
        has_classes = chosen.class_loss_weight > 0 or chosen.index_head == "class_conditional"
        shapes = [list(shape) for shape in self.shapes()]
        classifier: ImageClassifier = ImageClassifier(stages=shapes, num_classes=self.num_classes * has_classes)
        return classifier

    def make_observer(self, device: torch.device) -> Observer:  # noqa: ARG002 - Kind
        """Make the forward pass on clean images."""
        return ClassifierObserver(self.settings.provenance.class_loss_weight)
