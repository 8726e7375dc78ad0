"""One optimiser step over the generator and its provenance network, and the losses of the latter."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from typing import Any, Self

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F

from provgen.data.batches import Batch
from provgen.generators.protocol import Generator, Output
from provgen.models.provenance import ProvenanceNetwork
from provgen.training.targets import Targets

MAX_GRADIENT_NORM = 1.0
"""Clipped separately for the two networks, so that neither scales the other's step."""


@dataclass(frozen=True, kw_only=True)
class ProvenanceObjective:
    """How the provenance network is trained beside the generator."""

    targets: Targets
    loss_weight: float
    """Weight of the index loss against the generator's loss."""
    class_loss_weight: float
    """Weight of the class loss; used where the network has a class head."""
    stops_gradient: bool
    """Whether the generator's encoder is shielded from both."""
    covered: Tensor
    """Examples that the index head can name, bool (train,); only their rows have an index loss."""
    coverage: float
    """Share of the examples that it can name."""


ASKED_EVERY = 10
"""Steps after which several processes ask one another whether to stop: it makes them wait for each other."""


class StopSignals:
    """Catches SIGTERM and Ctrl-C, so that a step is finished and saved; a second one stops at once."""

    def __init__(self, every: int = 1) -> None:
        """Stop after a multiple of `every` steps alone."""
        self.every = every
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        self.received = number
        signal.signal(number, self._before[number])

    def stop(self, step: int, accelerator: Accelerator) -> bool:
        """Say whether to stop after a step; all processes say the same if one of them got a signal."""
        if step % self.every:
            return False
        if accelerator.num_processes == 1:
            return self.received is not None
        if step % ASKED_EVERY:
            return False
        if self.received is not None:
            accelerator.set_trigger()
        stops: bool = accelerator.check_trigger()
        if stops and self.received is None:
            self.received = signal.SIGTERM
        return stops


class CoTrainer:
    """Trains a generator, and a provenance network on its encoder feature maps in the same forward pass."""

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        generator: Generator,
        provenance: ProvenanceNetwork | None,
        objective: ProvenanceObjective | None,
        label_dropout: float,
        learning_rate: float,
        warmup_steps: int,
        ema_decay: float,
        is_shared: bool = True,
    ) -> None:
        """Prepare both networks for distributed training; without a provenance network, train the generator alone.

        With `is_shared` False, every process trains networks of its own.
        """
        self.accelerator, self.generator = accelerator, generator
        self.networks: dict[str, Any] = {generator.name: generator.network}
        if provenance is not None:
            self.networks["provenance"] = provenance
        parameters = [p for network in self.networks.values() for p in network.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate, fused=True)
        self.prepared = {
            name: accelerator.prepare_model(net, evaluation_mode=not is_shared) for name, net in self.networks.items()
        }
        self.averages = {
            name: EMAModel(net.parameters(), decay=ema_decay, foreach=True) for name, net in self.networks.items()
        }
        self.objective, self.label_dropout = objective, label_dropout
        self.learning_rate, self.warmup_steps = learning_rate, warmup_steps

    def step(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Do the 0-based optimiser step `step`, which the warm-up depends on, on this process's share of the batch.

        Gives losses over this process's rows and gradient norms before clipping, by name.
        """
        total, losses = self._losses(batch)
        self.optimizer.zero_grad()
        self.accelerator.backward(total)
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

    def _losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Give what is minimised, and the losses it is made of by name."""
        generator = self.generator.with_network(self.prepared[self.generator.name])
        output = generator.forward(batch, with_feature_maps=self.objective is not None)
        total, losses = output.loss.mean(), {name: rows.mean() for name, rows in output.parts.items()}
        if self.objective is None:
            return total, losses
        added = self._provenance_losses(batch, output, self.objective)
        total = total + self.objective.loss_weight * added["index_loss"]
        if "class_loss" in added:
            total = total + self.objective.class_loss_weight * added["class_loss"]
        return total, losses | added

    def _provenance_losses(self, batch: Batch, output: Output, objective: ProvenanceObjective) -> dict[str, Tensor]:
        feature_maps, class_logits = output.feature_maps, output.class_logits
        if objective.stops_gradient:
            feature_maps = [feature_map.detach() for feature_map in feature_maps]
            class_logits = None if class_logits is None else class_logits.detach()
        alpha_bar, labels = output.alpha_bar, output.class_labels
        predicted = self.prepared["provenance"](feature_maps, alpha_bar, labels, class_logits)
        with torch.no_grad():
            targets = objective.targets(batch.indices, output.query, alpha_bar, labels)
        is_covered = objective.covered[batch.indices]
        losses = {"index_loss": index_loss(predicted.index_logits, targets, is_covered, objective.coverage)}
        if class_logits is None and predicted.class_logits is not None:
            is_null = labels == predicted.class_logits.shape[1]
            losses["class_loss"] = class_loss(predicted.class_logits, batch.clean_labels, is_null, self.label_dropout)
        return losses


def index_loss(index_logits: Tensor, targets: Tensor, is_covered: Tensor, coverage: float) -> Tensor:
    """Cross-entropy in nats between target rows and predicted rows, over the rows of covered examples.

    The sum is divided by the expected number of covered rows, never by the actual one: see `class_loss`. Logits, which
    are finite, and targets are (batch, train). `is_covered`, bool (batch,), marks the rows whose example the index
    head can name, a share `coverage` of all examples.
    """
    covered_targets = targets * is_covered[:, None]
    losses = -(covered_targets * index_logits.log_softmax(dim=1)).sum(dim=1)
    return losses.sum() / (len(losses) * coverage)


def class_loss(class_logits: Tensor, clean_labels: Tensor, is_null: Tensor, label_dropout: float) -> Tensor:
    """Cross-entropy in nats of the true class, on rows whose label the denoiser was not given.

    A row whose label conditions the denoiser would leak it into the features. The sum is divided by the
    expected number of unconditional rows, never by the actual one: a mean over no rows is NaN, and a branch that
    differs between processes deadlocks them.

    Logits are (batch, class). `clean_labels`, int64 (batch,), are those before dropout; the null label does not count.
    `is_null`, bool (batch,), marks rows whose label was dropped, with the probability `label_dropout`.
    """
    num_classes = class_logits.shape[1]
    counts = is_null & (clean_labels < num_classes)
    losses = F.cross_entropy(class_logits, clean_labels.clamp_max(num_classes - 1), reduction="none")
    return (losses * counts).sum() / (len(class_logits) * label_dropout)
