"""Resampling through the pipeline: only samples with too few sources, from their own generators, and not for ever."""

from dataclasses import asdict

import pytest
import torch

from provgen.data.images import to_unit_range
from provgen.models.credit import CreditHead, GaussianProcess, Kernel
from provgen.models.diffusion import num_last_layer
from provgen.tracing.trace import CreditFeatures, trace


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


LABELS = [0, 1, 2, 0, 1, 2]


@pytest.fixture(scope="module")
def pipe(trained):
    trained.pipeline.set_progress_bar_config(disable=True)

    def call(labels, generators, **more):
        return trained.pipeline(labels, generator=generators, top_k=3, num_inference_steps=12, output_type="pt", **more)

    return call


@pytest.fixture(scope="module")
def plain(pipe):
    return pipe(LABELS, seeds(*range(6)))


@pytest.fixture(scope="module")
def late(trained):
    """Give the entropies at the cleanest level of the window of the run."""

    def call(attribution):
        inside = attribution.alpha_bar < trained.pipeline.window[1]
        return attribution.step_entropy[:, inside][:, -1]

    return call


@pytest.fixture(scope="module")
def below(plain, late):
    """Half of the samples are below it."""
    return float(late(plain.attribution).sort().values[2:4].mean())


def test_only_collapsed_samples_are_drawn_again_each_from_its_own_generator(pipe, plain, late, below):
    found = pipe(LABELS, seeds(*range(6)), resample_below=below, max_resamplings=1)
    collapsed = late(plain.attribution) < below
    assert collapsed.sum() == 3
    assert torch.equal(found.resamplings > 0, collapsed)
    assert torch.equal(found.images[~collapsed], plain.images[~collapsed])
    for row in range(6):
        generator = seeds(row)
        alone = pipe([LABELS[row]], generator)
        if collapsed[row]:
            alone = pipe([LABELS[row]], generator)  # the generator goes on
        assert (found.images[row].int() - alone.images[0].int()).abs().max() <= 1, "rounding in another batch"
        assert found.attribution.example_index[row, 0] == alone.attribution.example_index[0, 0]
        for name in ("step_entropy", "posterior"):
            drawn, expected = getattr(found.attribution, name)[row], getattr(alone.attribution, name)[0]
            torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=1e-3)
        assert found.attribution.commitment_step[row] == alone.attribution.commitment_step[0]
        for name in ("share", "by_nearest", "nearest"):
            drawn, expected = (getattr(some.attribution.explained, name) for some in (found, alone))
            torch.testing.assert_close(drawn[row], expected[0], atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def credit_head(trained):
    """A credit head with gradients whose landmarks are the training images, and whose read-out is random."""
    pipeline, train = trained.pipeline, trained.data.train
    features = CreditFeatures(pipeline.provenance, denoiser=pipeline.unet)
    pixels = to_unit_range(train.images)
    with torch.no_grad():
        trace(pipeline.generator.renoise(pixels, train.labels, num_inference_steps=12, seed=0), features)
    landmarks, num_gradients = features.features(), num_last_layer(pipeline.unet)
    head = CreditHead(
        num_examples=len(train),
        num_landmarks=len(train),
        rank=len(train),
        width=landmarks.shape[1],
        num_classes=train.num_classes,
        num_gradients=num_gradients,
        process=asdict(GaussianProcess(Kernel(1.0, 0.5, (0.5, 0.5), gradient_share=0.25), ridge=3.0)),
    )
    spread = landmarks[:, :-num_gradients].var(dim=0).sum().sqrt()
    head.scale[:-num_gradients] = 1 / spread
    head.landmarks.copy_(landmarks * head.scale)
    head.landmark_labels.copy_(train.labels)
    head.projection.copy_(torch.eye(len(train)))
    head.readout.normal_(generator=torch.Generator().manual_seed(0))
    return head


def test_credit_of_a_sample_drawn_again_is_that_of_its_last_draw(trained, pipe, plain, below, credit_head):
    """Embeddings, pixels and gradients are put into the rows that were resampled."""
    before = trained.pipeline.credit
    trained.pipeline.register_modules(credit=credit_head)
    try:
        found = pipe(LABELS, seeds(*range(6)), resample_below=below, max_resamplings=1)
        first = pipe(LABELS, seeds(*range(6)))
        for row, times in enumerate(found.resamplings.tolist()):
            generator = seeds(row)
            for _ in range(times + 1):
                alone = pipe([LABELS[row]], generator)
            expected = alone.attribution.weight[0]
            torch.testing.assert_close(found.attribution.weight[row], expected, atol=1e-4, rtol=1e-3)
            assert times == 0 or not torch.allclose(first.attribution.weight[row], expected, atol=1e-3)
    finally:
        trained.pipeline.register_modules(credit=before)
    assert found.resamplings.sum() == 3
    assert not torch.allclose(first.attribution.weight, plain.attribution.weight, atol=1e-2), "credit, no posterior"


def test_what_can_not_be_helped_is_kept_after_so_many_draws(pipe):
    found = pipe(LABELS, seeds(*range(6)), resample_below=100.0, max_resamplings=3)
    assert found.resamplings.tolist() == [3] * 6


def test_nothing_is_drawn_again_unless_asked_for(plain):
    assert plain.resamplings.tolist() == [0] * 6


@pytest.mark.parametrize(
    "options",
    [{"resample_below": 0.0}, {"resample_below": -1.0}, {"resample_below": 0.5, "max_resamplings": 0}],
)
def test_impossible_bounds_are_refused(options, pipe, message_of):
    assert "resample_below must be a positive finite number" in message_of(pipe, LABELS, seeds(*range(6)), **options)


def test_redraws_need_traces(trained, message_of):
    assert "give top_k as well" in message_of(trained.pipeline, [0], top_k=None, resample_below=0.5)
