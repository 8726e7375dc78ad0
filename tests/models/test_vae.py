"""Autoencoders: what a step needs in one pass, feature maps that are the encoder's own, and whom their losses train."""

import json

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from provgen.models.diffusion import encoder_shapes
from provgen.models.vae import ImageVae, latent_shape, make_vae


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return make_vae("tiny", image_size=8, image_channels=1).eval()


@pytest.fixture
def images(generator):
    return torch.rand(3, 1, 8, 8, generator=generator) * 2 - 1


@pytest.fixture
def noise(vae, generator):
    return torch.randn(3, *latent_shape(vae), generator=generator)


@pytest.mark.parametrize(
    ("size", "image_size", "channels"),
    [("tiny", 6, 1), ("small", 12, 3), ("medium", 28, 1), ("large", 16, 3)],
)
def test_every_size_gives_the_announced_shapes(size, image_size, channels, generator):
    vae = make_vae(size, image_size=image_size, image_channels=channels)
    images = torch.rand(2, channels, image_size, image_size, generator=generator)
    with torch.no_grad():
        output = vae(images, torch.zeros(2, *latent_shape(vae)))
    assert output.reconstruction.shape == images.shape
    assert output.mean.shape == output.log_variance.shape == output.latents.shape == (2, *latent_shape(vae))
    assert [tuple(stage.shape) for stage in output.feature_maps] == [
        (2, width, height, height) for width, height in encoder_shapes(size, image_size, channels)
    ]
    assert not [name for name, _ in vae.named_parameters() if "to_q" in name], "convolutions only"


@pytest.mark.parametrize(("size", "image_size"), [("tiny", 9), ("medium", 30)])
def test_an_image_size_that_cannot_be_halved_is_refused(size, image_size, message_of):
    message = message_of(make_vae, size, image_size=image_size, image_channels=1)
    assert "data.image_size" in message
    assert f"got {image_size}" in message


@torch.no_grad()
def test_the_stages_are_the_encoders_own_features(vae, images):
    feature_maps = vae.feature_maps_of(images)
    assert torch.equal(feature_maps[0], images)
    assert torch.equal(feature_maps[1], vae.encoder.conv_in(images))
    hidden = feature_maps[1]
    for block, stage in zip(vae.encoder.down_blocks, feature_maps[2:-1], strict=True):
        hidden = block(hidden)
        halved = stage if block.downsamplers is None else block.downsamplers[0](stage)
        assert torch.equal(halved, hidden)
    last = vae.encoder.conv_act(vae.encoder.conv_norm_out(feature_maps[-1]))
    moments = DiagonalGaussianDistribution(vae.quant_conv(vae.encoder.conv_out(last)))
    encoded = vae.encode(images).latent_dist
    assert torch.equal(moments.mean, encoded.mean)
    assert torch.equal(moments.logvar, encoded.logvar)


@torch.no_grad()
def test_one_pass_is_encode_draw_decode_and_encode_again(vae, images, noise):
    output = vae(images, noise)
    encoded = vae.encode(images).latent_dist
    expected = encoded.mean + (encoded.logvar / 2).exp() * noise
    torch.testing.assert_close(output.latents, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(output.reconstruction, vae.decode(output.latents).sample)
    for stage, again in zip(output.feature_maps, vae.feature_maps_of(output.reconstruction), strict=True):
        assert torch.equal(stage, again)


@torch.no_grad()
def test_without_noise_the_mean_is_decoded(vae, images, noise):
    output = vae(images, torch.zeros_like(noise))
    assert torch.equal(output.latents, output.mean)
    assert torch.equal(output.reconstruction, vae.decode(output.mean).sample)
    assert not torch.equal(output.reconstruction, vae(images, noise).reconstruction)


@torch.no_grad()
def test_the_log_variance_is_clamped(vae, images, noise):
    vae.quant_conv.bias[latent_shape(vae)[0] :] = torch.tensor([-1e3, 1e3] * 8)
    output = vae(images, torch.zeros_like(noise))
    assert output.log_variance[0, :2].flatten().tolist() == [-30, 20]


def test_a_loss_on_the_stages_trains_the_encoder_and_never_the_decoder(vae, images, noise):
    output = vae(images, noise)
    sum(stage.square().mean() for stage in output.feature_maps).backward()
    assert all(p.grad is None for p in [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()])
    read = [vae.encoder.conv_in, vae.encoder.down_blocks, vae.encoder.mid_block]
    assert all(p.grad.abs().max() > 0 for part in read for p in part.parameters())
    assert not output.feature_maps[0].requires_grad


def test_the_generators_own_loss_trains_everything(vae, images, noise):
    output = vae(images, noise, with_feature_maps=False)
    assert output.feature_maps == []
    (output.reconstruction.square().mean() + output.log_variance.square().mean()).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vae.parameters())


@torch.no_grad()
def test_every_pixel_hangs_on_every_latent_number(vae):
    # What the latent of one vector is for: a grid of latents would leave most pixels to their own patch.
    plain = vae.decode(torch.zeros(1, *latent_shape(vae))).sample
    for channel in range(latent_shape(vae)[0]):
        latent = torch.zeros(1, *latent_shape(vae))
        latent[:, channel] = 1
        assert (vae.decode(latent).sample != plain).float().mean() > 0.95


@torch.no_grad()
def test_saved_and_loaded_it_is_the_same(vae, images, noise, tmp_path, caplog):
    vae.save_pretrained(tmp_path / "vae")
    loaded = ImageVae.from_pretrained(tmp_path / "vae").eval()
    assert isinstance(loaded, AutoencoderKL)
    for mine, theirs in zip(vae(images, noise), loaded(images, noise), strict=True):
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine, theirs)
    assert "not expected" not in caplog.text


class VaePipeline(DiffusionPipeline):
    def __init__(self, vae):
        super().__init__()
        self.register_modules(vae=vae)


def test_a_pipeline_finds_the_class_again(vae, tmp_path):
    VaePipeline(vae).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["vae"] == ["provgen.models.vae", "ImageVae"]
    loaded = VaePipeline.from_pretrained(tmp_path).vae
    assert isinstance(loaded, ImageVae)
    assert all(torch.equal(*pair) for pair in zip(vae.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize("with_feature_maps", [False, True])
def test_mixed_precision_gives_back_every_field_in_float32(vae, images, noise, with_feature_maps, new_accelerator):
    with torch.no_grad():
        exact = vae(images, noise, with_feature_maps=with_feature_maps)
        accelerator: Accelerator = new_accelerator("bf16")
        output = accelerator.prepare(vae)(images, noise, with_feature_maps=with_feature_maps)
    assert len(output.feature_maps) == (5 if with_feature_maps else 0)
    for rounded, full in zip([*output[:4], *output.feature_maps], [*exact[:4], *exact.feature_maps], strict=True):
        assert rounded.dtype == torch.float32
        torch.testing.assert_close(rounded, full, rtol=0.1, atol=0.1)
