"""Variance credit: against leaving out one by one, shared by copies, and kept with the pipeline."""

import json

import pytest
import torch

from provgen.models.credit import CreditHead, credit_kernel
from provgen.studies.faithfulness.attributor import Queries
from provgen.studies.faithfulness.credit import CalibratedTrace, VarianceCredit, pixel_coordinates
from provgen.tracing import gaussian_process as credit_process
from provgen.tracing.gaussian_process import EVERYTHING, PIXELS, FittedKernel, Kernel, Parts
from provgen.tracing.noisy_queries import NoisyQueries

NULL = 3


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def points():
    return rand(20, 5)


@pytest.fixture
def labels():
    return torch.arange(20) % NULL


def kernel_of(fitted, first, first_labels, second, second_labels):
    return credit_kernel(
        first * fitted.scale, first_labels, second * fitted.scale, second_labels,
        across=fitted.kernel.across, null_label=NULL,
        num_gradients=fitted.parts.num_gradients, gradient_share=fitted.kernel.gradient_share,
    )  # fmt: skip


def variance(fitted, query, label, points, labels, ridge):
    """Of a Gaussian process at one query, from its definition."""
    near = kernel_of(fitted, query[None], label[None], points, labels)
    observed = kernel_of(fitted, points, labels, points, labels) + ridge * torch.eye(len(points)).double()
    own = kernel_of(fitted, query[None], label[None], query[None], label[None])
    return float(own - near @ torch.linalg.solve(observed, near.T))


@pytest.mark.parametrize(("across", "gradients"), [(1.0, 0.0), (0.5, 0.0), (0.0, 0.0), (0.5, 0.25), (0.5, 1.0)])
def test_it_is_what_the_variance_grows_by_when_each_example_is_left_out(points, labels, across, gradients):
    kernel = Kernel(bandwidth=0.8, across=across, gradient_share=gradients)
    parts = Parts(places=(3,), num_gradients=2)
    fitted = FittedKernel(points, labels, kernel, null_label=NULL, parts=parts)
    queries, asked = rand(4, 5, seed=1), torch.tensor([0, 1, 2, 0])
    ridge = 0.7
    head = fitted.credit_head(ridge)
    shares = head(queries.float()[:, : len(head.scale)], asked)
    assert len(head.scale) == (5 if gradients else 3), "gradients that do not count are not asked for"
    for query, label, share in zip(queries, asked, shares, strict=True):
        with_all = variance(fitted, query, label, points, labels, ridge)
        rows = [torch.arange(20) != left_out for left_out in range(20)]
        grown = [variance(fitted, query, label, points[some], labels[some], ridge) - with_all for some in rows]
        expected = torch.tensor(grown, dtype=torch.float64) / sum(grown)
        torch.testing.assert_close(share.double(), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(4))


def test_parts_are_weighed_in_units_of_their_own_spread(points, labels):
    """Scaling a part, or adding one of no weight, changes nothing; half and half is the mean of squared distances."""
    parts, queries, asked = Parts(places=(2, 3)), rand(4, 5, seed=1).float(), torch.tensor([0, 1, 2, 0])

    def shares(points, queries, shares, parts=parts):
        kernel = Kernel(bandwidth=0.8, across=0.5, shares=shares)
        fitted = FittedKernel(points, labels, kernel, null_label=NULL, parts=parts)
        return fitted.credit_head(1.0)(queries, asked)

    factor = torch.tensor([1.0, 1.0, 7.0, 7.0, 7.0])
    for given in ((0.5, 0.5), (0.25, 0.75)):
        scaled = shares(points * factor, queries * factor, given)
        torch.testing.assert_close(scaled, shares(points, queries, given), atol=1e-5, rtol=1e-4)
    first = shares(points[:, :2], queries[:, :2], (1.0,), parts=None)
    torch.testing.assert_close(shares(points, queries, (1.0, 0.0)), first, atol=1e-5, rtol=1e-4)
    flat = torch.cat([points[:, :2], torch.ones(20, 3)], dim=1)
    assert Kernel(bandwidth=1.0, across=1.0, shares=(0.5, 0.5)).scale(flat, parts)[2:].tolist() == [0, 0, 0]
    scale = Kernel(bandwidth=1.0, across=1.0, shares=(0.5, 0.5)).scale(points, parts)
    squares = torch.cdist(points * scale, points * scale).square()
    parts = [torch.cdist(part, part).square() for part in points.split(parts.places, dim=1)]
    torch.testing.assert_close(squares, sum(part / part.mean() for part in parts) / 2)


def test_directions_of_gradients_count_by_their_cosine(points, labels):
    parts = Parts(places=(2,), num_gradients=3)
    kernel = Kernel(bandwidth=0.8, across=0.5, gradient_share=0.25)
    directions = points[:, 2:] / points[:, 2:].norm(dim=1, keepdim=True)
    directed = torch.cat([points[:, :2], directions], dim=1)
    fitted = FittedKernel(directed, labels, kernel, null_label=NULL, parts=parts)
    found = kernel_of(fitted, directed, labels, directed, labels)
    places = FittedKernel(points[:, :2], labels, Kernel(bandwidth=0.8, across=0.5), null_label=NULL)
    near = kernel_of(places, points[:, :2], labels, points[:, :2], labels)
    cosines = torch.cosine_similarity(points[:, None, 2:], points[None, :, 2:], dim=2)
    torch.testing.assert_close(found, 0.75 * near + 0.25 * cosines)
    torch.testing.assert_close(found.diagonal(), torch.ones(20).double())
    without = Kernel(bandwidth=0.8, across=0.5).scale(directed, parts)
    assert without[2:].tolist() == [0, 0, 0]


def test_copies_share_the_credit_that_one_would_have(points, labels):
    """Two copies observe the same twice: together less than twice as much is lost with either."""
    kernel = Kernel(bandwidth=0.5, across=1.0)
    query, asked = points[:1].float(), labels[:1]
    alone = FittedKernel(points, labels, kernel, null_label=NULL).credit_head(0.3)(query, asked)[0]
    doubled, twice = torch.cat([points, points[:1]]), torch.cat([labels, labels[:1]])
    shared = FittedKernel(doubled, twice, kernel, null_label=NULL).credit_head(0.3)(query, asked)[0]
    assert shared[0] == pytest.approx(float(shared[20]), rel=1e-3)
    assert shared[0] < 0.75 * alone[0]
    assert alone.argmax() == 0


def test_a_class_of_its_own_has_all_the_credit(points, labels):
    fitted = FittedKernel(points, labels, Kernel(bandwidth=1.0, across=0.0), null_label=NULL)
    head = fitted.credit_head(1.0)
    is_conditional = head(points[:1].float(), torch.tensor([1]))[0]
    assert is_conditional[labels != 1].max() < 1e-6
    untold = head(points[:1].float(), torch.tensor([NULL]))[0]
    assert untold[labels != 1].max() > 1e-3


def test_few_landmarks_are_nearly_as_good_on_points_that_few_describe(monkeypatch):
    points = rand(60, 2)
    labels, queries = torch.zeros(60).long(), rand(5, 2, seed=3).float()
    kernel, asked = Kernel(bandwidth=2.0, across=1.0), torch.zeros(5).long()
    exact = FittedKernel(points, labels, kernel, null_label=1).credit_head(1.0)(queries, asked)
    monkeypatch.setattr(credit_process, "MAX_LANDMARKS", 25)
    few = FittedKernel(points, labels, kernel, null_label=1).credit_head(1.0)
    assert few.readout.shape == (25, 60)
    torch.testing.assert_close(few(queries, asked), exact, atol=2e-3, rtol=0.05)


def test_a_query_far_from_everything_has_equal_sources(points, labels):
    head = FittedKernel(points, labels, Kernel(bandwidth=0.5, across=1.0), null_label=NULL).credit_head(1.0)
    torch.testing.assert_close(head(torch.full((1, 5), 1e4), torch.tensor([0])), torch.full((1, 20), 1 / 20))


def test_the_head_is_saved_and_loaded(points, labels, tmp_path):
    kernel, parts = Kernel(bandwidth=0.8, across=0.5, gradient_share=0.25), Parts((3,), num_gradients=2)
    head = FittedKernel(points, labels, kernel, null_label=NULL, parts=parts).credit_head(1.0)
    head.save_pretrained(tmp_path)
    again = CreditHead.from_pretrained(tmp_path)
    queries, asked = rand(3, 5, seed=4).float(), torch.tensor([0, 1, NULL])
    assert torch.equal(again(queries, asked), head(queries, asked))
    assert again.config.process == "s=0.8 apart, across classes 0.5, gradients 0.25, lambda=1"


def test_a_head_from_before_there_were_gradients_is_loaded(points, labels, tmp_path):
    head = FittedKernel(points, labels, Kernel(bandwidth=0.8, across=0.5), null_label=NULL).credit_head(1.0)
    head.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("num_gradients", "gradient_share", "level_power", "process"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = CreditHead.from_pretrained(tmp_path)
    queries, asked = rand(3, 5, seed=4).float(), torch.tensor([0, 1, NULL])
    assert torch.equal(again(queries, asked), head(queries, asked))
    assert (again.config.num_gradients, again.config.process) == (0, "")


def test_the_attributor_asks_every_process_or_the_one_that_is_wanted(random_images):
    train, some = random_images(15, num_classes=NULL), random_images(4, num_classes=NULL, seed=2)
    images = some.images.float() / 127.5 - 1
    noisy = NoisyQueries(images=images[None], timesteps=torch.zeros(1).long(), alpha_bar=torch.ones(1))
    queries = Queries(images=images, class_labels=some.labels, noisy=noisy)
    method = VarianceCredit(pixel_coordinates)
    method.fit(train)
    everything = method.attribute(queries)
    assert len(set(everything.settings)) == len(PIXELS.processes) == 27
    torch.testing.assert_close(everything.values.sum(dim=2), torch.ones(27, 4))
    for name in everything.settings[::11]:
        assert torch.equal(method.attribute(queries, name).of(name), everything.of(name))
    process = PIXELS.processes[13]
    by_head = method.credit_head(process)(images.flatten(1), some.labels)
    torch.testing.assert_close(everything.of(process.name), by_head, atol=1e-5, rtol=1e-3)
    head = method.credit_head(process)
    head.register_to_config(level_power=2)
    kept = CalibratedTrace(head, pixel_coordinates).attribute(queries)
    setting = f"{process.name}, levels by (a / (1 - a))^2"
    assert (kept.settings, kept.distance_to_default) == ((setting,), (0,))
    assert torch.equal(kept.of(setting), by_head)
    kinds = method.attribute_all({"all": queries, "first": queries.first(2)})
    assert torch.equal(kinds["all"].values, everything.values)
    torch.testing.assert_close(kinds["first"].values, everything.values[:, :2], atol=1e-6, rtol=1e-4)
    assert len({process.name for process in EVERYTHING.processes}) == 243
    far = dict(zip(everything.settings, everything.distance_to_default, strict=True))
    assert far["s=1 apart, across classes 0.5, lambda=3"] == 0
    assert far["s=0.7 apart, across classes 0.5, lambda=10"] == 2
    assert (
        method.attribute(queries, everything.settings[0]).distance_to_default
        == everything.distance_to_default[:1]
        == (3,)
    )
    far = dict(zip((process.name for process in EVERYTHING.processes), EVERYTHING.steps, strict=True))
    assert far["s=1 apart, across classes 0.5, pixels 0.5, lambda=3"] == 0
    assert far["s=1 apart, across classes 0.5, pixels 0.5, gradients 0.5, lambda=3"] == 2
    assert method.kept().num_bytes == 4 * 15 * (64 + 15)
