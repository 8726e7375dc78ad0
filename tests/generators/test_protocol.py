"""What every kind of generator keeps: shapes, rows that do not depend on their batch, and passes made when read."""

from dataclasses import fields

import pytest
import torch

from provgen.generators.protocol import LastLayer, Output, Step
from provgen.models.classifier import CLEAN_ALPHA_BAR
from provgen.models.diffusion import denoised, denoiser_target, encoder_shapes, make_training_scheduler

KINDS = ("diffusion", "vae", "none")
NULL = 3
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", ["tiny", "medium"])
def test_feature_maps_have_the_same_shapes_for_every_kind(kind, size, generator_of, random_images):
    images = random_images(4, channels=3, size=12)
    generator = generator_of(kind, images, f"generator.size={size}")
    pixels = images.images.float() / 127.5 - 1
    step = next(iter(generator.renoise(pixels, images.labels, num_inference_steps=10, seed=0)))
    expected = [(4, channels, height, height) for channels, height in encoder_shapes(size, 12, 3)]
    assert [tuple(feature_map.shape) for feature_map in step.feature_maps] == expected


@pytest.mark.parametrize("kind", KINDS)
def test_feature_maps_of_training_have_the_shapes_of_those_of_steps(kind, make, make_batch, images):
    generator = make(kind)
    output = generator.forward(make_batch(generator))
    expected = [(12, channels, height, height) for channels, height in encoder_shapes("tiny", 8, 1)]
    assert [tuple(feature_map.shape) for feature_map in output.feature_maps] == expected
    assert all(feature_map.isfinite().all() for feature_map in output.feature_maps)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_a_share_are_rows_of_the_whole(kind, make, make_batch):
    generator = make(kind)
    batch = make_batch(generator)
    whole = generator.forward(batch)
    for process in range(3):
        share = generator.forward(batch.share(process, 3))
        rows = slice(4 * process, 4 * process + 4)
        for field in fields(Output):
            pairs = zip(tensors(getattr(share, field.name)), tensors(getattr(whole, field.name)), strict=True)
            for each, other in pairs:
                torch.testing.assert_close(each, other[rows], rtol=1e-4, atol=1e-5)


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return list(value.values()) if isinstance(value, dict) else list(value or [])


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_generator_learns_from_its_loss(kind, make, make_batch):
    generator = make(kind)
    generator.network.train().requires_grad_()
    generator.forward(make_batch(generator)).loss.mean().backward()
    for name, parameter in generator.network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_leaves_out_what_is_not_its_rows_own(kind, make, make_batch):
    generator = make(kind)
    batch = make_batch(generator)
    before = generator.forward(batch).loss
    row = int((batch.clean_labels < NULL).nonzero()[2])
    batch.clean_images[row] *= -1
    changed = (generator.forward(batch).loss - before).abs() > 1e-7
    assert changed.nonzero().flatten().tolist() == [row]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_is_the_same_whether_feature_maps_are_wanted_or_not(kind, make, make_batch):
    generator = make(kind)
    batch = make_batch(generator)
    with_maps, without = (generator.forward(batch, with_feature_maps=wanted) for wanted in (True, False))
    assert torch.equal(with_maps.loss, without.loss)
    assert torch.equal(with_maps.query, without.query)


@pytest.mark.parametrize("kind", KINDS)
def test_noise_has_the_shape_that_the_network_takes(kind, make, pixels):
    generator = make(kind)
    shape = generator.noise_shape
    if kind != "vae":
        assert shape == (1, 8, 8)
        return
    output = generator.network(pixels, torch.zeros(12, *shape), with_feature_maps=False)
    assert output.latents.shape == (12, *shape)
    assert len(shape) == 3
    assert torch.Size(shape).numel() < 64, "a latent is smaller than the image"


@pytest.mark.parametrize("kind", KINDS)
def test_asking_draws_nothing_from_the_global_generator(kind, make, pixels):
    generator = make(kind)
    before = torch.get_rng_state()
    assert generator.noise_shape
    generator.timesteps([0.3])
    generator.alpha_bars(10)
    for step in generator.renoise(pixels, torch.full((12,), NULL), num_inference_steps=10, seed=0):
        assert step.feature_maps
    assert torch.equal(torch.get_rng_state(), before)


def test_networks_have_names_of_their_own_in_checkpoints_and_pipelines(make):
    generators = [make(kind) for kind in KINDS]
    assert [generator.name for generator in generators] == ["denoiser", "vae", "classifier"]
    components = [generator.components for generator in generators]
    expected = (["unet", "scheduler"], ["vae"], ["classifier"])
    for names, generator, parts in zip(expected, generators, components, strict=True):
        assert list(parts) == names
        assert parts[names[0]] is generator.network
    assert components[0]["scheduler"] is generators[0].scheduler


@pytest.mark.parametrize("kind", KINDS)
def test_another_network_changes_nothing_else(kind, make, make_batch):
    generator, other = make(kind, "generator.kl_weight=0.7", "provenance.class_loss_weight=0.2"), make(kind)
    for parameter in other.network.parameters():
        parameter.mul_(1.1)
    changed = generator.with_network(other.network)
    assert type(changed) is type(generator)
    assert changed.network is other.network
    fields_of = {field.name for field in fields(generator)} - {"network"}
    assert all(getattr(changed, name) is getattr(generator, name) for name in fields_of)
    batch = make_batch(generator)
    assert not torch.equal(changed.forward(batch).loss, generator.forward(batch).loss)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_names_its_place_and_its_level(kind, make, pixels):
    generator = make(kind)
    labels = torch.full((12,), NULL)
    steps = list(generator.renoise(pixels, labels, num_inference_steps=10, seed=0))
    assert [step.number for step in steps] == list(range(len(steps)))
    levels = torch.stack([step.alpha_bar for step in steps])
    if kind == "diffusion":
        torch.testing.assert_close(levels, generator.alpha_bars(10))
        assert (levels.diff() > 0).all(), "from noise to image"
    else:
        assert (levels == torch.tensor(CLEAN_ALPHA_BAR)).all()
        assert generator.alpha_bars(10).tolist() == pytest.approx([CLEAN_ALPHA_BAR])
        assert {step.timestep for step in steps} == {0}
    for step in steps:
        assert torch.equal(step.alpha_bars, step.alpha_bar.expand(12))
        assert torch.equal(step.class_labels, labels)
        assert (step.class_logits is None) == (kind != "none")


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_an_image_do_not_depend_on_its_batch(kind, make, pixels):
    generator = make(kind)
    labels, rows = torch.arange(12) % 4, [7, 2]

    def ask(rows, seed=3):
        return list(generator.renoise(pixels[rows], labels[rows], num_inference_steps=10, seed=seed))

    for one, other in zip(ask(list(range(12))), ask(rows), strict=True):
        torch.testing.assert_close(other.query, one.query[rows], rtol=1e-4, atol=1e-5)
        for each, whole in zip(other.feature_maps, one.feature_maps, strict=True):
            torch.testing.assert_close(each, whole[rows], rtol=1e-4, atol=1e-5)
    first, again, reseeded = (torch.stack([step.query for step in ask(rows, seed)]) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert torch.equal(first, reseeded) == (kind == "none"), "other noise, where there is any"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_the_image_that_a_denoiser_predicts_by_hand(prediction, make, pixels):
    """x_0 of x_t and the noise, or of x_t and the velocity sqrt(a) noise - sqrt(1 - a) x_0, cut to [-1, 1]."""
    generator, labels = make("diffusion", f"generator.prediction={prediction}"), torch.arange(12) % 4
    for step in generator.renoise(pixels, labels, num_inference_steps=10, seed=0):
        output = generator.network(step.query, step.timestep, class_labels=labels).sample.double()
        kept, lost = step.alpha_bar.double().sqrt(), (1 - step.alpha_bar.double()).sqrt()
        by_hand = {
            "epsilon": (step.query.double() - lost * output) / kept,
            "v_prediction": kept * step.query.double() - lost * output,
        }
        expected = by_hand[prediction].clamp(-1, 1)
        torch.testing.assert_close(step.predicted_image.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_a_denoiser_should_predict_means_the_image_and_the_noise(prediction, pixels):
    scheduler = make_training_scheduler("linear", prediction)
    noise, timesteps = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0)), torch.arange(12) * 70
    level = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = level.sqrt() * pixels + (1 - level).sqrt() * noise
    target = denoiser_target(scheduler, pixels, noise, timesteps)
    image, same_noise = denoised(scheduler, noisy, target, level)
    torch.testing.assert_close(image, pixels, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(same_noise, noise, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_other_kinds_predict_the_very_image_that_they_look_at(make, pixels):
    labels = torch.full((12,), NULL)
    (step,) = make("none").renoise(pixels, labels, num_inference_steps=10, seed=0)
    assert torch.equal(step.predicted_image, pixels)
    vae = make("vae")
    for step in vae.renoise(pixels, labels, num_inference_steps=10, seed=0):
        torch.testing.assert_close(step.predicted_image, vae.network.decode(step.query).sample)
    asked = {"null_label": NULL, "generator": torch.Generator().manual_seed(0), "num_inference_steps": 10}
    *_, last = vae.sample(labels, guidance_scale=1.0, **asked)
    assert torch.equal(last.predicted_image, last.images)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_hold_no_gradients(kind, make, pixels):
    generator = make(kind)
    generator.network.requires_grad_()
    for step in generator.renoise(pixels, torch.full((12,), NULL), num_inference_steps=10, seed=0):
        assert not step.query.requires_grad
        assert not any(feature_map.requires_grad for feature_map in step.feature_maps)
        if step.decode is not None:
            assert not step.last_layer.output.requires_grad
        assert not step.predicted_image.requires_grad
    assert torch.is_grad_enabled(), "steps leave the caller's mode alone"


def test_what_costs_a_pass_is_made_when_it_is_read_and_once():
    passes = []

    def encode():
        passes.append("encode")
        return [torch.zeros(2, 1, 1, 1)]

    def decode():
        passes.append("decode")
        return LastLayer(torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1))

    def predict():
        passes.append("predict")
        return torch.full((2, 1, 1, 1), 0.5)

    step = Step(
        number=0, timestep=7, alpha_bar=torch.tensor(0.5), query=torch.zeros(2, 1, 1, 1),
        class_labels=torch.zeros(2, dtype=torch.int64), encode=encode, predict=predict, decode=decode,
    )  # fmt: skip
    assert step.alpha_bars.tolist() == [0.5, 0.5]
    assert passes == []
    for _ in range(2):
        assert step.feature_maps[0].shape == (2, 1, 1, 1)
        assert step.last_layer.inputs.sum() == 2
        assert step.predicted_image.sum() == 1
    assert passes == ["encode", "decode", "predict"]


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_is_the_last_feature_map_whatever_the_batch(kind, make, pixels):
    generator = make(kind)
    whole = generator.encode(pixels)
    channels, height = encoder_shapes("tiny", 8, 1)[-1]
    assert whole.shape == (12, channels * height**2)
    torch.testing.assert_close(generator.encode(pixels[[5, 1]]), whole[[5, 1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_form_names_what_is_covered_alone(kind, make, images):
    generator = make(kind)
    covered = torch.arange(12) % 2 == 0
    query = (
        torch.randn(4, *generator.noise_shape, generator=torch.Generator().manual_seed(0)),
        torch.full((4,), 0.3),
        torch.full((4,), NULL),
    )
    whole, part = (
        generator.closed_form(images, dtype=torch.float64, device=CPU, covered=mask).probs(*query)
        for mask in (None, covered)
    )
    assert not part[:, ~covered].any()
    expected = whole[:, covered] / whole[:, covered].sum(1, keepdim=True)
    torch.testing.assert_close(part[:, covered], expected, rtol=1e-5, atol=1e-9)
    assert whole[:, ~covered].any()
