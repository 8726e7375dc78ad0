"""Features of every kind of generator and of a torchvision network."""

import pytest
import torch
import torchvision

from provgen.data.images import to_unit_range
from provgen.models.diffusion import record_feature_maps
from provgen.report.encoders import classifier_encoder, features_of, make_encoder


@pytest.fixture
def images(random_images):
    return random_images(5, num_classes=3).images


def test_pixels_are_pixels(images, trained):
    found = features_of(images, make_encoder("pixels", trained.pipeline))
    assert torch.equal(found, to_unit_range(images).flatten(1))


@pytest.mark.parametrize("kind", ["diffusion", "vae", "none"])
def test_every_kind_of_generator_has_features_of_its_own(kind, images, trained_of):
    pipeline = trained_of(kind).pipeline
    found = features_of(images, make_encoder("own", pipeline))
    assert found.shape[0] == 5
    assert found.isfinite().all()
    assert (found[0] - found[1]).abs().max() > 0
    torch.testing.assert_close(
        features_of(images[2:3], make_encoder("own", pipeline)), found[2:3], atol=1e-5, rtol=1e-4
    )


@torch.no_grad()
def test_a_denoisers_own_features_are_its_last_stage_at_little_noise(images, trained):
    unet = trained.pipeline.unet
    seen = []
    hook = unet.conv_in.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    found = features_of(images, make_encoder("own", trained.pipeline))
    hook.remove()
    with record_feature_maps(unet) as feature_maps:
        timestep = (trained.pipeline.scheduler.alphas_cumprod - 0.9).abs().argmin()
        unet(seen[0], timestep, class_labels=torch.full((5,), trained.pipeline.null_label))
    torch.testing.assert_close(found, feature_maps[-1].flatten(1))


def test_a_classifier_gives_what_its_last_layer_is_given(images):
    torch.manual_seed(0)
    network = torchvision.models.resnet18(weights=None).eval()
    weight, bias = network.fc.weight, network.fc.bias
    pixels = torch.nn.functional.interpolate(to_unit_range(images), size=(64, 64), mode="bilinear", antialias=True)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normal = ((pixels.expand(-1, 3, -1, -1) + 1) / 2 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    expected = network(normal)
    found = features_of(images, classifier_encoder(network, "resnet18"))
    assert found.shape == (5, 512)
    torch.testing.assert_close(found @ weight.T + bias, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("name", "why"), [("vit_b_16", "cannot read images"), ("squeezenet1_1", "no linear layer")])
def test_classifiers_of_no_use_are_refused(name, why, message_of):
    network = torchvision.models.get_model(name, weights=None).eval()
    assert why in message_of(classifier_encoder, network, name)


def test_unknown_features_are_refused(trained, message_of):
    assert "pixels, own, a torchvision classifier" in message_of(make_encoder, "inception9", trained.pipeline)


def test_an_encoder_of_ones_own_is_imported(images, trained, tmp_path, monkeypatch, message_of):
    code = "def encode(images):\n    return images.mean(dim=(1, 2, 3))[:, None]\n\n"
    code += "flat = lambda images: images[0]\nnumber = 3\n"
    (tmp_path / "my_encoder.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    found = features_of(images, make_encoder("my_encoder:encode", trained.pipeline))
    torch.testing.assert_close(found[:, 0], to_unit_range(images).mean(dim=(1, 2, 3)))
    assert "cannot be imported" in message_of(make_encoder, "my_encoder:missing", trained.pipeline)
    assert "cannot be imported" in message_of(make_encoder, "no_such_module:encode", trained.pipeline)
    assert "must be a function" in message_of(make_encoder, "my_encoder:number", trained.pipeline)
    flat = make_encoder("my_encoder:flat", trained.pipeline)
    assert "must give a tensor (query, feature), got Tensor (1, 8, 8)" in message_of(features_of, images, flat)
