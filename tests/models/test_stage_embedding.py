"""One linear map of all feature maps, large ones pooled."""

import pytest
import torch

from provgen.models.embedding import StageEmbedding, silent_embedding


def test_stages_add_up_and_large_ones_are_pooled(generator):
    shapes = [(2, 16), (3, 8), (4, 4)]
    embedding = StageEmbedding(shapes, width=5).double()
    feature_maps = [torch.randn(7, c, s, s, generator=generator, dtype=torch.float64) for c, s in shapes]
    pooled = feature_maps[0].reshape(7, 2, 8, 2, 8, 2).mean(dim=(3, 5))
    weights = embedding.projection.weight.split([2 * 64, 3 * 64, 4 * 16], dim=1)
    parts = zip([pooled, *feature_maps[1:]], weights, strict=True)
    expected = sum(stage.flatten(1) @ weight.T for stage, weight in parts) + embedding.projection.bias
    torch.testing.assert_close(embedding(feature_maps), expected)


@pytest.mark.parametrize("size", [14, 28, 9])
def test_sizes_that_the_grid_does_not_divide_are_pooled_as_torch_does(size, generator):
    embedding = StageEmbedding([(2, size)], width=3).double()
    stage = torch.randn(4, 2, size, size, generator=generator, dtype=torch.float64)
    expected = embedding.projection(torch.nn.functional.adaptive_avg_pool2d(stage, 8).flatten(1))
    torch.testing.assert_close(embedding([stage]), expected)


def test_a_silent_embedding_says_nothing(generator):
    said = silent_embedding([(2, 8)], width=3)([torch.randn(4, 2, 8, 8, generator=generator)])
    assert torch.equal(said, torch.zeros(4, 3))
