"""Index heads: from encoder feature maps to logits over training examples.

Every head is built from the `(channels, height)` of the feature maps read, the number of examples, the width of the
embedding, and the number of classes without the null label. `head.start(images, labels, at_images=...)` starts it, with
images (train, channel, height, width) in [-1, 1] and labels int64 (train,). Unless `at_images`, weights stay random.

`head(feature_maps, alpha_bar, class_labels, class_logits)` gives index logits (batch, train) for feature maps (batch,
channel, height, width), alpha_bar in (0, 1], (batch,), labels int64 (batch,) and class logits (batch, class).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from provgen.models import groups as cell_rules
from provgen.models.embedding import silent_embedding
from provgen.models.groups import AnchorMixture, assign_slots, factorise, group_means, log_softmax_within
from provgen.models.prototypes import Prototypes, principal_coordinates, sharpen, starting_log_cap

RANK = 3
"""Rank of slots times class maps in the class-conditional head, in halves of the width. A larger rank comes nearer to
the closed form, until the head is larger than the class-independent one."""
CELL_ANCHORS, CLASS_ANCHORS = 8, 4
"""Anchors of cells and of classes, in square roots of the number of examples."""


class ClassIndependentHead(nn.Module):
    """One softmax over all training examples, each with a prototype."""

    def __init__(self, shapes: list[tuple[int, int]], *, num_examples: int, width: int) -> None:
        super().__init__()
        self.embedding = silent_embedding(shapes, width)
        self.prototypes = Prototypes(num_examples, width)

    def forward(
        self,
        feature_maps: list[Tensor],
        alpha_bar: Tensor,
        class_labels: Tensor,  # noqa: ARG002 - the call that all heads share
        class_logits: Tensor | None,  # noqa: ARG002
    ) -> Tensor:
        """Give index logits (batch, train)."""
        logits: Tensor = self.prototypes(self.embedding(feature_maps), alpha_bar)
        return logits

    def start(self, images: Tensor, labels: Tensor, *, at_images: bool = True) -> None:  # noqa: ARG002 - as all heads
        """Start the prototypes at principal coordinates, so that the embedding need only learn the same ones of x_t."""
        if not at_images:
            return
        coordinates = principal_coordinates(images, self.prototypes.points.shape[1])
        self.prototypes.start(coordinates, starting_log_cap(coordinates))


class ClassConditionalHead(nn.Module):
    """A class, then one of M slots that all classes share: p(i) = p(y_i) p(slot_i | y_i) (arXiv 2510.03361).

    The slots are points as in the class-independent head; every class has a map of its own from the embedding to their
    space. So the head grows with the largest class, a scalar per example apart. Examples without a class are one more.
    """

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        *,
        num_examples: int,
        width: int,
        num_classes: int,
        num_slots: int,
        has_unlabelled: bool = False,
        has_class_branch: bool = False,
    ) -> None:
        """Build the head with M = `num_slots`, the most examples of a class or of those without one.

        `has_unlabelled` says whether some examples carry the null label, `has_class_branch` whether the head predicts
        the class itself; if not, it is called with `class_logits`.
        """
        super().__init__()
        self.num_groups = num_classes + has_unlabelled
        rank = min(num_slots, RANK * width // 2)
        self.embedding = silent_embedding(shapes, width)
        self.class_branch: AnchorMixture | None = None
        self.unlabelled: nn.Linear | None = None
        if has_class_branch:
            self.class_branch = AnchorMixture(
                self.num_groups, num_examples=num_examples, width=width, share=CLASS_ANCHORS
            )
        elif has_unlabelled:
            self.unlabelled = nn.Linear(width, 1)
        self.maps = nn.Parameter(torch.randn(self.num_groups, rank, width) / math.sqrt(width))
        self.slots = nn.Parameter(torch.randn(num_slots, rank) / math.sqrt(rank))
        self.bias = nn.Parameter(torch.zeros(num_examples))
        self.log_cap = nn.Parameter(torch.zeros(()))
        self.example_groups: Tensor
        self.register_buffer("example_groups", torch.zeros(num_examples, dtype=torch.int64))
        self.example_slots: Tensor
        self.register_buffer("example_slots", torch.zeros(num_examples, dtype=torch.int64))

    def forward(
        self,
        feature_maps: list[Tensor],
        alpha_bar: Tensor,
        class_labels: Tensor,  # noqa: ARG002 - the call that all heads share
        class_logits: Tensor | None,
    ) -> Tensor:
        """Give index logits (batch, train), normalised if every class has examples."""
        embedding = self.embedding(feature_maps)
        views = torch.einsum("bw,crw->bcr", embedding, self.maps)
        products = F.linear(views, self.slots).to(alpha_bar.dtype).flatten(1)
        similarity = products.index_select(1, self.example_groups * len(self.slots) + self.example_slots)
        logits = sharpen(similarity, self.bias, alpha_bar, self.log_cap)
        within = log_softmax_within(logits, self.example_groups, self.num_groups)
        groups = self._log_groups(embedding, alpha_bar, class_logits)
        return within + groups.index_select(1, self.example_groups)

    @torch.no_grad()
    def start(self, images: Tensor, labels: Tensor, *, at_images: bool = True) -> None:
        """Give the examples their slots, and start at the nearest products to their principal coordinates."""
        labels = labels.cpu()
        num_slots, rank = self.slots.shape
        coordinates = principal_coordinates(images, self.maps.shape[2])
        # From the mean of the class: within a class, what its examples have in common cancels.
        centres = group_means(coordinates, labels, self.num_groups)[labels]
        slots = assign_slots(coordinates - centres, labels, num_slots)
        self.example_groups.copy_(labels)
        self.example_slots.copy_(slots)
        if not at_images:
            return
        cells = labels * num_slots + slots
        slot_points, maps = factorise(coordinates - centres, cells, (self.num_groups, num_slots), rank)
        self.slots.copy_(slot_points)
        self.maps.copy_(maps)
        points = (slot_points @ maps).flatten(0, 1)[cells]
        self.bias.copy_(points.square().sum(1) / 2 + (points * centres).sum(1))
        self.log_cap.copy_(starting_log_cap(coordinates))
        if self.class_branch is not None:
            self.class_branch.start(coordinates, labels, starting_log_cap(coordinates))
        if self.unlabelled is not None:
            nn.init.zeros_(self.unlabelled.weight)
            share = (labels == self.num_groups - 1).double().mean()
            self.unlabelled.bias.fill_(float(torch.logit(share, eps=1e-6)))

    def _log_groups(self, embedding: Tensor, alpha_bar: Tensor, class_logits: Tensor | None) -> Tensor:
        """Log probabilities of the classes, and of having none last: (batch, group)."""
        if self.class_branch is not None:
            groups: Tensor = self.class_branch(embedding, alpha_bar)
            return groups
        assert class_logits is not None, "a head without a class branch is given class logits"
        classes = class_logits.to(alpha_bar.dtype).log_softmax(dim=1)
        if self.unlabelled is None:
            return classes
        # A class head is never shown what no class looks like, so its logits cannot say.
        odds = self.unlabelled(embedding).to(alpha_bar.dtype)
        return torch.cat([classes + F.logsigmoid(-odds), F.logsigmoid(odds)], dim=1)


class TwoStageHead(nn.Module):
    """A cell of alike examples, then one of its examples: p(i) = p(cell_i) p(i | cell_i).

    Within a cell this is the class-independent head; cells are told apart by anchors, so that a search of the best
    cells alone is cheaper than all examples.
    """

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        *,
        num_examples: int,
        width: int,
        num_cells: int,
        num_classes: int,
        cells: Literal["kmeans", "classes"] = "kmeans",
    ) -> None:
        """Build the head; cells are k-means clusters of principal coordinates or the `num_cells` classes present."""
        super().__init__()
        self.cells = cells
        self.embedding = silent_embedding(shapes, width)
        self.prototypes = Prototypes(num_examples, width)
        self.log_cells = AnchorMixture(num_cells, num_examples=num_examples, width=width, share=CELL_ANCHORS)
        self.example_cells: Tensor
        self.register_buffer("example_cells", torch.arange(num_examples) % num_cells)
        self.log_class_shares: Tensor
        self.register_buffer("log_class_shares", torch.zeros(num_classes + 1, num_cells))

    def forward(
        self,
        feature_maps: list[Tensor],
        alpha_bar: Tensor,
        class_labels: Tensor,
        class_logits: Tensor | None,  # noqa: ARG002 - the call that all heads share
        beam: int | None = None,
    ) -> Tensor:
        """Give index logits (batch, train), normalised if every cell has examples.

        With a `beam`, score only the examples of so many cells of each row, the most probable ones that hold examples
        of the row's class; others get the lowest finite value.
        """
        embedding = self.embedding(feature_maps)
        log_cells: Tensor = self.log_cells(embedding, alpha_bar)
        if beam is not None:
            return self._search(embedding, alpha_bar, log_cells, self._best(log_cells, class_labels, beam))
        logits = self.prototypes(embedding, alpha_bar)
        within = log_softmax_within(logits, self.example_cells, log_cells.shape[1])
        return within + log_cells.index_select(1, self.example_cells)

    @torch.no_grad()
    def start(self, images: Tensor, labels: Tensor, *, at_images: bool = True) -> None:
        """Choose the cells, and start prototypes and anchors at principal coordinates of the training images."""
        labels = labels.cpu()
        classes, num_cells = self.log_class_shares.shape
        coordinates = principal_coordinates(images, self.prototypes.points.shape[1])
        is_kmeans = self.cells == "kmeans"
        cells = cell_rules.kmeans_cells(coordinates, num_cells) if is_kmeans else cell_rules.class_cells(labels)
        self.example_cells.copy_(cells)
        self.log_class_shares.copy_(cell_rules.log_class_shares(cells, labels, num_cells, classes - 1))
        if not at_images:
            return
        log_cap = starting_log_cap(coordinates)
        self.prototypes.start(coordinates, log_cap)
        self.log_cells.start(coordinates, cells, log_cap)

    def _best(self, log_cells: Tensor, class_labels: Tensor, beam: int) -> Tensor:
        """Choose cells for every row: bool (batch, cell)."""
        scores = log_cells + self.log_class_shares.to(log_cells)[class_labels]
        best = scores.topk(min(beam, scores.shape[1]), dim=1)
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best.indices, best.values > -math.inf)

    def _search(self, embedding: Tensor, alpha_bar: Tensor, log_cells: Tensor, chosen: Tensor) -> Tensor:
        lowest = torch.finfo(alpha_bar.dtype).min
        logits = alpha_bar.new_full((len(alpha_bar), len(self.example_cells)), lowest)
        sizes = self.example_cells.bincount(minlength=chosen.shape[1]).tolist()
        cells = self.example_cells.argsort(stable=True).split(sizes)
        for cell in chosen.any(dim=0).nonzero().flatten().tolist():
            rows, members = chosen[:, cell].nonzero().flatten(), cells[cell]
            within = self.prototypes(embedding[rows], alpha_bar[rows], members).log_softmax(dim=1)
            logits[rows[:, None], members] = within + log_cells[rows, cell][:, None]
        return logits
