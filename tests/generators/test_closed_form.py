"""The closed form against a plain loop over its formula, its two limits, and Monte Carlo."""

import math

import pytest
import torch

from provgen.generators.closed_form import ClosedFormPosterior, LatentPosterior, entropy, impossible


def by_loop(train, labels, noisy, alpha_bar, given, null_label):
    """softmax_i(-|x_t - sqrt(a) x_i|^2 / (2 (1-a))) over the examples of the given class, number by number."""
    rows = []
    for x, a, label in zip(noisy.double(), alpha_bar.double(), given.tolist(), strict=True):
        logits = [
            -float((x - a.sqrt() * example).square().sum() / (2 * (1 - a)))
            if label in (null_label, of_example)
            else -math.inf
            for example, of_example in zip(train, labels.tolist(), strict=True)
        ]
        most = max(logits)
        weights = [math.exp(logit - most) for logit in logits]
        rows.append([weight / math.fsum(weights) for weight in weights])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture
def images(random_images):
    return random_images(9, num_classes=3, size=4)


@pytest.fixture
def queries(images, generator):
    """x_t of random parents from pure noise to almost the image; labels and null labels in turn."""
    alpha_bar = torch.tensor([1e-4, 0.02, 0.05, 0.1, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64)
    parents = torch.randint(9, (8,), generator=generator)
    clean = images.images[parents].double() / 127.5 - 1
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    a = alpha_bar[:, None, None, None]
    labels = torch.where(torch.arange(8) % 2 == 0, 3, images.labels[parents])
    return a.sqrt() * clean + (1 - a).sqrt() * noise, alpha_bar, labels


def test_it_equals_the_formula(images, queries, closed_form_of):
    train = images.images.double() / 127.5 - 1
    expected = by_loop(train, images.labels, *queries, null_label=3)
    probs = closed_form_of(images).probs(*queries)
    torch.testing.assert_close(probs, expected, rtol=1e-9, atol=1e-14)
    assert ((expected > 0.01) & (expected < 0.99)).sum() > 8, "undecided enough for the test to fail"


def test_float32_is_close_to_float64(images, queries, closed_form_of):
    exact = closed_form_of(images).probs(*queries)
    single = closed_form_of(images, torch.float32).probs(*queries)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-4)


def test_rows_sum_to_one(images, queries, closed_form_of):
    torch.testing.assert_close(
        closed_form_of(images).probs(*queries).sum(1), torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_a_label_leaves_only_its_class_in_the_proportions_of_the_null_row(images, queries, closed_form_of):
    # Without the two cleanest, where the unconditional row leaves nothing for the other classes.
    noisy, alpha_bar = queries[0][:6], queries[1][:6]
    closed_form = closed_form_of(images)
    free = closed_form.probs(noisy, alpha_bar, torch.full((6,), 3))
    for label in range(3):
        given = closed_form.probs(noisy, alpha_bar, torch.full((6,), label))
        members = images.labels == label
        assert not given[:, ~members].any()
        assert free[:, ~members].any()
        expected = free[:, members] / free[:, members].sum(1, keepdim=True)
        torch.testing.assert_close(given[:, members], expected, rtol=1e-6, atol=1e-12)


@pytest.fixture
def covering(images):
    """Make the closed form over the examples 0, 1, 2, 5 and 8 alone."""
    covered = torch.tensor([True, True, True, False, False, True, False, False, True])
    pixels = images.images.double() / 127.5 - 1
    return ClosedFormPosterior(pixels, images.labels, null_label=3, covered=covered), covered


def test_with_coverage_the_covered_keep_their_proportions_and_the_others_get_nothing(
    images, queries, closed_form_of, covering
):
    some, covered = covering
    # Without the cleanest, where an example that is not covered leaves nothing for the others.
    queries = [tensor[:6] for tensor in queries]
    whole, part = closed_form_of(images).probs(*queries), some.probs(*queries)
    assert part.shape == whole.shape
    assert not part[:, ~covered].any()
    assert whole[:, ~covered].any()
    expected = whole[:, covered] / whole[:, covered].sum(1, keepdim=True)
    torch.testing.assert_close(part[:, covered], expected, rtol=1e-6, atol=1e-12)


def test_a_covered_closed_form_is_that_of_the_covered_set(images, queries, closed_form_of, covering):
    some, covered = covering
    alone = closed_form_of(images.select(covered.nonzero().flatten()))
    torch.testing.assert_close(some.probs(*queries)[:, covered], alone.probs(*queries), rtol=1e-9, atol=1e-14)
    chunks = torch.cat(list(some.chunks(*queries)))
    torch.testing.assert_close(chunks, some.probs(*queries), rtol=1e-10, atol=1e-15)


def test_what_is_impossible_is_of_another_class_or_not_covered():
    labels, given = torch.tensor([0, 1, 1, 2]), torch.tensor([1, 2])
    covered = torch.tensor([True, True, False, True])
    expected = [[True, False, False, True], [False, False, False, False]]
    assert impossible(given, labels, 2, None).tolist() == expected
    expected = [[True, False, True, True], [False, False, True, False]]
    assert impossible(given, labels, 2, covered).tolist() == expected


def test_it_is_one_hot_at_the_image(images, closed_form_of):
    train = images.images.double() / 127.5 - 1
    alpha_bar = torch.full((9,), 1 - 1e-6, dtype=torch.float64)
    probs = closed_form_of(images).probs(alpha_bar[0].sqrt() * train, alpha_bar, torch.full((9,), 3))
    torch.testing.assert_close(probs, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-12)


def test_it_is_uniform_in_pure_noise(images, generator, closed_form_of):
    noisy = torch.randn(5, 1, 4, 4, generator=generator, dtype=torch.float64)
    closed_form = closed_form_of(images)
    alpha_bar = torch.full((5,), 1e-12, dtype=torch.float64)
    free = closed_form.probs(noisy, alpha_bar, torch.full((5,), 3))
    torch.testing.assert_close(free, torch.full((5, 9), 1 / 9, dtype=torch.float64), rtol=1e-4, atol=0)
    given = closed_form.probs(noisy, alpha_bar, torch.zeros(5, dtype=torch.int64))
    assert torch.allclose(given[:, images.labels == 0], torch.tensor(1 / 3, dtype=torch.float64), rtol=1e-4)


def test_duplicates_share_their_posterior(random_images, closed_form_of):
    images = random_images(4).select(torch.tensor([0, 1, 1, 2, 1]))
    alpha_bar = torch.tensor([0.99], dtype=torch.float64)
    clean = images.images[1:2].double() / 127.5 - 1
    probs = closed_form_of(images).probs(alpha_bar.sqrt() * clean, alpha_bar, torch.tensor([3]))
    expected = torch.tensor([[0, 1, 1, 0, 1]], dtype=torch.float64) / 3
    torch.testing.assert_close(probs, expected, rtol=0, atol=1e-9)


def test_permuting_the_training_images_permutes_the_columns(images, queries, generator, closed_form_of):
    order = torch.randperm(9, generator=generator)
    before, after = (closed_form_of(s).probs(*queries) for s in (images, images.select(order)))
    torch.testing.assert_close(after, before[:, order], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("bytes_held", [1, 9 * 8, 3 * 9 * 8 + 1, 10**9])
def test_chunks_join_to_the_whole(bytes_held, images, queries, monkeypatch, closed_form_of):
    monkeypatch.setattr("provgen.generators.closed_form.MAX_CHUNK_BYTES", bytes_held)
    closed_form = closed_form_of(images)
    parts = list(closed_form.chunks(*queries))
    assert len(parts) == math.ceil(8 / max(1, min(8, bytes_held // 72)))
    torch.testing.assert_close(torch.cat(parts), closed_form.probs(*queries), rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("is_labelled", [False, True])
@pytest.mark.parametrize("alpha_bar", [0.01, 0.05, 0.2])
def test_the_parents_mean_surprise_is_the_mean_entropy(alpha_bar, is_labelled, images, generator, closed_form_of):
    # E[-log p(parent | x_t)] = E[H(i | x_t)] holds for the exact posterior and for nothing else.
    count = 20_000
    parents = torch.randint(9, (count,), generator=generator)
    clean = images.images[parents].double() / 127.5 - 1
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    labels = images.labels[parents] if is_labelled else torch.full((count,), 3)
    probs = closed_form_of(images).probs(
        alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise, torch.full((count,), alpha_bar), labels
    )
    difference = -probs.gather(1, parents[:, None])[:, 0].log() - entropy(probs)
    assert entropy(probs).mean() > 0.05, "the parent is uncertain"
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / count**0.5


EMPTY_LABELS, EMPTY_NULL = torch.tensor([0, 0, 2]), 4
"""Examples of classes 0 and 2; classes 1 and 3 have none."""


@pytest.fixture(params=["images", "latents"])
def with_empty_classes(request):
    """Make a closed form over three points on a line, with a mask of what is covered."""
    points = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).reshape(3, 1, 1, 1)

    def make(covered=None):
        if request.param == "images":
            return ClosedFormPosterior(points, EMPTY_LABELS, null_label=EMPTY_NULL, covered=covered)
        log_variances = torch.zeros_like(points)
        return LatentPosterior(points, log_variances, EMPTY_LABELS, null_label=EMPTY_NULL, covered=covered)

    return make


def ask_at_zero(posterior, labels):
    """Ask about a query at 0 for each label; alpha_bar of one half makes the widths of both closed forms alike."""
    count = len(labels)
    query = torch.zeros(count, 1, 1, 1, dtype=torch.float64)
    return posterior.probs(query, torch.full((count,), 0.5, dtype=torch.float64), torch.tensor(labels))


def test_a_class_without_examples_has_a_row_of_zeros_and_no_entropy(with_empty_classes):
    probs = ask_at_zero(with_empty_classes(), [0, 1, 2, 3, EMPTY_NULL])
    # Squared distances 1, 0, 1 from the query, halved.
    far = math.exp(-0.5)
    expected = [
        [far / (1 + far), 1 / (1 + far), 0],
        [0, 0, 0],
        [0, 0, 1],
        [0, 0, 0],
        [far / (1 + 2 * far), 1 / (1 + 2 * far), far / (1 + 2 * far)],
    ]
    torch.testing.assert_close(probs, torch.tensor(expected, dtype=torch.float64))
    entropies = [-sum(p * math.log(p) for p in row if p > 0) for row in expected]
    torch.testing.assert_close(entropy(probs), torch.tensor(entropies, dtype=torch.float64))
    assert entropy(probs)[[1, 2, 3]].tolist() == [0, 0, 0]


def test_a_class_whose_examples_are_not_covered_has_a_row_of_zeros(with_empty_classes):
    probs = ask_at_zero(with_empty_classes(torch.tensor([False, True, False])), [0, 1, 2, EMPTY_NULL])
    assert probs.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0]]
    joined = ask_at_zero(with_empty_classes(torch.tensor([False, False, True])), [2, 0])
    assert joined.tolist() == [[0, 0, 1], [0, 0, 0]]


def test_chunks_of_empty_classes_are_those_of_the_whole(with_empty_classes, monkeypatch):
    monkeypatch.setattr("provgen.generators.closed_form.MAX_CHUNK_BYTES", 1)
    query = torch.zeros(4, 1, 1, 1, dtype=torch.float64), torch.full((4,), 0.5), torch.tensor([3, 0, 1, EMPTY_NULL])
    chunks = torch.cat(list(with_empty_classes().chunks(*query)))
    torch.testing.assert_close(chunks, with_empty_classes().probs(*query))
    assert chunks.sum(dim=1).tolist() == pytest.approx([0, 1, 0, 1])


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_entropy_of_a_uniform_row_is_the_log_of_its_length(count):
    assert float(entropy(torch.full((1, count), 1 / count, dtype=torch.float64))) == pytest.approx(math.log(count))


def test_entropy_of_a_certain_row_is_zero():
    assert entropy(torch.eye(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_entropy_of_a_row_of_zeros_is_zero(dtype):
    assert entropy(torch.zeros(2, 5, dtype=dtype)).tolist() == [0, 0]


def test_entropy_of_a_row_that_was_searched_in_part_is_that_of_what_was_found():
    probs = torch.tensor([[0.3, 0.1, 0.0], [0.06, 0.02, 0.0]], dtype=torch.float64)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy(probs).tolist() == pytest.approx([expected, expected])
