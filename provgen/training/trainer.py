"""One optimiser step over the denoiser and its provenance network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from provgen.models.diffusion import record_stages
from provgen.models.provenance import ProvenanceNetwork
from provgen.training.batches import Batch
from provgen.training.losses import class_loss, denoising_loss, index_loss
from provgen.training.targets import Targets

MAX_GRADIENT_NORM = 1.0
"""Clipped separately for the two networks, so that neither scales the other's step."""


@dataclass(frozen=True, kw_only=True)
class ProvenanceObjective:
    """How the provenance network is trained beside the denoiser."""

    targets: Targets
    loss_weight: float
    """Of the index loss against the denoising loss."""
    class_loss_weight: float
    """Of the class loss; used where the network has a class head."""
    stops_gradient: bool
    """Whether the denoiser's encoder is shielded from both."""


class CoTrainer:
    """Trains a denoiser, and a provenance network on its encoder stages in the same forward pass."""

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        denoiser: UNet2DModel,
        provenance: ProvenanceNetwork | None,
        noise_scheduler: DDPMScheduler,
        objective: ProvenanceObjective | None,
        label_dropout: float,
        learning_rate: float,
        warmup_steps: int,
        ema_decay: float,
    ) -> None:
        """Prepare both networks for distributed training; without a provenance network, train the denoiser alone."""
        self.accelerator = accelerator
        self.networks: dict[str, UNet2DModel | ProvenanceNetwork] = {"denoiser": denoiser}
        if provenance is not None:
            self.networks["provenance"] = provenance
        parameters = [p for network in self.networks.values() for p in network.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate, fused=True)
        self.prepared = {name: accelerator.prepare(net) for name, net in self.networks.items()}
        self.averages = {
            name: EMAModel(net.parameters(), decay=ema_decay, foreach=True)
            for name, net in self.networks.items()
        }
        self.signal_levels = noise_scheduler.alphas_cumprod.to(accelerator.device)
        self.noise_scheduler = noise_scheduler
        self.objective = objective
        self.label_dropout = label_dropout
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Do the 0-based optimiser step `step` on this process's share of the batch.

        Args:
            batch: This process's rows.
            step: Only the warm-up depends on it.

        Returns:
            Losses over this process's rows and gradient norms before clipping, by name.
        """
        losses = self._losses(batch)
        self.optimizer.zero_grad()
        self.accelerator.backward(self._total(losses))
        norms = {
            f"{name}_gradient_norm": nn.utils.clip_grad_norm_(network.parameters(), MAX_GRADIENT_NORM)
            for name, network in self.networks.items()
        }
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps))
        self.optimizer.step()
        for name, network in self.networks.items():
            self.averages[name].step(network.parameters())
        return {name: scalar.detach() for name, scalar in (losses | norms).items()}

    def averaged(self, name: str) -> dict[str, Tensor]:
        """Give the averaged weights of one network as a state dict."""
        names = [key for key, _ in self.networks[name].named_parameters()]
        shadows = dict(zip(names, self.averages[name].shadow_params, strict=True))
        return dict(self.networks[name].state_dict()) | shadows

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        noisy_images = self.noise_scheduler.add_noise(batch.clean_images, batch.noise, batch.timesteps)
        with record_stages(self.networks["denoiser"]) as stages:
            predicted = self.prepared["denoiser"](
                noisy_images, batch.timesteps, class_labels=batch.labels
            ).sample
        losses = {"denoising_loss": denoising_loss(predicted, batch.noise)}
        if self.objective is None:
            return losses
        return losses | self._provenance_losses(batch, noisy_images, stages, self.objective)

    def _provenance_losses(
        self,
        batch: Batch,
        noisy_images: Tensor,
        stages: list[Tensor],
        objective: ProvenanceObjective,
    ) -> dict[str, Tensor]:
        if objective.stops_gradient:
            stages = [stage.detach() for stage in stages]
        signal = self.signal_levels[batch.timesteps]
        output = self.prepared["provenance"](stages, signal, batch.labels)
        with torch.no_grad():
            targets = objective.targets(batch, noisy_images, signal)
        losses = {"index_loss": index_loss(output.index_logits, targets)}
        if output.class_logits is not None:
            is_null = batch.labels == output.class_logits.shape[1]
            losses["class_loss"] = class_loss(
                output.class_logits, batch.clean_labels, is_null, self.label_dropout
            )
        return losses

    def _total(self, losses: dict[str, Tensor]) -> Tensor:
        total = losses["denoising_loss"]
        if self.objective is not None:
            total = total + self.objective.loss_weight * losses["index_loss"]
            if "class_loss" in losses:
                total = total + self.objective.class_loss_weight * losses["class_loss"]
        return total
