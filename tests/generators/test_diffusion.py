"""The denoiser's training pass, its sampler and its levels, worked out beside it."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from provgen.data.random import Stream, seeded_generator
from provgen.generators.diffusion import CLEAR_ALPHA_BAR, denoising_loss
from provgen.models.diffusion import encoder_feature_maps, record_feature_maps

NULL = 3
LABELS = torch.tensor([0, NULL, 2])
ASKED = {"null_label": NULL, "num_inference_steps": 10, "guidance_scale": 1.0}


@pytest.fixture
def denoising(make):
    return make("diffusion")


def test_a_denoiser_is_given_the_noisy_image_and_charged_for_the_noise(denoising, make_batch, alphas_cumprod):
    batch = make_batch(denoising)
    output = denoising.forward(batch)
    alpha_bar = torch.stack([alphas_cumprod[t] for t in batch.timesteps])
    assert torch.equal(output.alpha_bar, alpha_bar)
    pairs = zip(alpha_bar, batch.clean_images, batch.noise, strict=True)
    noisy = torch.stack([a.sqrt() * image + (1 - a).sqrt() * noise for a, image, noise in pairs])
    torch.testing.assert_close(output.query, noisy)
    assert torch.equal(output.feature_maps[0], output.query)
    assert torch.equal(output.class_labels, batch.labels)
    assert (batch.labels[batch.clean_labels < NULL] == NULL).any(), "some labels are dropped"
    predicted = denoising.network(noisy, batch.timesteps, class_labels=batch.labels).sample
    expected = torch.stack([F.mse_loss(p, n) for p, n in zip(predicted, batch.noise, strict=True)])
    torch.testing.assert_close(output.loss, expected)
    assert output.parts == {"denoising_loss": output.loss}
    assert output.class_logits is None


def test_a_denoiser_of_velocity_is_charged_for_it(make, make_batch, alphas_cumprod):
    """sqrt(a) noise - sqrt(1 - a) x_0 (Salimans and Ho 2022)."""
    denoising = make("diffusion", "generator.prediction=v_prediction")
    batch = make_batch(denoising)
    output = denoising.forward(batch)
    a = alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    velocity = a.sqrt() * batch.noise - (1 - a).sqrt() * batch.clean_images
    predicted = denoising.network(output.query, batch.timesteps, class_labels=batch.labels).sample
    torch.testing.assert_close(output.loss, (predicted - velocity).square().mean(dim=(1, 2, 3)))


def test_denoising_loss_is_the_mean_squared_error_of_each_row(generator):
    predicted, noise = (torch.randn(3, 2, 2, 2, generator=generator) for _ in range(2))
    losses = denoising_loss(predicted, noise)
    assert losses.shape == (3,)
    for row in range(3):
        pairs = zip(predicted[row].flatten().tolist(), noise[row].flatten().tolist(), strict=True)
        expected = sum((a - b) ** 2 for a, b in pairs) / 8
        assert float(losses[row]) == pytest.approx(expected, rel=1e-5)


def test_timesteps_are_those_nearest_to_the_levels(make, alphas_cumprod):
    levels = (0.02, 0.3, 0.5, 0.97)
    by_hand = [min(range(1000), key=lambda t, at=level: abs(float(alphas_cumprod[t]) - at)) for level in levels]
    assert make("diffusion").timesteps(levels) == by_hand
    assert make("vae").timesteps(levels) == make("none").timesteps(levels) == [0]


def test_the_noise_schedule_is_the_settings(denoising, make, alphas_cumprod):
    assert torch.equal(denoising.scheduler.alphas_cumprod, alphas_cumprod)
    other = make("diffusion", "generator.beta_schedule=squaredcos_cap_v2").scheduler.alphas_cumprod
    assert not torch.allclose(other, alphas_cumprod)


@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_levels_of_sampling_are_the_schedule_s_rising(steps, denoising, alphas_cumprod):
    levels = denoising.alpha_bars(steps)
    assert len(levels) == steps
    assert (levels.diff() > 0).all()
    assert torch.isin(levels, alphas_cumprod).all()


@pytest.mark.parametrize("steps", [0, 9, 1001])
def test_too_few_or_too_many_steps_are_refused(steps, denoising, pixels, seeds, message_of):
    asked = {**ASKED, "num_inference_steps": steps, "generator": seeds(0, 1, 2)}
    for message in (
        message_of(denoising.alpha_bars, steps),
        message_of(lambda: list(denoising.sample(LABELS, **asked))),
        message_of(lambda: list(denoising.renoise(pixels[:3], LABELS, num_inference_steps=steps, seed=0))),
    ):
        assert message == f"num_inference_steps must be 10 to 1000, got {steps}"


@pytest.mark.parametrize("scale", [1.0, 0.0, 2.5])
@torch.no_grad()
def test_sampling_is_ddim_with_every_pass_shown(scale, denoising, seeds, sampler_of):
    steps = list(denoising.sample(LABELS, generator=seeds(0, 1, 2), **{**ASKED, "guidance_scale": scale}))
    unet, scheduler = denoising.network, sampler_of(10)
    noisy = torch.cat([torch.randn(1, 1, 8, 8, generator=seed) for seed in seeds(0, 1, 2)])
    alphas = [*scheduler.alphas_cumprod[scheduler.timesteps], torch.tensor(1.0)]
    assert len(steps) == 10
    for number, (step, timestep) in enumerate(zip(steps, scheduler.timesteps, strict=True)):
        assert (step.number, step.timestep) == (number, int(timestep))
        assert step.alpha_bar == alphas[number]
        torch.testing.assert_close(step.query, noisy, rtol=1e-4, atol=1e-4)
        with record_feature_maps(unet) as feature_maps:
            conditional = unet(noisy, timestep, class_labels=LABELS).sample
        unconditional = unet(noisy, timestep, class_labels=torch.full((3,), NULL)).sample
        torch.testing.assert_close(step.last_layer.output, conditional, rtol=1e-3, atol=1e-4)
        for each, expected in zip(step.feature_maps, feature_maps, strict=True):
            torch.testing.assert_close(each, expected, rtol=1e-3, atol=1e-4)
        noise = unconditional + scale * (conditional - unconditional)
        noisy = scheduler.step(noise, timestep, noisy).prev_sample
        torch.testing.assert_close(step.images, noisy, rtol=1e-3, atol=1e-4)
        noisy = step.images


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_a_step_of_ddim_is_its_formula(prediction, make, seeds):
    """x_s = sqrt(a_s) x_0 + sqrt(1 - a_s) noise, with the x_0 that the output stands for, clipped."""
    denoising = make("diffusion", f"generator.prediction={prediction}")
    scheduler = denoising.scheduler
    steps = list(denoising.sample(LABELS, generator=seeds(0, 1, 2), **ASKED))
    for step, following in pairwise(steps):
        a, later = step.alpha_bar, following.alpha_bar
        noise = output = step.last_layer.output
        if prediction == "v_prediction":
            noise = (1 - a).sqrt() * step.query + a.sqrt() * output
        clean = (step.query - (1 - a).sqrt() * noise) / a.sqrt()
        if scheduler.config.clip_sample:
            clean = clean.clamp(-scheduler.config.clip_sample_range, scheduler.config.clip_sample_range)
        torch.testing.assert_close(
            following.query, later.sqrt() * clean + (1 - later).sqrt() * noise, rtol=1e-3, atol=1e-3
        )
        assert torch.equal(step.images, following.query)


@torch.no_grad()
def test_asking_for_other_levels_in_the_middle_of_sampling_changes_no_image(denoising, seeds, pixels):
    whole = list(denoising.sample(LABELS, generator=seeds(0, 1, 2), **ASKED))[-1].images
    steps = denoising.sample(LABELS, generator=seeds(0, 1, 2), **ASKED)
    others = denoising.renoise(pixels, torch.full((12,), NULL), num_inference_steps=50, seed=0)
    for step in steps:
        denoising.alpha_bars(20 + step.number)
        next(others)
        images = step.images
    assert torch.equal(images, whole)


@torch.no_grad()
def test_the_last_layer_makes_its_output_of_its_inputs(denoising, seeds):
    for step in denoising.sample(LABELS, generator=seeds(0, 1, 2), **ASKED):
        inputs, output = step.last_layer
        torch.testing.assert_close(denoising.network.conv_out(inputs), output)


@torch.no_grad()
def test_outside_images_are_noised_with_one_noise_for_all(denoising, pixels):
    labels = torch.arange(12) % 4
    for step in denoising.renoise(pixels, labels, num_inference_steps=20, seed=5):
        noise = torch.randn(1, 8, 8, generator=seeded_generator(5, Stream.RENOISE, step.timestep))
        a = denoising.scheduler.alphas_cumprod[step.timestep]
        assert step.alpha_bar == a
        torch.testing.assert_close(step.query, a.sqrt() * pixels + (1 - a).sqrt() * noise)
        expected = encoder_feature_maps(denoising.network, step.query, torch.tensor(step.timestep), labels)
        torch.testing.assert_close(step.feature_maps, expected)
        assert step.images is None, "nothing is sampled"


@torch.no_grad()
def test_a_whole_pass_gives_the_feature_maps_of_the_encoder_alone(denoising, pixels):
    labels = torch.arange(12) % 4
    passes = []
    denoising.network.conv_in.register_forward_hook(lambda *_: passes.append(0))
    steps = [list(denoising.renoise(pixels, labels, num_inference_steps=10, seed=0)) for _ in range(2)]
    for encoded, decoded in zip(*steps, strict=True):
        before = len(passes)
        assert decoded.last_layer.output.shape == pixels.shape
        torch.testing.assert_close(decoded.feature_maps, encoded.feature_maps)
        assert len(passes) == before + 2, "the whole pass had the feature maps too"


@torch.no_grad()
def test_images_are_encoded_with_little_noise_and_no_class(denoising, pixels):
    levels = denoising.scheduler.alphas_cumprod
    timestep = min(range(1000), key=lambda t: abs(float(levels[t]) - CLEAR_ALPHA_BAR))
    a, noise = levels[timestep], torch.randn(1, 8, 8, generator=seeded_generator(0, Stream.RENOISE, timestep))
    with record_feature_maps(denoising.network) as feature_maps:
        noisy = a.sqrt() * pixels + (1 - a).sqrt() * noise
        denoising.network(noisy, torch.tensor(timestep), class_labels=torch.full((12,), NULL))
    torch.testing.assert_close(denoising.encode(pixels), feature_maps[-1].flatten(1))


@pytest.mark.parametrize("kind", ["diffusion", "none"])
def test_the_closed_form_of_images_is_that_of_the_forward_process(kind, make, images, closed_form_of):
    closed_form = make(kind).closed_form(images, dtype=torch.float64, device=torch.device("cpu"))
    labels = torch.tensor([0, 3, 2, 3, 1])
    noisy = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    query = (noisy, torch.tensor([0.001, 0.1, 0.4, 0.8, 0.99]), labels)
    probs = closed_form.probs(*query)
    assert probs.dtype == torch.float64
    torch.testing.assert_close(probs, closed_form_of(images).probs(*query), rtol=1e-5, atol=1e-9)
