"""How well the provenance network predicts the index, beside the best anything could do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from provgen.data.batches import Batch
from provgen.generators.closed_form import Posterior
from provgen.metrics.agreement import beam_recall
from provgen.metrics.statistics import Estimate, mean_estimate
from provgen.tracing.network import NetworkPosterior
from provgen.tracing.trace import WINDOW
from provgen.training.targets import Mixing

LEVELS = (0.02, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
"""alpha_bars alpha_bar that are looked at; the nearest timestep of the schedule is taken."""


@dataclass(frozen=True, kw_only=True)
class IndexQuality:
    """Index metrics at one noise level, each beside its closed-form ceiling.

    The parent of x_t is not drawn but averaged over the closed-form posterior: `top1` is the probability that
    the network's first choice is the parent. That has the expectation of the plain hit rate, less variance, and
    never exceeds its ceiling by chance.
    """

    alpha_bar: float
    """alpha_bar."""
    rows: str
    """`labelled` or `null`: whether the class label was given, to the network and to the ceiling alike."""
    cross_entropy: float
    """Nats."""
    cross_entropy_ceiling: float
    """Least cross-entropy: the conditional entropy H(i | x_t), nats."""
    kl_gap: Estimate
    """`cross_entropy` minus its ceiling: mean KL divergence from closed form to network, nats."""
    top1: Estimate
    top1_ceiling: float
    top5: Estimate
    top5_ceiling: float
    query_gaps: Tensor
    """KL divergence of every query, nats, (query,)."""

    def as_row(self) -> dict[str, Any]:
        """Give the metrics as a flat JSON-able dict; estimates become NAME, NAME_low and NAME_high."""
        row: dict[str, Any] = {"n": len(self.query_gaps)}
        for name, value in vars(self).items():
            if isinstance(value, Estimate):
                row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            elif not isinstance(value, Tensor):
                row[name] = value
        return row


class IndexProbe:
    """Fixed batches of training images on which index metrics are measured again and again."""

    def __init__(self, batches: list[Batch], *, null_label: int, is_conditional: bool, mixing: Mixing | None) -> None:
        """Keep what is measured.

        Args:
            batches: One per noise level, of covered examples; a generator without noise levels has one.
            null_label: The label that stands for no label.
            is_conditional: Whether this generator can be told a class label.
            mixing: Of the targets the network was trained towards; None for none.
        """
        self.batches = batches
        self.null_label = null_label
        self.is_conditional = is_conditional
        self.mixing = mixing

    def measure(self, network: NetworkPosterior, closed_form: Posterior) -> list[IndexQuality]:
        """Measure every level, conditional rows (where there are labels) and unconditional rows apart.

        Args:
            network: Generator and provenance network.
            closed_form: In float64 on the CPU, over the covered examples: the ceilings come from it.
        """
        return [
            self._level(network, closed_form, rows, part) for batch in self.batches for rows, part in self.parts(batch)
        ]

    def beam_recall(self, network: NetworkPosterior, beam: int, k: int) -> Estimate:
        """Share of the `k` best of the exhaustive answer found in the best `beam` cells; unconditional rows.

        Both answers are averaged over the trace window first, as traces are.
        """
        answers: dict[int | None, list[Tensor]] = {None: [], beam: []}
        for batch in self.batches:
            observation, _ = network.observe(dict(self.parts(batch))["unconditional"])
            if len(self.batches) == 1 or WINDOW[0] < float(observation.alpha_bar[0]) < WINDOW[1]:
                for cells, probs in answers.items():
                    probs.append(network.index_logits(observation, cells).softmax(dim=1))
        lowest = torch.finfo(answers[None][0].dtype).min
        whole, searched = (torch.stack(answers[cells]).mean(dim=0).log().clamp_min(lowest) for cells in (None, beam))
        return beam_recall(searched, whole, k)

    def parts(self, batch: Batch) -> list[tuple[str, Batch]]:
        """Split a batch into `labelled` rows, told their class, and `null` rows, told nothing."""
        null = torch.full_like(batch.clean_labels, self.null_label)
        parts = [("unconditional", replace(batch, labels=null))]
        has_label = (batch.clean_labels != self.null_label).nonzero().flatten()
        if self.is_conditional and len(has_label):
            parts.insert(0, ("conditional", replace(batch, labels=batch.clean_labels).select(has_label)))
        return parts

    def _level(self, network: NetworkPosterior, closed_form: Posterior, rows: str, batch: Batch) -> IndexQuality:
        observation, output = network.observe(batch)
        log_probs = output.index_logits.cpu().double().log_softmax(dim=1)
        alpha_bar, query = observation.alpha_bar.cpu(), observation.query.cpu()
        start, measured = 0, []
        for posterior in closed_form.chunks(query, alpha_bar, batch.labels):
            stop = start + len(posterior)
            measured.append(self._compare(log_probs[start:stop], posterior))
            start = stop
        cross_entropy, floor, top1, top1_ceiling, top5, top5_ceiling = torch.cat(measured).T
        return IndexQuality(
            alpha_bar=float(alpha_bar[0]),
            rows=rows,
            cross_entropy=float(cross_entropy.mean()),
            cross_entropy_ceiling=float(floor.mean()),
            kl_gap=mean_estimate(cross_entropy - floor, seed=0),
            top1=mean_estimate(top1, seed=0),
            top1_ceiling=float(top1_ceiling.mean()),
            top5=mean_estimate(top5, seed=0),
            top5_ceiling=float(top5_ceiling.mean()),
            query_gaps=cross_entropy - floor,
        )

    def _compare(self, log_probs: Tensor, posterior: Tensor) -> Tensor:
        """Measure each query: six columns in the order that `_level` unpacks; both arguments (query, train)."""
        target = posterior if self.mixing is None else self.mixing(posterior)
        five = min(5, posterior.shape[1])
        chosen = posterior.gather(1, log_probs.topk(five, dim=1).indices)
        best = posterior.topk(five, dim=1).values
        return torch.stack(
            [
                -(target * log_probs).sum(dim=1),
                torch.special.entr(target).sum(dim=1),
                chosen[:, 0],
                best[:, 0],
                chosen.sum(dim=1),
                best.sum(dim=1),
            ],
            dim=1,
        )


def mean_kl_gap(qualities: list[IndexQuality], rows: str) -> Estimate:
    """Mean KL gap in nats over the levels inside the trace window, bootstrapped over queries.

    A generator without noise levels has one level, which is taken.
    """
    kind = [q for q in qualities if q.rows == rows]
    inside = [q.query_gaps for q in kind if WINDOW[0] < q.alpha_bar < WINDOW[1]]
    return mean_estimate(torch.stack(inside or [kind[0].query_gaps]).mean(dim=0), seed=0)
