"""The classifier: feature maps as announced, saving that loses nothing, no class head without classes."""

import pytest
import torch

from provgen.models.classifier import ImageClassifier
from provgen.models.diffusion import encoder_shapes

SHAPES = encoder_shapes("tiny", 8, 3)


def make(num_classes=4) -> ImageClassifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageClassifier(stages=[list(shape) for shape in SHAPES], num_classes=num_classes).eval()


@pytest.fixture
def images(generator):
    return torch.rand(5, 3, 8, 8, generator=generator) * 2 - 1


@pytest.mark.parametrize("num_classes", [0, 4])
def test_stages_are_the_image_and_the_announced_shapes(num_classes, images):
    output = make(num_classes)(images)
    assert output.feature_maps[0] is images
    assert [tuple(stage.shape) for stage in output.feature_maps] == [(5, c, s, s) for c, s in SHAPES]


def test_the_class_is_read_off_the_last_stage(images):
    network = make()
    output = network(images)
    assert output.class_logits.shape == (5, 4)
    rows = output.feature_maps[-1].flatten(1)
    expected = torch.einsum("qf,cf->qc", rows, network.class_head.weight) + network.class_head.bias
    torch.testing.assert_close(output.class_logits, expected)
    assert not torch.allclose(output.class_logits[0], output.class_logits[1])


def test_without_classes_there_is_no_class_head(images):
    bare = make(num_classes=0)
    assert bare.class_head is None
    assert bare(images).class_logits is None
    assert not any("class" in name for name, _ in bare.named_parameters())


@pytest.mark.parametrize("num_classes", [0, 4])
def test_saving_and_loading_gives_equal_outputs(num_classes, images, tmp_path):
    network = make(num_classes)
    network.save_pretrained(tmp_path)
    loaded = ImageClassifier.from_pretrained(tmp_path)
    before, after = network(images), loaded(images)
    assert all(torch.equal(a, b) for a, b in zip(after.feature_maps, before.feature_maps, strict=True))
    assert (before.class_logits is None) == (num_classes == 0)
    if num_classes:
        assert torch.equal(after.class_logits, before.class_logits)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}


def test_every_parameter_learns_from_the_class(images):
    network = make()
    labels = torch.tensor([0, 1, 2, 3, 0])
    torch.nn.functional.cross_entropy(network(images).class_logits, labels).backward()
    assert all(parameter.grad.any() for parameter in network.parameters())


def test_a_row_does_not_depend_on_its_batch(images):
    network = make()
    torch.testing.assert_close(
        network(images[2:3]).class_logits, network(images).class_logits[2:3], rtol=1e-5, atol=1e-5
    )
