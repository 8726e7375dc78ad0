"""The class-independent head has the closed form's shape; and what holds for every head."""

import math

import pytest
import torch

from provgen.models.embedding import MAX_GRID
from provgen.models.index_heads import ClassConditionalHead, ClassIndependentHead, TwoStageHead
from provgen.models.prototypes import CLEAR_CALL, principal_coordinates, starting_log_cap

CLASSES = 3

HEADS = {
    "class_independent": (ClassIndependentHead, {}),
    "class_conditional": (ClassConditionalHead, {}),
    "kmeans": (TwoStageHead, {"num_cells": 3}),
    "classes": (TwoStageHead, {"cells": "classes", "num_cells": 4}),
}


@pytest.mark.parametrize("count", [5, 12])
def test_exact_coordinates_without_a_cap_reproduce_the_closed_form(count, random_case, assert_same_posterior):
    case = random_case(count)
    assert_same_posterior(case.logits(case.exact(ClassIndependentHead)), case.closed_form)


def test_the_learned_cap_softens_and_never_sharpens(random_case):
    case = random_case(8)
    head = case.exact(ClassIndependentHead)
    free = case.logits(head).softmax(1)
    with torch.no_grad():
        head.prototypes.log_cap.fill_(math.log(0.05))
    capped = case.logits(head).softmax(1)
    assert torch.equal(free.argmax(1), capped.argmax(1))
    assert (torch.special.entr(capped).sum(1) > torch.special.entr(free).sum(1)).all()


def test_clean_images_are_read_at_the_cap(random_case):
    case = random_case(8)
    head = case.exact(ClassIndependentHead)
    with torch.no_grad():
        head.prototypes.log_cap.fill_(math.log(0.3))
    rows = case.train.flatten(1)
    null, clean = torch.full((8,), CLASSES), torch.ones(8, dtype=torch.float64)
    logits = head([case.train - case.train.mean(0)], clean, null, None)
    expected = (-0.3 * torch.cdist(rows, rows).square() / 2).softmax(1)
    torch.testing.assert_close(logits.softmax(1), expected)


def test_prototypes_start_with_the_distances_of_the_images(random_case):
    case = random_case(12)
    prototypes = case.started(ClassIndependentHead).prototypes
    rows = case.train.flatten(1)
    torch.testing.assert_close(torch.pdist(prototypes.points.detach()), torch.pdist(rows))
    half_norms = (rows - rows.mean(0)).square().sum(1) / 2
    torch.testing.assert_close(prototypes.bias.detach(), half_norms)


def test_a_narrow_head_keeps_the_largest_principal_coordinates(random_case):
    case = random_case(12)
    points = case.started(ClassIndependentHead, width=3).prototypes.points.detach()
    rows = case.train.flatten(1)
    torch.testing.assert_close(torch.linalg.svdvals(points), torch.linalg.svdvals(rows - rows.mean(0))[:3])


def test_the_cap_starts_where_neighbors_are_clear_calls(head_case):
    # Points on a line at distance 4 from one another: CLEAR_CALL nats are cap x 4^2 / 2.
    train = torch.zeros(6, 1, 4, 4, dtype=torch.float64)
    train[:, 0, 0, 0] = 4 * torch.arange(6)
    head = head_case(train, torch.zeros(6, dtype=torch.int64)).started(ClassIndependentHead, width=4)
    assert float(head.prototypes.log_cap.detach().exp()) * 4**2 / 2 == pytest.approx(CLEAR_CALL)


def test_a_fresh_head_says_nothing():
    head = ClassIndependentHead([(1, 8)], num_examples=5, width=4)
    null = torch.full((3,), CLASSES)
    logits = head([torch.randn(3, 1, 8, 8)], torch.tensor([0.1, 0.5, 0.9]), null, None)
    assert torch.equal(logits, torch.zeros(3, 5))


@pytest.mark.parametrize("name", HEADS)
class TestEveryHead:
    @pytest.fixture
    def planted(self, head_case, generator):
        """Images in three far clusters, six each; some have no class."""
        far = 6.0 * torch.eye(64, dtype=torch.float64)[:3]
        rows = far[torch.arange(18) % 3] + torch.rand(18, 64, generator=generator, dtype=torch.float64)
        labels = torch.randint(CLASSES + 1, (18,), generator=generator)
        assert len(labels.unique()) == CLASSES + 1
        return head_case(rows.view(18, 1, 8, 8), labels)

    @pytest.fixture
    def class_logits(self, generator):
        return torch.randn(20, CLASSES, generator=generator, dtype=torch.float64)

    def test_permuting_the_training_images_permutes_the_columns(self, name, planted, class_logits, generator):
        kind, more = HEADS[name]
        order = torch.randperm(18, generator=generator)
        permuted = type(planted)(planted.train[order], planted.labels[order], planted.noisy, planted.alpha_bar)
        before, after = (
            case.logits(case.exact(kind, **more), class_logits=class_logits).log_softmax(1)
            for case in (planted, permuted)
        )
        torch.testing.assert_close(after, before[:, order], rtol=1e-8, atol=1e-8)

    def test_the_state_dict_restores_all_of_it(self, name, planted, class_logits):
        kind, more = HEADS[name]
        head = planted.random(kind, **more)
        other = type(planted)(planted.train.flip(0), planted.labels.flip(0), planted.noisy, planted.alpha_bar).started(
            kind, **more
        )
        call = {"class_labels": torch.arange(20) % (CLASSES + 1), "class_logits": class_logits}
        calls = [call, {**call, "beam": 1}] if kind is TwoStageHead else [call]
        expected = [planted.logits(head, **call) for call in calls]
        assert not any(torch.equal(planted.logits(other, **c), e) for c, e in zip(calls, expected, strict=True))
        other.load_state_dict(head.state_dict())
        assert all(torch.equal(planted.logits(other, **c), e) for c, e in zip(calls, expected, strict=True))

    @pytest.mark.parametrize("has_unlabelled", [False, True])
    def test_gradients_are_finite_and_reach_every_weight(self, name, has_unlabelled, planted):
        kind, more = HEADS[name]
        if not has_unlabelled:
            planted.labels.remainder_(CLASSES)
            more = {**more, "num_cells": 3} if more else more
        head = planted.random(kind, **more).float()
        alpha_bar = torch.tensor([0.9999, 1e-4, 1.0, 0.5])
        class_logits = torch.zeros(4, CLASSES, requires_grad=True)
        logits = head([planted.train[:4].float()], alpha_bar, torch.full((4,), CLASSES), class_logits)
        logits.log_softmax(1)[torch.arange(4), torch.arange(4)].sum().backward()
        for weight_name, weight in head.named_parameters():
            assert weight.grad is not None, weight_name
            assert weight.grad.isfinite().all(), weight_name
            assert weight.grad.any(), weight_name
        assert (class_logits.grad is not None) == isinstance(head, ClassConditionalHead)

    def test_away_from_the_images_it_stays_random_and_knows_its_groups(self, name, planted):
        kind, more = HEADS[name]
        at_images = planted.started(kind, **more)
        head = planted.fresh(kind, **more)
        before = {key: value.clone() for key, value in head.named_parameters()}
        head.start(planted.train, planted.labels, at_images=False)
        assert all(torch.equal(value, before[key]) for key, value in head.named_parameters())
        buffers = dict(at_images.named_buffers())
        assert all(torch.equal(value, buffers[key]) for key, value in head.named_buffers())
        moved = [key for key, value in at_images.named_parameters() if not torch.equal(value, before[key])]
        assert len(moved) >= 3

    def test_exact_duplicates_leave_everything_finite(self, name, random_case, head_case):
        kind, more = HEADS[name]
        train = random_case(4).train.repeat(3, 1, 1, 1)
        case = head_case(train, torch.arange(12) // 3)
        assert case.logits(case.random(kind, **more)).isfinite().all()

    def test_its_size_does_not_grow_with_the_image(self, name):
        kind, more = HEADS[name]
        if kind is not ClassIndependentHead:
            more = {**more, "num_classes": CLASSES}
        if kind is ClassConditionalHead:
            more = {**more, "num_slots": 4}
        sizes = []
        for image_size in (MAX_GRID, 64, 256):
            with torch.device("meta"):
                head = kind([(4, image_size), (8, 4)], num_examples=10, width=6, **more)
            sizes.append(sum(p.numel() for p in head.parameters()))
        assert sizes == sizes[:1] * 3
        embedding = 6 * (4 * MAX_GRID**2 + 8 * 4 * 4) + 6
        assert kind is not ClassIndependentHead or sizes[0] == embedding + 10 * 6 + 10 + 1


@pytest.mark.parametrize("count", [2, 600, 5000])
@pytest.mark.filterwarnings("error")
def test_images_that_are_all_alike_start_at_the_origin_without_a_word(count):
    # Their mean, subtracted from them, leaves rounding errors, which must not be taken for distances.
    images = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(count, -1, -1, -1)
    coordinates = principal_coordinates(images, 70)
    assert coordinates.shape == (count, 70)
    assert coordinates.dtype == torch.float64
    assert coordinates.count_nonzero() == 0
    assert starting_log_cap(coordinates) == torch.tensor(math.log(CLEAR_CALL))
