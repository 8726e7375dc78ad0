"""Gradient attribution: a plain loop, the projection's mean, the primal form, and a store that resumes."""

import json
from dataclasses import replace

import pytest
import torch

from provgen.data.images import to_unit_range
from provgen.data.random import seeded_generator
from provgen.models.diffusion import make_training_scheduler
from provgen.studies.faithfulness.attributor import Queries
from provgen.studies.faithfulness.gradients import (
    RIDGES,
    GradientDot,
    GradientFeatures,
    GradientStore,
    LossGradients,
    RandomProjection,
    Ridge,
    Trak,
)
from provgen.tracing.trace import NoisyImages

SCHEDULER = make_training_scheduler("linear")


@pytest.fixture(scope="module")
def images(random_images):
    return random_images(9, num_classes=3)


@pytest.fixture(scope="module")
def pixels(images):
    return to_unit_range(images.images)


@pytest.fixture(scope="module")
def denoiser(images, tiny_networks):
    return tiny_networks(images)[0]


def gradients_of(denoiser, target="own", num_timesteps=20, seed=0):
    return LossGradients(denoiser, SCHEDULER, target=target, num_timesteps=num_timesteps, seed=seed)


@pytest.mark.parametrize("way", ["vectorised", "one by one"])
@pytest.mark.parametrize("target", ["own", "zero"])
def test_gradients_are_those_of_a_plain_loop(denoiser, pixels, target, way):
    labels = torch.tensor([0, 2, 3])
    gradients = gradients_of(denoiser, target)
    gradients.way = way
    found = gradients(pixels[:3], labels)
    for row in range(3):
        total = 0
        for timestep in range(0, 1000, 50):
            noise = torch.randn(1, 8, 8, generator=seeded_generator(0, 9, timestep))
            alpha_bar = SCHEDULER.alphas_cumprod[timestep]
            noisy = (alpha_bar.sqrt() * pixels[row] + (1 - alpha_bar).sqrt() * noise)[None]
            output = denoiser(noisy, timestep, class_labels=labels[row : row + 1]).sample[0]
            total = total + (output - (noise if target == "own" else 0)).square().mean() / 20
        by_hand = torch.autograd.grad(total, list(denoiser.parameters()))
        expected = torch.cat([gradient.flatten() for gradient in by_hand])
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-3)


def test_an_image_does_not_depend_on_its_batch(denoiser, pixels):
    gradients, labels = gradients_of(denoiser, num_timesteps=5), torch.arange(9) % 3
    together = gradients(pixels, labels)
    alone = torch.cat([gradients(pixels[[row]], labels[[row]]) for row in range(9)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-4)
    assert together.norm(dim=1).min() > 0.01


def test_a_random_projection_keeps_inner_products_on_average():
    """Mean over 400 projections within five standard errors, whose size the theory gives."""
    features = torch.randn(3, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = features @ features.T
    device = torch.device("cpu")
    draws = torch.stack([
        (s := RandomProjection(500, 64, seed=seed, device=device)(features)) @ s.T for seed in range(400)
    ])  # fmt: skip
    spread = draws.std(dim=0)
    assert ((draws.mean(dim=0) - exact).abs() < 5 * spread / 20).all()
    # Weinberger et al. 2009: variance of <Sa, Sb> is sum_{i != j} (a_i^2 b_j^2 + a_i b_i a_j b_j) / size.
    squares = features.square()
    first, second = squares[0], squares[1]
    crossed = features[0] * features[1]
    variance = (first.sum() * second.sum() - (first * second).sum() + crossed.sum() ** 2 - crossed.square().sum()) / 64
    assert spread[0, 1] == pytest.approx(float(variance.sqrt()), rel=0.15)


def test_a_random_projection_with_enough_columns_only_moves_and_signs():
    projection = RandomProjection(3, 10**6, seed=1, device=torch.device("cpu"))
    row = torch.tensor([[1.0, 2.0, 4.0]])
    assert sorted(projection(row).abs().sum(dim=0).nonzero().flatten().tolist()) == sorted(projection.columns.tolist())
    assert projection(row).abs().sum() == 7
    assert torch.equal(projection(2 * row), 2 * projection(row))


@pytest.fixture
def features(denoiser, tmp_path):
    return GradientFeatures(gradients_of(denoiser, num_timesteps=5), tmp_path / "store", proj_dim=None)


@pytest.fixture
def queries(pixels):
    nothing = NoisyImages(
        images=pixels[None, :4], timesteps=torch.zeros(1, dtype=torch.int64), alpha_bars=torch.ones(1)
    )
    return Queries(images=pixels[:4].flip(3), class_labels=torch.tensor([0, 1, 2, 3]), noisy=nothing)


def test_the_dual_form_is_the_primal_form(denoiser, images, pixels, queries, features):
    method = Trak(features)
    method.fit(images)
    scores = method.attribute(queries)
    gradients = gradients_of(denoiser, num_timesteps=5)
    phi = gradients(pixels, images.labels).double()
    asked = gradients(queries.images, queries.class_labels).double()
    # Equal directions span the whole space; the primal matrix is (parameter, parameter), so keep the first 200.
    basis = torch.linalg.svd(torch.cat([phi, asked]), full_matrices=False).Vh
    phi, asked = phi @ basis.T, asked @ basis.T
    mean = phi.square().sum() / len(phi)
    for ridge in RIDGES:
        matrix = phi.T @ phi + ridge.share * mean * torch.eye(phi.shape[1], dtype=torch.float64)
        expected = asked @ torch.linalg.solve(matrix, phi.T)
        torch.testing.assert_close(scores.under(ridge), expected, atol=1e-4, rtol=1e-3)


def test_dot_products_are_dot_products(denoiser, images, pixels, queries, features):
    method = GradientDot(features)
    method.fit(images)
    gradients = gradients_of(denoiser, num_timesteps=5)
    left = gradients(queries.images, queries.class_labels).double()
    expected = left @ gradients(pixels, images.labels).double().T
    torch.testing.assert_close(method.attribute(queries).values[0], expected, atol=1e-7, rtol=1e-4)


def test_training_images_name_themselves(images, pixels, features, queries):
    own = Queries(images=pixels, class_labels=images.labels, noisy=queries.noisy)
    method = Trak(features)
    method.fit(images)
    assert torch.equal(method.attribute(own).under(Ridge(1e-3)).argmax(dim=1), torch.arange(9))


def test_the_store_goes_on_where_it_was_stopped(denoiser, images, tmp_path, monkeypatch):
    monkeypatch.setattr("provgen.studies.faithfulness.gradients.IMAGES_AT_ONCE", 4)
    gradients = gradients_of(denoiser, num_timesteps=2)
    whole = GradientFeatures(gradients, tmp_path / "whole", proj_dim=32)
    whole.fit(images)

    class Stopped(LossGradients):
        calls = 0

        def __call__(self, images, class_labels):
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(images, class_labels)

    made = {"target": "own", "num_timesteps": 2, "seed": 0}
    part = GradientFeatures(Stopped(denoiser, SCHEDULER, **made), tmp_path / "part", proj_dim=32)
    with pytest.raises(KeyboardInterrupt):
        part.fit(images)
    assert json.loads((tmp_path / "part" / "state.json").read_text())["done"] == 8
    part.fit(images)
    assert part.gradients.calls == 4  # the last batch alone was missing
    assert torch.equal(part.store.rows(0, 9), whole.store.rows(0, 9))
    assert 9 * 32 * 4 < whole.store.num_bytes() < 9 * 32 * 4 + 1000


def test_a_store_of_something_else_is_started_again(denoiser, images, tmp_path):
    for changed in ({"target": "zero"}, {"seed": 1}, {"num_timesteps": 4}):
        made = {"target": "own", "num_timesteps": 2, "seed": 0}
        first = GradientFeatures(gradients_of(denoiser, **made), tmp_path, proj_dim=16)
        first.fit(images)
        before = first.store.rows(0, 9)
        second = GradientFeatures(gradients_of(denoiser, **made | changed), tmp_path, proj_dim=16)
        second.fit(images)
        assert second.store.done == 9
        assert not torch.equal(second.store.rows(0, 9), before)


def test_a_kill_before_the_first_batch_leaves_no_rows_of_something_else(tmp_path):
    first = GradientStore(tmp_path, shape=(4, 2), fingerprint={"weights": "a"})
    first.fill(lambda start, stop: torch.ones(stop - start, 2), batch_size=4)
    assert GradientStore(tmp_path, shape=(4, 2), fingerprint={"weights": "a"}).done == 4
    GradientStore(tmp_path, shape=(4, 2), fingerprint={"weights": "b"})  # and is killed
    assert GradientStore(tmp_path, shape=(4, 2), fingerprint={"weights": "a"}).done == 0


def test_products_and_gram_in_slices(tmp_path):
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    store = GradientStore(tmp_path, shape=(7, 5), fingerprint={})
    store.fill(lambda start, stop: rows[start:stop], batch_size=3)
    torch.testing.assert_close(store.gram(rows_at_once=2), rows.double() @ rows.double().T)
    torch.testing.assert_close(store.products(rows[:2], rows_at_once=3), rows[:2].double() @ rows.double().T)


class LinearGradients:
    """Gradients of the squared error of a linear model that predicts the label from the pixels."""

    device = torch.device("cpu")
    size = 9

    def __init__(self):
        self.model = torch.nn.Linear(8, 1)
        torch.nn.init.normal_(self.model.weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.zeros_(self.model.bias)

    def __call__(self, images, class_labels):
        pixels = images.flatten(1)
        residual = self.model(pixels).detach()[:, 0] - class_labels
        return 2 * residual[:, None] * torch.cat([pixels, torch.ones(len(pixels), 1)], dim=1)

    def fingerprint(self):
        return {}


@pytest.mark.slow
def test_trak_agrees_with_dattri(random_images, tmp_path):
    """Without a ridge TRAK does not see an invertible map, and a projection to as many columns is one.

    So dattri's Gaussian projection drops out, and both give phi_q (Phi^T Phi)^-1 phi_i up to one factor.
    """
    trak, task = pytest.importorskip("dattri.algorithm.trak"), pytest.importorskip("dattri.task")
    images = random_images(40, num_classes=3)
    narrow = replace(images, images=images.images[:, :, :1])  # 1 x 8 pixels
    gradients = LinearGradients()

    def loss(parameters, batch):
        pixels, labels = batch
        return (torch.func.functional_call(gradients.model, parameters, pixels)[..., 0] - labels).square().sum()

    pixels = to_unit_range(narrow.images)
    rows = torch.utils.data.TensorDataset(pixels.flatten(1), narrow.labels.float())
    loader = torch.utils.data.DataLoader(rows, batch_size=8)
    attributor = trak.TRAKAttributor(
        task.AttributionTask(loss_func=loss, model=gradients.model, checkpoints=gradients.model.state_dict()),
        correct_probability_func=lambda _, batch: 0 * batch[1],  # (1 - p) is 1: no classifier
        projector_kwargs={"proj_dim": gradients.size, "device": "cpu"},
    )
    attributor.cache(loader)
    theirs = attributor.attribute(loader).T.double()

    method = Trak(GradientFeatures(gradients, tmp_path, proj_dim=None))
    method.fit(narrow)
    queries = Queries(images=pixels, class_labels=narrow.labels, noisy=NoisyImages(
        images=pixels[None, :0], timesteps=torch.zeros(1, dtype=torch.int64), alpha_bars=torch.ones(1)
    ))  # fmt: skip
    ours = method.attribute(queries).under(Ridge(1e-6))
    scale = (ours * theirs).sum() / theirs.square().sum()
    torch.testing.assert_close(ours, scale * theirs, atol=2e-3, rtol=2e-2)
    assert torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1] > 0.999
