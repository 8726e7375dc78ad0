"""The head's form is the closed form's: with the exact coordinates it reproduces it, digit by digit."""

import math

import pytest
import torch

from provgen.models.index_heads import CLEAR_CALL, MAX_GRID, ClassIndependentHead, StageEmbedding

NO_LABELS = torch.empty(0, dtype=torch.int64)  # this head looks at none
LEVELS = torch.tensor([0.01, 0.3, 0.6, 0.95, 0.999], dtype=torch.float64)


def unit_images(images):
    return images.images.double() / 127.5 - 1


def exact_head(train: torch.Tensor, *, width=64) -> ClassIndependentHead:
    """A head on the images themselves whose embedding is set by hand to their principal coordinates."""
    _, channels, size, _ = train.shape
    head = ClassIndependentHead([(channels, size)], num_examples=len(train), width=width).double()
    head.start(train, NO_LABELS)
    rows = train.flatten(1)
    # prototypes = (x_i - mean) P for an isometry P on the span of the training images; P from least squares.
    projection = torch.linalg.pinv(rows - rows.mean(0)) @ head.prototypes
    with torch.no_grad():
        head.embedding.projection.weight.copy_(projection.T)
        head.log_cap.fill_(math.log(1e15))
    return head


def noised(train, generator, queries=20):
    """Random x_t of random parents at every level, with their levels."""
    parents = torch.randint(len(train), (queries,), generator=generator)
    signal = LEVELS.repeat(queries // len(LEVELS))
    noise = torch.randn(queries, *train.shape[1:], generator=generator, dtype=torch.float64)
    a = signal[:, None, None, None]
    return a.sqrt() * train[parents] + (1 - a).sqrt() * noise, signal


def head_log_probs(head, train, noisy, signal):
    # From the origin of the principal coordinates: the mean image, faded like the images themselves.
    centred = noisy - signal.sqrt()[:, None, None, None] * train.mean(0)
    with torch.no_grad():
        return head([centred], signal, NO_LABELS, None).log_softmax(dim=1)


@pytest.mark.parametrize("count", [5, 12])
def test_exact_coordinates_without_a_cap_reproduce_the_closed_form(
    count, random_images, closed_form_of, generator
):
    images = random_images(count)
    train = unit_images(images)
    noisy, signal = noised(train, generator)
    null = torch.full((len(noisy),), images.num_classes)
    expected = closed_form_of(images).probs(noisy, signal, null)
    actual = head_log_probs(exact_head(train), train, noisy, signal)
    torch.testing.assert_close(actual.exp(), expected, rtol=1e-8, atol=1e-12)
    # Log-probabilities too, where the closed form is far from underflow.
    is_plain = expected > 1e-200
    torch.testing.assert_close(actual[is_plain], expected[is_plain].log(), rtol=1e-9, atol=1e-7)
    assert is_plain.sum() > 2 * len(noisy), "the examples compete, so that the test can fail"


def test_the_learned_cap_softens_and_never_sharpens(random_images, generator):
    train = unit_images(random_images(8))
    noisy, signal = noised(train, generator)
    head = exact_head(train)
    free = head_log_probs(head, train, noisy, signal)
    with torch.no_grad():
        head.log_cap.fill_(math.log(0.05))
    capped = head_log_probs(head, train, noisy, signal)
    assert torch.equal(free.argmax(1), capped.argmax(1))
    assert (torch.special.entr(capped.exp()).sum(1) > torch.special.entr(free.exp()).sum(1)).all()


def test_permuting_the_training_images_permutes_the_columns(random_images, generator):
    train = unit_images(random_images(9))
    order = torch.randperm(9, generator=generator)
    noisy, signal = noised(train, generator)
    before = head_log_probs(exact_head(train), train, noisy, signal)
    after = head_log_probs(exact_head(train[order]), train[order], noisy, signal)
    torch.testing.assert_close(after, before[:, order], rtol=1e-9, atol=1e-8)


def test_prototypes_start_with_the_distances_of_the_images(random_images):
    train = unit_images(random_images(12))
    head = ClassIndependentHead([(1, 8)], num_examples=12, width=64).double()
    head.start(train, NO_LABELS)
    rows = train.flatten(1)
    torch.testing.assert_close(torch.pdist(head.prototypes.detach()), torch.pdist(rows))
    half_norms = (rows - rows.mean(0)).square().sum(1) / 2
    torch.testing.assert_close(head.bias.detach(), half_norms)


def test_a_narrow_head_keeps_the_largest_principal_coordinates(random_images):
    train = unit_images(random_images(12))
    head = ClassIndependentHead([(1, 8)], num_examples=12, width=3).double()
    head.start(train, NO_LABELS)
    rows = train.flatten(1)
    kept = torch.linalg.svdvals(head.prototypes.detach())
    torch.testing.assert_close(kept, torch.linalg.svdvals(rows - rows.mean(0))[:3])


def test_the_cap_starts_where_neighbors_are_clear_calls():
    # Points on a line at distance 4 from one another: CLEAR_CALL nats are cap x 4^2 / 2.
    train = torch.zeros(6, 1, 4, 4, dtype=torch.float64)
    train[:, 0, 0, 0] = 4 * torch.arange(6)
    head = ClassIndependentHead([(1, 4)], num_examples=6, width=4).double()
    head.start(train, NO_LABELS)
    assert float(head.log_cap.detach().exp()) * 4**2 / 2 == pytest.approx(CLEAR_CALL)


def test_duplicates_in_the_training_set_leave_the_cap_finite(random_images):
    train = unit_images(random_images(4)).repeat(3, 1, 1, 1)
    head = ClassIndependentHead([(1, 8)], num_examples=12, width=8).double()
    head.start(train, NO_LABELS)
    assert head.log_cap.isfinite()


def test_stages_add_up_and_large_ones_are_pooled(generator):
    shapes = [(2, 16), (3, 8), (4, 4)]
    embedding = StageEmbedding(shapes, width=5).double()
    stages = [torch.randn(7, c, s, s, generator=generator, dtype=torch.float64) for c, s in shapes]
    pooled = stages[0].reshape(7, 2, 8, 2, 8, 2).mean(dim=(3, 5))
    weights = embedding.projection.weight.split([2 * 64, 3 * 64, 4 * 16], dim=1)
    parts = zip([pooled, *stages[1:]], weights, strict=True)
    expected = sum(stage.flatten(1) @ weight.T for stage, weight in parts) + embedding.projection.bias
    torch.testing.assert_close(embedding(stages), expected)


@pytest.mark.parametrize("image_size", [16, 64, 256])
def test_the_size_of_a_head_does_not_grow_with_the_image(image_size):
    with torch.device("meta"):
        head = ClassIndependentHead([(4, image_size), (8, 4)], num_examples=10, width=6)
    embedding = 6 * (4 * MAX_GRID**2 + 8 * 4 * 4) + 6
    assert sum(p.numel() for p in head.parameters()) == embedding + 10 * 6 + 10 + 1


def test_a_fresh_embedding_says_nothing():
    head = ClassIndependentHead([(1, 8)], num_examples=5, width=4)
    logits = head([torch.randn(3, 1, 8, 8)], torch.tensor([0.1, 0.5, 0.9]), NO_LABELS, None)
    assert torch.equal(logits, torch.zeros(3, 5))
