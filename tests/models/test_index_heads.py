"""The heads have the closed form's shape: with the exact coordinates they reproduce it, digit by digit."""

import math

import pytest
import torch

from provgen.models.index_heads import ClassConditionalHead, ClassIndependentHead, TwoStageHead
from provgen.models.prototypes import CLEAR_CALL, principal_coordinates
from provgen.models.stage_embedding import MAX_GRID

LEVELS = torch.tensor([0.01, 0.3, 0.6, 0.95, 0.999], dtype=torch.float64)
CLASSES = 3
LOWEST = torch.finfo(torch.float64).min


def unit_images(images):
    return images.images.double() / 127.5 - 1


def make_head(kind, train, labels, *, width=64, **more):
    """A started head in float64 that reads the images themselves."""
    _, channels, size, _ = train.shape
    arguments = {"num_examples": len(train), "width": width, **more}
    if kind is ClassConditionalHead:
        arguments |= {"num_slots": int(labels.bincount().max()), "num_classes": CLASSES}
        arguments["has_unlabelled"] = bool((labels == CLASSES).any())
    if kind is TwoStageHead:
        arguments = {"num_cells": 3, "num_classes": CLASSES} | arguments
    head = kind([(channels, size)], **arguments).double()
    head.start(train, labels)
    return head


def exact_head(kind, train, labels, *, width=64, **more):
    """Such a head whose embedding is set by hand to the principal coordinates, and whose caps are out of reach."""
    head = make_head(kind, train, labels, width=width, **more)
    rows = train.flatten(1)
    # coordinates = (x_i - mean) P for an isometry P on the span of the training images; P from least squares.
    projection = torch.linalg.pinv(rows - rows.mean(0)) @ principal_coordinates(train, width)
    with torch.no_grad():
        head.embedding.projection.weight.copy_(projection.T)
        for name, parameter in head.named_parameters():
            if name.endswith("log_cap"):
                parameter.fill_(math.log(1e15))
    return head


def random_head(kind, train, labels, generator, **more):
    """A started head with something random added to every weight."""
    head = make_head(kind, train, labels, **more)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return head


def noised(train, generator, queries=20):
    """Random x_t of random parents at every level, with their levels."""
    parents = torch.randint(len(train), (queries,), generator=generator)
    signal = LEVELS.repeat(queries // len(LEVELS))
    noise = torch.randn(queries, *train.shape[1:], generator=generator, dtype=torch.float64)
    a = signal[:, None, None, None]
    return a.sqrt() * train[parents] + (1 - a).sqrt() * noise, signal


def index_logits(head, train, noisy, signal, *, class_labels=None, class_logits=None, **more):
    # From the origin of the principal coordinates: the mean image, faded like the images themselves.
    centred = noisy - signal.sqrt()[:, None, None, None] * train.mean(0)
    if class_labels is None:
        class_labels = torch.full((len(noisy),), CLASSES)
    with torch.no_grad():
        return head([centred], signal, class_labels, class_logits, **more)


def assert_same_posterior(logits, expected):
    actual = logits.log_softmax(dim=1)
    torch.testing.assert_close(actual.exp(), expected, rtol=1e-8, atol=1e-12)
    # Log-probabilities too, where the closed form is far from underflow.
    is_plain = expected > 1e-200
    torch.testing.assert_close(actual[is_plain], expected[is_plain].log(), rtol=1e-9, atol=1e-7)
    assert is_plain.sum() > 2 * len(logits), "the examples compete, so that the test can fail"


def class_probs(probs, labels):
    return torch.stack([probs[:, labels == label].sum(1) for label in range(CLASSES + 1)], dim=1)


class TestExactCoordinatesReproduceTheClosedForm:
    @pytest.mark.parametrize("count", [5, 12])
    def test_class_independent(self, count, random_images, closed_form_of, generator):
        images = random_images(count)
        train = unit_images(images)
        noisy, signal = noised(train, generator)
        expected = closed_form_of(images).probs(noisy, signal, torch.full((len(noisy),), CLASSES))
        head = exact_head(ClassIndependentHead, train, images.labels)
        assert_same_posterior(index_logits(head, train, noisy, signal), expected)

    @pytest.mark.parametrize(("kind", "num_cells"), [("kmeans", 3), ("kmeans", 5), ("classes", 3)])
    def test_two_stage_with_an_anchor_per_example(
        self, kind, num_cells, random_images, closed_form_of, generator
    ):
        images = random_images(12)
        train = unit_images(images)
        noisy, signal = noised(train, generator)
        expected = closed_form_of(images).probs(noisy, signal, torch.full((len(noisy),), CLASSES))
        head = exact_head(TwoStageHead, train, images.labels, cells=kind, num_cells=num_cells)
        head.anchor_weights.data[head.anchor_weights < 0] = -1e30  # places that no example took
        assert_same_posterior(index_logits(head, train, noisy, signal), expected)

    def test_class_conditional_with_as_many_ranks_as_slots(self, random_images, closed_form_of, generator):
        images = random_images(14)
        train, labels = unit_images(images), images.labels
        noisy, signal = noised(train, generator)
        null = torch.full((len(noisy),), CLASSES)
        expected = closed_form_of(images).probs(noisy, signal, null)
        class_logits = class_probs(expected, labels)[:, :CLASSES].log() + 3
        head = exact_head(ClassConditionalHead, train, labels)
        logits = index_logits(head, train, noisy, signal, class_logits=class_logits)
        assert_same_posterior(logits, expected)

    def test_class_conditional_within_each_class_when_the_classes_are_maps_of_shared_slots(
        self, closed_form_of, generator
    ):
        # Three classes of 12 are three slight distortions of the same 12 points in 4 of 64 dimensions: the
        # stacked matrix has rank 4, the head has 8 and there are 12 slots, so it must find the slots.
        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shared, basis = draw(12, 4), torch.linalg.qr(draw(64, 4)).Q.T
        points = [shared @ (torch.eye(4, dtype=torch.float64) + 0.03 * draw(4, 4)) for _ in range(CLASSES)]
        order = torch.randperm(36, generator=generator)
        train = (0.3 * torch.cat(points) @ basis)[order].view(36, 1, 8, 8)
        labels = torch.arange(3).repeat_interleave(12)[order]
        head = exact_head(ClassConditionalHead, train, labels, width=4)
        assert head.slots.shape == (12, 8)
        noisy, signal = noised(train, generator)
        logits = index_logits(head, train, noisy, signal)
        for label in range(CLASSES):
            own = labels == label
            rows = train[own].flatten(1)
            a = signal[:, None]
            squares = (noisy.flatten(1)[:, None] - a.sqrt()[:, None] * rows).square().sum(2)
            assert_same_posterior(logits[:, own], (-squares / (2 * (1 - a))).softmax(1))


class TestClassIndependent:
    def test_the_learned_cap_softens_and_never_sharpens(self, random_images, generator):
        images = random_images(8)
        train = unit_images(images)
        noisy, signal = noised(train, generator)
        head = exact_head(ClassIndependentHead, train, images.labels)
        free = index_logits(head, train, noisy, signal).softmax(1)
        with torch.no_grad():
            head.prototypes.log_cap.fill_(math.log(0.05))
        capped = index_logits(head, train, noisy, signal).softmax(1)
        assert torch.equal(free.argmax(1), capped.argmax(1))
        assert (torch.special.entr(capped).sum(1) > torch.special.entr(free).sum(1)).all()

    def test_clean_images_are_read_at_the_cap(self, random_images):
        images = random_images(8)
        train = unit_images(images)
        head = exact_head(ClassIndependentHead, train, images.labels)
        with torch.no_grad():
            head.prototypes.log_cap.fill_(math.log(0.3))
        logits = index_logits(head, train, train, torch.ones(8, dtype=torch.float64))
        squares = torch.cdist(train.flatten(1), train.flatten(1)).square()
        torch.testing.assert_close(logits.softmax(1), (-0.3 * squares / 2).softmax(1))

    def test_prototypes_start_with_the_distances_of_the_images(self, random_images):
        images = random_images(12)
        train = unit_images(images)
        prototypes = make_head(ClassIndependentHead, train, images.labels).prototypes
        rows = train.flatten(1)
        torch.testing.assert_close(torch.pdist(prototypes.points.detach()), torch.pdist(rows))
        half_norms = (rows - rows.mean(0)).square().sum(1) / 2
        torch.testing.assert_close(prototypes.bias.detach(), half_norms)

    def test_a_narrow_head_keeps_the_largest_principal_coordinates(self, random_images):
        images = random_images(12)
        train = unit_images(images)
        head = make_head(ClassIndependentHead, train, images.labels, width=3)
        rows = train.flatten(1)
        kept = torch.linalg.svdvals(head.prototypes.points.detach())
        torch.testing.assert_close(kept, torch.linalg.svdvals(rows - rows.mean(0))[:3])

    def test_the_cap_starts_where_neighbors_are_clear_calls(self):
        # Points on a line at distance 4 from one another: CLEAR_CALL nats are cap x 4^2 / 2.
        train = torch.zeros(6, 1, 4, 4, dtype=torch.float64)
        train[:, 0, 0, 0] = 4 * torch.arange(6)
        head = make_head(ClassIndependentHead, train, torch.zeros(6, dtype=torch.int64), width=4)
        assert float(head.prototypes.log_cap.detach().exp()) * 4**2 / 2 == pytest.approx(CLEAR_CALL)

    def test_a_fresh_head_says_nothing(self):
        head = ClassIndependentHead([(1, 8)], num_examples=5, width=4)
        null = torch.full((3,), CLASSES)
        logits = head([torch.randn(3, 1, 8, 8)], torch.tensor([0.1, 0.5, 0.9]), null, None)
        assert torch.equal(logits, torch.zeros(3, 5))


class TestClassConditional:
    def test_classes_get_what_the_class_head_says(self, random_images, generator):
        images = random_images(13)
        train = unit_images(images)
        noisy, signal = noised(train, generator)
        class_logits = torch.randn(20, CLASSES, generator=generator, dtype=torch.float64)
        head = random_head(ClassConditionalHead, train, images.labels, generator)
        probs = index_logits(head, train, noisy, signal, class_logits=class_logits).exp()
        torch.testing.assert_close(probs.sum(1), torch.ones(20, dtype=torch.float64))
        torch.testing.assert_close(class_probs(probs, images.labels)[:, :CLASSES], class_logits.softmax(1))

    def test_examples_without_a_class_take_their_part_and_the_classes_share_the_rest(
        self, random_images, generator
    ):
        images = random_images(14)
        train, labels = unit_images(images), images.labels.clone()
        labels[[2, 3, 7, 8, 9, 10]] = CLASSES
        noisy, signal = noised(train, generator)
        class_logits = torch.randn(20, CLASSES, generator=generator, dtype=torch.float64)
        started = make_head(ClassConditionalHead, train, labels)
        probs = index_logits(started, train, noisy, signal, class_logits=class_logits).exp()
        share = torch.full((20,), 6 / 14, dtype=torch.float64)
        torch.testing.assert_close(class_probs(probs, labels)[:, CLASSES], share)
        head = random_head(ClassConditionalHead, train, labels, generator)
        parts = class_probs(index_logits(head, train, noisy, signal, class_logits=class_logits).exp(), labels)
        assert parts[:, CLASSES].std() > 0.01, "it learns which images have no class"
        rest = 1 - parts[:, CLASSES:]
        torch.testing.assert_close(parts[:, :CLASSES], rest * class_logits.softmax(1))

    def test_without_a_class_head_classes_count_by_their_size(self, random_images, generator):
        images = random_images(7)
        train = unit_images(images)
        noisy, signal = noised(train, generator)
        head = random_head(ClassConditionalHead, train, images.labels, generator)
        probs = index_logits(head, train, noisy, signal).exp()
        expected = (torch.tensor([3, 2, 2, 0], dtype=torch.float64) / 7).expand(20, -1)
        torch.testing.assert_close(class_probs(probs, images.labels), expected)

    def test_a_class_without_examples_leaves_the_others_their_odds(self, random_images, generator):
        images = random_images(8, num_classes=2)
        train, labels = unit_images(images), 2 * images.labels  # classes 0 and 2 of three
        noisy, signal = noised(train, generator)
        class_logits = torch.randn(20, CLASSES, generator=generator, dtype=torch.float64)
        head = random_head(ClassConditionalHead, train, labels, generator)
        probs = index_logits(head, train, noisy, signal, class_logits=class_logits).softmax(1)
        torch.testing.assert_close(class_probs(probs, labels)[:, [0, 2]], class_logits[:, [0, 2]].softmax(1))

    def test_its_size_grows_with_the_largest_class(self):
        def size(num_examples, num_slots):
            with torch.device("meta"):
                head = ClassConditionalHead(
                    [(4, 8)], num_examples=num_examples, width=6, num_classes=10, num_slots=num_slots
                )
            return sum(p.numel() for p in head.parameters())

        embedding, rank = 6 * 4 * 64 + 6, 12
        assert size(1000, 100) == embedding + 10 * rank * 6 + 100 * rank + 1000 + 1
        assert size(1000, 101) - size(1000, 100) == rank
        assert size(1001, 100) - size(1000, 100) == 1


class TestTwoStage:
    def test_it_is_a_softmax_over_cells_times_one_in_each_cell(self, random_images, generator):
        images = random_images(15)
        train = unit_images(images)
        noisy, signal = noised(train, generator)
        head = random_head(TwoStageHead, train, images.labels, generator, num_cells=4)
        logits = index_logits(head, train, noisy, signal)
        torch.testing.assert_close(logits.exp().sum(1), torch.ones(20, dtype=torch.float64))
        centred = noisy - signal.sqrt()[:, None, None, None] * train.mean(0)
        with torch.no_grad():
            embedding = head.embedding([centred])
            log_cells, free = head.log_cells(embedding, signal), head.prototypes(embedding, signal)
        assert log_cells.exp().std(0).min() > 0.001
        for cell in range(4):
            own = head.example_cells == cell
            expected = free[:, own].log_softmax(1) + log_cells[:, cell, None]
            torch.testing.assert_close(logits[:, own], expected)

    def test_where_cells_are_classes_the_classes_get_what_the_cells_say(self, random_images, generator):
        images = random_images(14)
        train, labels = unit_images(images), images.labels.clone()
        labels[labels == 1] = CLASSES  # present: 0, 2, and none
        noisy, signal = noised(train, generator)
        head = random_head(TwoStageHead, train, labels, generator, cells="classes")
        probs = index_logits(head, train, noisy, signal).exp()
        centred = noisy - signal.sqrt()[:, None, None, None] * train.mean(0)
        with torch.no_grad():
            cells = head.log_cells(head.embedding([centred]), signal).exp()
        torch.testing.assert_close(class_probs(probs, labels)[:, [0, 2, 3]], cells)


class TestBeam:
    """Labels in turn and eight cells of 40 examples: most cells mix the classes, some lack one."""

    @pytest.fixture
    def searched(self, random_images, generator):
        images = random_images(40)
        train = unit_images(images)
        noisy, signal = noised(train, generator, queries=60)
        head = random_head(TwoStageHead, train, images.labels, generator, num_cells=8)
        labels = torch.arange(60) % (CLASSES + 1)
        assert (head.log_class_shares == -math.inf).any()

        def search(beam):
            return index_logits(head, train, noisy, signal, class_labels=labels, beam=beam)

        return head, images.labels, labels, search

    def test_all_cells_are_the_exhaustive_sum(self, searched):
        head, example_labels, class_labels, search = searched
        everything = search(None)
        # A row of a class is not shown the cells without it: those stay ruled out.
        hidden = (head.log_class_shares == -math.inf)[class_labels][:, head.example_cells]
        torch.testing.assert_close(search(8), everything.masked_fill(hidden, LOWEST))
        torch.testing.assert_close(search(99), search(8))
        possible = (class_labels == CLASSES)[:, None] | (class_labels[:, None] == example_labels)
        assert not (hidden & possible).any()

    @pytest.mark.parametrize("beam", [1, 3])
    def test_a_beam_scores_that_many_cells_and_nothing_else(self, beam, searched):
        head, _, _, search = searched
        logits, everything = search(beam), search(None)
        is_scored = logits > LOWEST
        torch.testing.assert_close(logits[is_scored], everything[is_scored])
        for row in is_scored:
            cells = head.example_cells[row].unique()
            assert len(cells) == beam
            assert torch.equal(row, torch.isin(head.example_cells, cells))

    def test_no_row_looks_into_a_cell_without_its_class(self, searched):
        head, example_labels, class_labels, search = searched
        is_scored = search(1) > LOWEST
        is_told = class_labels < CLASSES
        fits = class_labels[:, None] == example_labels
        assert (is_scored & fits).any(1)[is_told].all()
        probable = head.log_class_shares[CLASSES].isfinite()
        assert probable.all()

    def test_a_null_row_takes_the_most_probable_cells(self, searched):
        head, _, class_labels, search = searched
        everything, is_scored = search(None).exp(), search(3) > LOWEST
        for row in (class_labels == CLASSES).nonzero().flatten():
            mass = everything.new_zeros(8).index_add(0, head.example_cells, everything[row])
            best = set(mass.topk(3).indices.tolist())
            assert set(head.example_cells[is_scored[row]].tolist()) == best

    def test_a_row_of_a_class_weighs_a_cell_by_its_share_of_the_class(self):
        # Two far clusters; the one x_t is nearer to has one example of class 0 in ten, the other nothing else.
        train = torch.zeros(20, 1, 4, 4, dtype=torch.float64)
        train[:, 0, 0, 0] = torch.arange(20) / 100 + 1.0 * (torch.arange(20) >= 10)
        labels = torch.tensor([0] + [1] * 9 + [0] * 10)
        head = exact_head(TwoStageHead, train, labels, num_cells=2)
        between = torch.full((2, 1, 4, 4), 0.0, dtype=torch.float64)
        signal = torch.tensor([0.2, 0.2], dtype=torch.float64)
        between[:, 0, 0, 0] = signal.sqrt() * (train.mean() * 16 - 0.2)
        told = torch.tensor([0, CLASSES])
        is_scored = index_logits(head, train, between, signal, class_labels=told, beam=1) > LOWEST
        assert is_scored[0].nonzero().flatten().tolist() == list(range(10, 20))
        assert is_scored[1].nonzero().flatten().tolist() == list(range(10))

    def test_a_row_of_a_class_without_examples_is_left_alone(self, random_images, generator):
        images = random_images(12, num_classes=2)
        train = unit_images(images)
        noisy, signal = noised(train, generator, queries=5)
        head = make_head(TwoStageHead, train, images.labels)
        told = torch.full((5,), 2)
        assert (index_logits(head, train, noisy, signal, class_labels=told, beam=2) == LOWEST).all()

    def test_the_other_cells_are_never_computed(self, searched):
        head, _, _, search = searched
        logits = search(1)
        unused = ~(logits > LOWEST).any(0)
        assert unused.any(), "some cell is chosen by no row"
        with torch.no_grad():
            head.prototypes.points[unused] = math.nan
        assert torch.equal(search(1), logits)


HEADS = {
    "class_independent": (ClassIndependentHead, {}),
    "class_conditional": (ClassConditionalHead, {}),
    "kmeans": (TwoStageHead, {}),
    "classes": (TwoStageHead, {"cells": "classes", "num_cells": 4}),
}


def planted_clusters(generator, count=18):
    """Images in three far clusters, some without a class."""
    far = 6.0 * torch.eye(64, dtype=torch.float64)[:3]
    rows = far[torch.arange(count) % 3] + torch.rand(count, 64, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES + 1, (count,), generator=generator)
    assert len(labels.unique()) == CLASSES + 1
    return rows.view(count, 1, 8, 8), labels


@pytest.mark.parametrize("name", HEADS)
class TestEveryHead:
    def test_permuting_the_training_images_permutes_the_columns(self, name, generator):
        kind, more = HEADS[name]
        train, labels = planted_clusters(generator)
        order = torch.randperm(18, generator=generator)
        noisy, signal = noised(train, generator)
        class_logits = torch.randn(20, CLASSES, generator=generator, dtype=torch.float64)
        before, after = (
            index_logits(
                exact_head(kind, images, of, **more), train, noisy, signal, class_logits=class_logits
            ).log_softmax(1)
            for images, of in ((train, labels), (train[order], labels[order]))
        )
        torch.testing.assert_close(after, before[:, order], rtol=1e-8, atol=1e-8)

    def test_the_state_dict_restores_all_of_it(self, name, generator):
        kind, more = HEADS[name]
        train, labels = planted_clusters(generator)
        noisy, signal = noised(train, generator)
        head = random_head(kind, train, labels, generator, **more)
        other = make_head(kind, train.flip(0), labels.flip(0), **more)
        class_labels = torch.arange(20) % (CLASSES + 1)
        calls = [{}, {"beam": 1}] if kind is TwoStageHead else [{}]
        expected = [index_logits(head, train, noisy, signal, class_labels=class_labels, **c) for c in calls]
        other.load_state_dict(head.state_dict())
        actual = [index_logits(other, train, noisy, signal, class_labels=class_labels, **c) for c in calls]
        assert all(torch.equal(*pair) for pair in zip(expected, actual, strict=True))

    @pytest.mark.parametrize("has_unlabelled", [False, True])
    def test_gradients_are_finite_and_reach_every_weight(self, name, has_unlabelled, generator):
        kind, more = HEADS[name]
        train, labels = planted_clusters(generator)
        if not has_unlabelled:
            labels, more = labels % CLASSES, {**more, "num_cells": 3} if more else more
        head = random_head(kind, train, labels, generator, **more).float()
        signal = torch.tensor([0.9999, 1e-4, 1.0, 0.5])
        class_logits = torch.randn(4, CLASSES, generator=generator, requires_grad=True)
        logits = head([train[:4].float()], signal, torch.full((4,), CLASSES), class_logits)
        logits.log_softmax(1)[torch.arange(4), torch.arange(4)].sum().backward()
        for weight_name, weight in head.named_parameters():
            assert weight.grad is not None, weight_name
            assert weight.grad.isfinite().all(), weight_name
            assert weight.grad.any(), weight_name
        assert (class_logits.grad is not None) == head.reads_class_logits

    def test_exact_duplicates_leave_everything_finite(self, name, random_images, generator):
        kind, more = HEADS[name]
        images = random_images(4)
        train, labels = unit_images(images).repeat(3, 1, 1, 1), torch.arange(12) // 3
        noisy, signal = noised(train, generator)
        assert (
            index_logits(random_head(kind, train, labels, generator, **more), train, noisy, signal)
            .isfinite()
            .all()
        )

    def test_its_size_does_not_grow_with_the_image(self, name):
        kind, more = HEADS[name]
        if kind is not ClassIndependentHead:
            more = {"num_classes": CLASSES, "num_slots": 4} | more
        if kind is TwoStageHead:
            more = {"num_cells": 4, **more}
            more.pop("num_slots")
        sizes = []
        for image_size in (MAX_GRID, 64, 256):
            with torch.device("meta"):
                head = kind([(4, image_size), (8, 4)], num_examples=10, width=6, **more)
            sizes.append(sum(p.numel() for p in head.parameters()))
        assert sizes == sizes[:1] * 3
        embedding = 6 * (4 * MAX_GRID**2 + 8 * 4 * 4) + 6
        if kind is ClassIndependentHead:
            assert sizes[0] == embedding + 10 * 6 + 10 + 1
