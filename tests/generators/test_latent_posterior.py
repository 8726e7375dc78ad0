"""The latent closed form against densities one by one, its invariances, and the encoder it is made from."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal

from provgen.generators.closed_form import LatentPosterior
from provgen.models.vae import latent_shape, make_vae

NULL = 3
TRAIN, QUERIES = 9, 8


@pytest.fixture
def encoded(generator):
    """Means, log-variances and labels of nine overlapping Gaussians in six dimensions, of widely different widths."""
    means = torch.randn(TRAIN, 6, 1, 1, generator=generator, dtype=torch.float64)
    log_variances = torch.randn(means.shape, generator=generator, dtype=torch.float64)
    return means, log_variances, torch.arange(TRAIN) % 3


@pytest.fixture
def queries(encoded, generator):
    """Latents drawn from random examples; labels and null labels in turn."""
    means, log_variances, labels = encoded
    parents = torch.randint(TRAIN, (QUERIES,), generator=generator)
    noise = torch.randn(QUERIES, 6, 1, 1, generator=generator, dtype=torch.float64)
    latents = means[parents] + (log_variances[parents] / 2).exp() * noise
    given = torch.where(torch.arange(QUERIES) % 2 == 0, NULL, labels[parents])
    return latents, torch.full((QUERIES,), 0.9999), given


def make(encoded, **more):
    return LatentPosterior(*encoded, null_label=NULL, **more)


def by_density(encoded, latents, given, allowed):
    """q(z | x_i) / sum_j q(z | x_j) over allowed examples of the given class, density by density."""
    means, log_variances, labels = encoded
    rows = []
    for z, label in zip(latents, given.tolist(), strict=True):
        densities = [
            float(Independent(Normal(mean, (log_variance / 2).exp()), 3).log_prob(z).exp())
            if ok and label in (NULL, of_example)
            else 0.0
            for mean, log_variance, of_example, ok in zip(
                means, log_variances, labels.tolist(), allowed.tolist(), strict=True
            )
        ]
        rows.append([density / math.fsum(densities) for density in densities])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("missing", [[], [0, 4]])
def test_it_equals_the_ratio_of_densities(encoded, queries, missing):
    latents, alpha_bar, given = queries
    covered = torch.ones(TRAIN, dtype=torch.bool)
    covered[missing] = False
    expected = by_density(encoded, latents, given, covered)
    probs = make(encoded, covered=covered if missing else None).probs(latents, alpha_bar, given)
    torch.testing.assert_close(probs, expected, rtol=1e-10, atol=1e-14)
    assert ((expected > 0.01) & (expected < 0.99)).sum() > 12, "undecided enough for the test to fail"
    logits = make(encoded).logits(latents, alpha_bar, given)
    everyone = by_density(encoded, latents, given, torch.ones(TRAIN, dtype=torch.bool))
    torch.testing.assert_close(logits.softmax(1), everyone, rtol=1e-10, atol=1e-14)


def test_float32_is_close_to_float64(encoded, queries):
    means, log_variances, labels = encoded
    single = make((means.float(), log_variances.float(), labels)).probs(*queries)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), make(encoded).probs(*queries), rtol=0, atol=1e-5)


def test_a_label_leaves_only_its_class_in_the_proportions_of_the_null_row(encoded, queries):
    latents, alpha_bar, _ = queries
    free = make(encoded).probs(latents, alpha_bar, torch.full((QUERIES,), NULL))
    for label in range(3):
        given = make(encoded).probs(latents, alpha_bar, torch.full((QUERIES,), label))
        members = encoded[2] == label
        assert not given[:, ~members].any()
        expected = free[:, members] / free[:, members].sum(1, keepdim=True)
        torch.testing.assert_close(given[:, members], expected, rtol=1e-8, atol=1e-12)


def test_permuting_the_examples_permutes_the_columns(encoded, queries, generator):
    order = torch.randperm(TRAIN, generator=generator)
    permuted = make(tuple(part[order] for part in encoded)).probs(*queries)
    torch.testing.assert_close(permuted, make(encoded).probs(*queries)[:, order], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("bytes_held", [1, 9 * 8, 3 * 9 * 8 + 1, 10**9])
def test_chunks_join_to_the_whole(encoded, queries, bytes_held, monkeypatch):
    monkeypatch.setattr("provgen.generators.closed_form.MAX_CHUNK_BYTES", bytes_held)
    parts = list(make(encoded).chunks(*queries))
    assert len(parts) == math.ceil(QUERIES / max(1, min(QUERIES, bytes_held // 72)))
    torch.testing.assert_close(torch.cat(parts), make(encoded).probs(*queries), rtol=1e-10, atol=1e-14)


def test_far_clusters_share_out_their_own_members_only():
    # Two clusters 40 standard deviations apart: three equal Gaussians here, two there.
    means = torch.tensor([[-20.0, 0], [-20, 0], [-20, 0], [20, 0], [20, 0]], dtype=torch.float64)
    far = LatentPosterior(means, torch.zeros_like(means), torch.zeros(5, dtype=torch.int64), null_label=NULL)
    latents = torch.tensor([[-19.0, 1], [21, -2]], dtype=torch.float64)
    probs = far.probs(latents, torch.ones(2), torch.full((2,), NULL))
    expected = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0, 0], [0, 0, 0, 1 / 2, 1 / 2]], dtype=torch.float64)
    torch.testing.assert_close(probs, expected, rtol=0, atol=1e-12)


def test_of_two_gaussians_at_one_place_the_narrow_one_owns_the_middle():
    # q(0 | narrow) : q(0 | wide) = 10 : 1, and at z = 3 the wide one has everything.
    log_variances = torch.tensor([[0.01], [1.0]], dtype=torch.float64).log()
    both = LatentPosterior(
        torch.zeros_like(log_variances), log_variances, torch.zeros(2, dtype=torch.int64), null_label=NULL
    )
    latents = torch.tensor([[0.0], [3.0]], dtype=torch.float64)
    probs = both.probs(latents, torch.ones(2), torch.full((2,), NULL))
    torch.testing.assert_close(
        probs, torch.tensor([[10 / 11, 1 / 11], [0, 1]], dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_the_parents_mean_surprise_is_the_mean_entropy(encoded, generator):
    # E[-log p(parent | z)] = E[H(i | z)] holds for the exact posterior and for nothing else.
    means, log_variances, _ = encoded
    count = 20_000
    parents = torch.randint(TRAIN, (count,), generator=generator)
    noise = torch.randn(count, 6, 1, 1, generator=generator, dtype=torch.float64)
    latents = means[parents] + (log_variances[parents] / 2).exp() * noise
    probs = make(encoded).probs(latents, torch.ones(count), torch.full((count,), NULL))
    entropy = -torch.special.xlogy(probs, probs).sum(1)
    difference = -probs.gather(1, parents[:, None])[:, 0].log() - entropy
    assert entropy.mean() > 0.05, "the parent is uncertain"
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / count**0.5


@torch.no_grad()
def test_it_is_made_from_the_encoder_in_batches(random_images, generator, monkeypatch):
    monkeypatch.setattr("provgen.generators.closed_form.ENCODED_AT_ONCE", 4)
    torch.manual_seed(0)
    vae = make_vae("tiny", image_size=8, image_channels=1)
    images = random_images(TRAIN).images.double() / 127.5 - 1
    labels = torch.arange(TRAIN) % 3
    covered = torch.arange(TRAIN) != 2
    made = LatentPosterior.of(
        vae,
        images,
        labels,
        null_label=NULL,
        dtype=torch.float64,
        device=torch.device("cpu"),
        covered=covered,
    )
    encoded = vae.encode(images.float()).latent_dist
    latents = torch.randn(QUERIES, *latent_shape(vae), generator=generator, dtype=torch.float64)
    given = torch.arange(QUERIES) % 4
    expected = by_density((encoded.mean.double(), encoded.logvar.double(), labels), latents, given, covered)
    probs = made.probs(latents, torch.ones(QUERIES), given)
    assert probs.dtype == torch.float64
    torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-9)
