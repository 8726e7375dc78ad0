"""What every kind of generator offers: a training pass, sampling step by step, and noising images again.

A kind is one file beside this one. `tracing.trace` folds over the steps of any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from provgen.data.batches import Batch
from provgen.data.dataset import ImageSet
from provgen.generators.closed_form import Posterior, image_posterior
from provgen.models.classifier import CLEAN_ALPHA_BAR


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one training pass of a generator gives."""

    loss: Tensor
    """The generator's own loss of every row, (batch,)."""
    parts: dict[str, Tensor]
    """Parts of that loss by the name they are logged under, (batch,) each."""
    feature_maps: list[Tensor]
    """The image and the output of every encoder stage, (batch, channel, height, width) each."""
    alpha_bar: Tensor
    """Cumulative alpha of every row, (batch,); `CLEAN_ALPHA_BAR` where no noise was added."""
    class_labels: Tensor
    """Labels the generator was given, int64 (batch,); the null label for none."""
    query: Tensor
    """Input of the closed form, (batch, ...): the noisy image, the latent or the image."""
    class_logits: Tensor | None = None
    """Class logits of a generator that is a classifier, (batch, class)."""


class LastLayer(NamedTuple):
    """The last layer of a denoiser in one pass."""

    inputs: Tensor
    """Features before it, (query, channel, height, width)."""
    output: Tensor
    """Predicted noise or velocity, without guidance, (query, channel, height, width)."""


@dataclass(kw_only=True)
class Step:
    """One step of sampling, or one noise level of an image from outside; what costs a pass is made when it is read."""

    number: int
    """Place in the run, from 0."""
    timestep: int
    """Training timestep; 0 for a generator without noise levels."""
    alpha_bar: Tensor
    """Cumulative alpha, a scalar."""
    query: Tensor
    """Input of the closed form, (query, ...): the noisy image, the latent or the image."""
    class_labels: Tensor
    """Labels the generator is given, int64 (query,); the null label for none."""
    encode: Callable[[], list[Tensor]]
    """Gives `feature_maps`."""
    predict: Callable[[], Tensor]
    """Gives `predicted_image`."""
    decode: Callable[[], LastLayer] | None = None
    """Gives `last_layer`; None for a generator without one."""
    images: Tensor | None = None
    """Images after the step, in [-1, 1] up to rounding; None where nothing is sampled."""
    class_logits: Tensor | None = None
    """Class logits of a generator that is a classifier, (query, class)."""

    @cached_property
    def feature_maps(self) -> list[Tensor]:
        """The image and the output of every encoder stage, (query, channel, height, width) each."""
        return self.encode()

    @cached_property
    def predicted_image(self) -> Tensor:
        """The finished image as far as the generator knows it by now, in [-1, 1], (query, channel, height, width).

        A denoiser's prediction, an autoencoder's decoded image; without a generator, the image itself.
        """
        return self.predict()

    @cached_property
    def last_layer(self) -> LastLayer:
        """The last layer of the pass."""
        assert self.decode is not None, "this generator has no last layer that is looked at"
        return self.decode()

    @property
    def alpha_bars(self) -> Tensor:
        """`alpha_bar` for every query, (query,)."""
        return self.alpha_bar.to(self.query.device).expand(len(self.query))


class Generator(Protocol):
    """One kind of generator with its network; what is written out here holds for kinds without noise levels."""

    network: Any
    """Network, wrapped by Accelerate or not."""
    name: ClassVar[str]
    """Name of the network in checkpoints and logs."""
    loss_name: ClassVar[str]
    """Name of the loss in reports."""
    loss_text: ClassVar[str]
    """Description of the loss in reports."""
    can_sample: ClassVar[bool] = True
    """Whether it generates images at all."""
    is_class_conditional: ClassVar[bool] = False
    """Whether it can be given a class label."""
    has_noise_levels: ClassVar[bool] = False
    """Whether its steps are noise levels of one trajectory."""
    reads_noise: ClassVar[bool] = True
    """Whether its loss depends on noise."""

    @property
    def components(self) -> dict[str, Any]:
        """Parts of a pipeline, by their names in it."""
        ...

    def with_network(self, network: nn.Module) -> Self:
        """Give the same generator with another network, such as one with averaged weights."""
        return replace(self, network=network)  # type: ignore[type-var]  # every kind is a dataclass

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise of one image."""
        ...

    def draw_noise(self, generator: torch.Generator | list[torch.Generator] | None, *batch: int) -> Tensor:
        """Draw the noise of one image, or of a batch of as many, by `generator` as in `sample`, (batch, ...)."""
        shape = (*batch, *self.noise_shape)
        device, dtype = self.network.device, self.network.dtype
        noise: Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return noise

    def timesteps(self, alpha_bars: Sequence[float]) -> list[int]:  # noqa: ARG002 - for kinds with noise levels
        """Give the timesteps nearest to noise levels."""
        return [0]

    def alpha_bars(self, num_inference_steps: int) -> Tensor:  # noqa: ARG002
        """Give the cumulative alphas of sampling steps, (step,)."""
        return torch.tensor([CLEAN_ALPHA_BAR])

    def forward(self, batch: Batch, *, with_feature_maps: bool = True) -> Output:
        """Run the network on a batch as in training; feature maps that nobody reads need not be made."""
        ...

    def sample(
        self,
        class_labels: Tensor,
        *,
        null_label: int,
        generator: torch.Generator | list[torch.Generator] | None,
        num_inference_steps: int,
        guidance_scale: float,
    ) -> Iterator[Step]:
        """Sample one image for each label; the last step has the images.

        Args:
            class_labels: int64 (query,), on the network's device.
            null_label: The label that stands for no class.
            generator: One per image, one for all, or torch's own.
            num_inference_steps: Sampling steps, where sampling has steps.
            guidance_scale: Classifier-free guidance, where there is such a thing; 1 is none.

        Raises:
            InputError: This kind of generator cannot do what was asked for.
        """
        ...

    def renoise(self, images: Tensor, class_labels: Tensor, *, num_inference_steps: int, seed: int) -> Iterator[Step]:
        """Noise images from outside to the levels of the sampler.

        Every image gets the same noise, so that its steps do not depend on the batch.

        Args:
            images: In [-1, 1], (query, channel, height, width), on the network's device.
            class_labels: int64 (query,).
            num_inference_steps: Sampling steps whose levels are used, where there are any.
            seed: Seed of the noise.
        """
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Give the last feature map of images in [-1, 1], flattened, (query, feature)."""
        ...

    def closed_form(
        self, train: ImageSet, *, dtype: torch.dtype, device: torch.device, covered: Tensor | None = None
    ) -> Posterior:
        """Make the exact posterior over the training images, or over those that are `covered`, bool (train,)."""
        return image_posterior(train, dtype=dtype, device=device, covered=covered)
