"""Feature maps of the network's own: shapes as announced, whatever is shared, and nothing read that is not shared."""

import pytest
import torch

from provgen.models.diffusion import encoder_shapes
from provgen.models.embedding import OwnEncoder

TINY = encoder_shapes("tiny", 8, 1)
ALL = range(len(TINY))


def make(shapes=TINY, *, shared, reads_level=True) -> OwnEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OwnEncoder(shapes, shared=shared, reads_level=reads_level)


@pytest.fixture
def random_feature_maps(generator):
    """Make the image and the feature maps of a generator, random."""

    def call(shapes=TINY, count=3):
        return [torch.randn(count, width, size, size, generator=generator) for width, size in shapes]

    return call


@pytest.fixture
def alpha_bar():
    return torch.tensor([0.02, 0.5, 0.97])


@pytest.mark.parametrize(("size", "image_size", "channels"), [("tiny", 8, 1), ("medium", 28, 3)])
def test_stages_have_the_announced_shapes_however_many_are_shared(
    size, image_size, channels, random_feature_maps, alpha_bar
):
    shapes = encoder_shapes(size, image_size, channels)
    given = random_feature_maps(shapes)
    for shared in range(len(shapes)):
        with torch.no_grad():
            made = make(shapes, shared=shared)(given, alpha_bar)
        assert [tuple(stage.shape[1:]) for stage in made] == [(c, s, s) for c, s in shapes[1:]]
        assert all(stage.isfinite().all() for stage in made)


@pytest.mark.parametrize("shared", ALL)
def test_shared_stages_are_the_generators_and_the_others_its_own(shared, random_feature_maps, alpha_bar):
    given = random_feature_maps()
    made = make(shared=shared)(given, alpha_bar)
    is_given = [stage is theirs for stage, theirs in zip(made, given[1:], strict=True)]
    assert is_given == [number < shared for number in range(len(made))]


def test_sharing_all_has_no_parameters():
    assert list(make(shared=len(TINY) - 1).parameters()) == []
    counts = [sum(p.numel() for p in make(shared=shared).parameters()) for shared in ALL]
    assert counts == sorted(set(counts), reverse=True), "each stage that is shared saves its parameters"


@pytest.mark.parametrize("shared", ALL)
def test_stages_after_the_shared_ones_are_ignored(shared, random_feature_maps, alpha_bar):
    given, feature_maps = random_feature_maps(), make(shared=shared)
    before = feature_maps(given, alpha_bar)
    cut = feature_maps(given[: shared + 1], alpha_bar)
    changed = feature_maps([*given[: shared + 1], *[stage + 1 for stage in given[shared + 1 :]]], alpha_bar)
    for expected, short, other in zip(before, cut, changed, strict=True):
        assert torch.equal(short, expected)
        assert torch.equal(other, expected)


@pytest.mark.parametrize("shared", ALL[:-1])
def test_own_stages_follow_the_last_shared_one_alone(shared, random_feature_maps, alpha_bar):
    given, feature_maps = random_feature_maps(), make(shared=shared)
    before = feature_maps(given, alpha_bar)[shared:]
    for number in range(shared + 1):
        changed = [stage + (place == number) for place, stage in enumerate(given)]
        is_same = [torch.equal(a, b) for a, b in zip(feature_maps(changed, alpha_bar)[shared:], before, strict=True)]
        assert is_same == [number != shared] * len(before)


@pytest.mark.parametrize("shared", ALL[:-1])
def test_every_parameter_gets_a_gradient(shared, random_feature_maps, alpha_bar):
    feature_maps = make(shared=shared)
    made = feature_maps(random_feature_maps(), alpha_bar)
    sum(stage.square().mean() for stage in made[shared:]).backward()
    for name, parameter in feature_maps.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("shared", ALL[:-1])
def test_the_noise_level_reaches_the_residual_blocks_unless_it_shall_not(shared, random_feature_maps, alpha_bar):
    given = random_feature_maps()
    for reads_level in (True, False):
        feature_maps = make(shared=shared, reads_level=reads_level)
        before, after = (feature_maps(given, level)[-1] for level in (alpha_bar, alpha_bar.flip(0)))
        differs = (before != after).flatten(1).any(dim=1)
        assert differs.tolist() == [reads_level, False, reads_level], "the middle level is the same"


def test_a_stem_alone_has_no_noise_level(random_feature_maps, alpha_bar):
    feature_maps = make(TINY[:2], shared=0)
    assert {name for name, _ in feature_maps.named_parameters()} == {"blocks.0.weight", "blocks.0.bias"}
    given = random_feature_maps(TINY[:2])
    expected = torch.nn.functional.conv2d(
        given[0], feature_maps.blocks[0].weight, feature_maps.blocks[0].bias, padding=1
    )
    torch.testing.assert_close(feature_maps(given, alpha_bar), [expected])


@pytest.mark.parametrize("shared", [0, 2])
def test_a_row_does_not_depend_on_its_batch(shared, random_feature_maps, alpha_bar):
    given, feature_maps = random_feature_maps(), make(shared=shared)
    whole = feature_maps(given, alpha_bar)
    alone = feature_maps([stage[1:2] for stage in given], alpha_bar[1:2])
    for row, expected in zip(alone, whole, strict=True):
        torch.testing.assert_close(row, expected[1:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shared", [0, 2])
def test_stages_compute_in_the_precision_of_their_weights(dtype, shared, random_feature_maps, alpha_bar):
    given = [stage.to(dtype) for stage in random_feature_maps()]
    made = make(shared=shared).to(dtype)(given, alpha_bar)
    assert {stage.dtype for stage in made} == {dtype}
    expected = make(shared=shared)([stage.float() for stage in given], alpha_bar)
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    torch.testing.assert_close(made[-1].float(), expected[-1], rtol=tolerance, atol=tolerance)
