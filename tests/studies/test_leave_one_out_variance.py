"""Leave-one-out variance: against leaving out one by one, shared by copies, and kept with the pipeline."""

import pytest
import torch

from provgen.models.credit import CreditHead, GaussianProcess, Kernel, kernel_matrix
from provgen.studies.faithfulness.attributor import Queries
from provgen.studies.faithfulness.credit import CalibratedTrace, VarianceAttributor, pixel_features
from provgen.tracing import gaussian_process
from provgen.tracing.gaussian_process import EVERYTHING, PIXELS, FeatureParts, FittedKernel, feature_scale
from provgen.tracing.trace import NoisyImages

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
    return kernel_matrix(
        first * fitted.scale, first_labels, second * fitted.scale, second_labels, fitted.kernel,
        null_label=NULL, num_gradients=fitted.parts.num_gradients,
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
    parts = FeatureParts((3,), num_gradients=2)
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
    parts, queries, asked = FeatureParts((2, 3)), rand(4, 5, seed=1).float(), torch.tensor([0, 1, 2, 0])

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
    assert feature_scale(Kernel(1.0, 1.0, (0.5, 0.5)), flat, parts)[2:].tolist() == [0, 0, 0]
    scale = feature_scale(Kernel(1.0, 1.0, (0.5, 0.5)), points, parts)
    squares = torch.cdist(points * scale, points * scale).square()
    parts = [torch.cdist(part, part).square() for part in points.split(parts.distances, dim=1)]
    torch.testing.assert_close(squares, sum(part / part.mean() for part in parts) / 2)


def test_normalised_gradients_count_by_their_cosine(points, labels):
    parts = FeatureParts((2,), num_gradients=3)
    kernel = Kernel(bandwidth=0.8, across=0.5, gradient_share=0.25)
    gradients = points[:, 2:] / points[:, 2:].norm(dim=1, keepdim=True)
    normalised = torch.cat([points[:, :2], gradients], dim=1)
    fitted = FittedKernel(normalised, labels, kernel, null_label=NULL, parts=parts)
    found = kernel_of(fitted, normalised, labels, normalised, labels)
    places = FittedKernel(points[:, :2], labels, Kernel(bandwidth=0.8, across=0.5), null_label=NULL)
    near = kernel_of(places, points[:, :2], labels, points[:, :2], labels)
    cosines = torch.cosine_similarity(points[:, None, 2:], points[None, :, 2:], dim=2)
    torch.testing.assert_close(found, 0.75 * near + 0.25 * cosines)
    torch.testing.assert_close(found.diagonal(), torch.ones(20).double())
    without = feature_scale(Kernel(bandwidth=0.8, across=0.5), normalised, parts)
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
    monkeypatch.setattr(gaussian_process, "MAX_LANDMARKS", 25)
    few = FittedKernel(points, labels, kernel, null_label=1).credit_head(1.0)
    assert few.landmarks.shape == (25, 2)
    assert few.readout.shape == (few.projection.shape[1], 60)
    torch.testing.assert_close(few(queries, asked), exact, atol=2e-3, rtol=0.05)


def test_a_head_of_few_directions_is_nearly_as_good_on_points_that_few_describe(monkeypatch):
    """With all directions it is the exact one; of very many images those of largest variance are kept."""
    points, ridge = rand(60, 2), 1.0
    labels, queries = torch.zeros(60).long(), rand(8, 2, seed=3)
    fitted = FittedKernel(points, labels, Kernel(bandwidth=2.0, across=1.0), null_label=1)
    exact, asked = fitted.credit(queries, torch.zeros(8).long(), ridge), torch.zeros(8).long()
    whole = fitted.credit_head(ridge)
    assert whole.readout.shape == (len(fitted.variances), 60)
    torch.testing.assert_close(whole(queries.float(), asked).double(), exact, atol=1e-5, rtol=1e-3)
    errors = []
    for rank in (6, 12):
        monkeypatch.setattr(gaussian_process, "MAX_READOUT", rank * 60 + 59)
        few = fitted.credit_head(ridge)
        assert (few.projection.shape, few.readout.shape, few.config.rank) == ((60, rank), (rank, 60), rank)
        shares = few(queries.float(), asked).double()
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(8).double())
        for found, expected in zip(shares, exact, strict=True):
            assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.9
        errors.append(float((shares - exact).abs().max()))
    assert errors[0] > errors[1]
    # Fewer than any read-out holds: one direction, whose read-outs at two examples are in one ratio for all queries.
    monkeypatch.setattr(gaussian_process, "MAX_READOUT", 1)
    one = fitted.credit_head(ridge)(queries.float(), asked)
    assert fitted.credit_head(ridge).config.rank == 1
    torch.testing.assert_close(one, one[:1].expand(8, -1))


@pytest.mark.parametrize("across", [0.0, 0.5])
def test_directions_are_kept_by_variance_with_few_landmarks_as_well(across, points, labels, monkeypatch):
    """Of landmarks alone the vectors are turned first, so that what is left out is the least."""
    monkeypatch.setattr(gaussian_process, "MAX_LANDMARKS", 12)
    fitted = FittedKernel(points, labels, Kernel(bandwidth=2.0, across=across), null_label=NULL)
    gram = fitted.vectors.T @ fitted.vectors
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-9, rtol=0)
    torch.testing.assert_close(gram.diagonal(), fitted.variances)
    monkeypatch.setattr(gaussian_process, "MAX_READOUT", 5 * 20)
    head = fitted.credit_head(0.5)
    asked, queries = torch.tensor([0, 1, 2, NULL]), rand(4, 5, seed=1)
    # By hand: the five directions of largest variance, with leverages of all of them.
    largest = fitted.variances.sort(descending=True).indices[:5]
    near = kernel_of(fitted, queries, asked, fitted.landmarks / fitted.scale, fitted.landmark_labels)
    weights = (near @ fitted.whitening[:, largest]) / (fitted.variances[largest] + 0.5)
    leverages = (fitted.vectors.square() / (fitted.variances + 0.5)).sum(dim=1)
    squares = (weights @ fitted.vectors[:, largest].T).square() / (1 - leverages)
    expected = (squares / squares.sum(dim=1, keepdim=True)).float()
    torch.testing.assert_close(head(queries.float(), asked), expected, atol=1e-4, rtol=1e-3)


def test_a_query_far_from_everything_has_equal_sources(points, labels):
    head = FittedKernel(points, labels, Kernel(bandwidth=0.5, across=1.0), null_label=NULL).credit_head(1.0)
    torch.testing.assert_close(head(torch.full((1, 5), 1e4), torch.tensor([0])), torch.full((1, 20), 1 / 20))


def test_the_head_is_saved_and_loaded(points, labels, tmp_path):
    kernel, parts = Kernel(bandwidth=0.8, across=0.5, gradient_share=0.25), FeatureParts((3,), num_gradients=2)
    head = FittedKernel(points, labels, kernel, null_label=NULL, parts=parts).credit_head(1.0)
    head.save_pretrained(tmp_path)
    again = CreditHead.from_pretrained(tmp_path)
    queries, asked = rand(3, 5, seed=4).float(), torch.tensor([0, 1, NULL])
    assert torch.equal(again(queries, asked), head(queries, asked))
    assert again.process == head.process == GaussianProcess(kernel, 1.0)


def test_the_attributor_asks_every_process_or_the_one_that_is_wanted(random_images):
    train, some = random_images(15, num_classes=NULL), random_images(4, num_classes=NULL, seed=2)
    images = some.images.float() / 127.5 - 1
    noisy = NoisyImages(images=images[None], timesteps=torch.zeros(1).long(), alpha_bars=torch.ones(1))
    queries = Queries(images=images, class_labels=some.labels, noisy=noisy)
    method = VarianceAttributor(pixel_features)
    method.fit(train)
    everything = method.attribute(queries)
    assert everything.settings == tuple(PIXELS.settings) == method.settings
    assert len(set(everything.settings)) == 27
    torch.testing.assert_close(everything.values.sum(dim=2), torch.ones(27, 4))
    for process in everything.settings[::11]:
        assert torch.equal(method.attribute(queries, process).values[0], everything.under(process))
    process = everything.settings[13]
    head = method.variance.fitted(process.kernel).credit_head(process.ridge)
    by_head = head(images.flatten(1), some.labels)
    torch.testing.assert_close(everything.under(process), by_head, atol=1e-5, rtol=1e-3)
    head.register_to_config(calibration_seconds=3.0)
    calibrated = CalibratedTrace(head, pixel_features)
    assert torch.equal(calibrated.attribute(queries).under(process), by_head)
    assert calibrated.kept().seconds == 3, "the set-up of a calibrated trace is its calibration"
    assert method.attribute(queries, everything.settings[0]).distance_to_default == everything.distance_to_default[:1]
    assert method.kept().num_bytes == 4 * 15 * (64 + 15)


def test_the_default_process_is_the_middle_one_without_gradients():
    assert PIXELS.settings[GaussianProcess(Kernel(1.0, 0.5), 3.0)] == 0
    assert PIXELS.settings[GaussianProcess(Kernel(0.7, 0.5), 10.0)] == 2
    assert PIXELS.settings[GaussianProcess(Kernel(0.7, 1.0), 1.0)] == 3
    assert EVERYTHING.settings[GaussianProcess(Kernel(1.0, 0.5, (0.5, 0.5)), 3.0)] == 0
    assert EVERYTHING.settings[GaussianProcess(Kernel(1.0, 0.5, (0.5, 0.5), 0.5), 3.0)] == 2
    assert len(EVERYTHING.settings) == 243
