"""Gradients of a denoiser's loss on single images: the features of TRAK and D-TRAK."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.func import functional_call, grad, vmap

from provgen.training.batches import seeded_generator

TIMESTEPS_AT_ONCE = {"vectorised": 10, "one by one": 100}
"""Noise levels in one pass; more are added up."""

Way = Literal["vectorised", "one by one"]

Target = Literal["noise", "zero"]


class LossGradients:
    """The gradient with respect to all parameters of an image's loss, averaged over noise levels.

    Target `noise`: the training loss, as TRAK for diffusion takes it. Target `zero`: the mean square of the
    denoiser's output, which is D-TRAK (Zheng et al. 2024, arXiv 2311.00500). Their timesteps are 0, 1000/K, 2 x 1000/K,
    ...; the noise of a timestep is here the same for all images, so that an image does not depend on its batch.
    """

    def __init__(
        self, unet: UNet2DModel, scheduler: DDPMScheduler, *, target: Target, num_timesteps: int, seed: int
    ) -> None:
        """Take a trained denoiser.

        Args:
            unet: In evaluation mode.
            scheduler: The forward process.
            target: What its output is compared with.
            num_timesteps: K, a divisor of the number of training timesteps.
            seed: Of the noise.
        """
        self.unet = unet
        self.scheduler = scheduler
        self.target = target
        self.seed = seed
        steps = scheduler.config.num_train_timesteps
        assert steps % num_timesteps == 0
        self.timesteps = torch.arange(0, steps, steps // num_timesteps, device=unet.device)
        self.parameters = {name: p.detach() for name, p in unet.named_parameters()}
        self.size = sum(p.numel() for p in self.parameters.values())
        # On a CPU the many levels of one image fill a pass: vectorised over images too, as grouped convolutions, it
        # took 1.6 times as long with 100 levels.
        self.way: Way = "one by one" if unet.device.type == "cpu" else "vectorised"

    def __call__(self, images: Tensor, class_labels: Tensor) -> Tensor:
        """Give float32 (query, parameter) for images (query, channel, height, width) with labels (query,)."""
        total = images.new_zeros(len(images), self.size)
        for timesteps in self.timesteps.split(TIMESTEPS_AT_ONCE[self.way]):
            noise = self._noise(timesteps, images)
            total += self._rows(images, class_labels, timesteps, noise) * (
                len(timesteps) / len(self.timesteps)
            )
        return total

    def _rows(self, images: Tensor, class_labels: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Give the gradient (query, parameter) of every image's mean loss over some timesteps."""
        gradient = grad(self._loss)
        if self.way == "vectorised":
            over_images = vmap(gradient, in_dims=(None, 0, 0, None, None))
            found = over_images(self.parameters, images, class_labels, timesteps, noise)
            return torch.cat([found[name].flatten(1) for name in self.parameters], dim=1)
        pairs = zip(images, class_labels, strict=True)
        each = [gradient(self.parameters, image, label, timesteps, noise) for image, label in pairs]
        return torch.stack([torch.cat([g[name].flatten() for name in self.parameters]) for g in each])

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        device: torch.device = self.unet.device
        return device

    def made_of(self) -> dict[str, str | int]:
        """Say everything that the gradients depend on."""
        weights = hashlib.sha256()
        for name, parameter in self.parameters.items():
            weights.update(name.encode())
            weights.update(parameter.cpu().numpy().tobytes())
        return {
            "weights": weights.hexdigest(),
            "target": self.target,
            "num_timesteps": len(self.timesteps),
            "noise_seed": self.seed,
        }

    def _loss(
        self, parameters: dict[str, Tensor], image: Tensor, label: Tensor, timesteps: Tensor, noise: Tensor
    ) -> Tensor:
        """Mean over timesteps (step,) of one image's loss."""
        noisy = self.scheduler.add_noise(image.expand_as(noise), noise, timesteps)
        labels = {"class_labels": label.expand(len(timesteps))}
        output = functional_call(self.unet, parameters, (noisy, timesteps), labels).sample
        wanted = noise if self.target == "noise" else torch.zeros_like(noise)
        loss: Tensor = (output - wanted).square().mean()
        return loss

    def _noise(self, timesteps: Tensor, images: Tensor) -> Tensor:
        """Draw (step, channel, height, width)."""
        draws = [
            randn_tensor(
                images.shape[1:],
                generator=seeded_generator(self.seed, 9, int(timestep)),
                device=images.device,
                dtype=images.dtype,
            )
            for timestep in timesteps
        ]
        return torch.stack(draws)
