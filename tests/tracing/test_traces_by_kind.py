"""Traces of every kind of generator against the networks called by hand."""

import pytest
import torch

from provgen.models.classifier import CLEAN_ALPHA_BAR
from provgen.models.diffusion import record_feature_maps
from provgen.models.temperatures import ALL_LEVELS, Temperatures, Tracer
from provgen.tracing.trace import (
    CreditFeatures,
    Levels,
    MeanPosterior,
    Recorder,
    ask_closed_form,
    ask_network,
    trace,
)

NULL = 3
ALL = torch.ones(12, dtype=torch.bool)
CPU = torch.device("cpu")
LABELS = [0, NULL, 2]
WINDOW = (0.05, 0.9)


@pytest.fixture(scope="module")
def images(random_images):
    return random_images(12, num_classes=NULL)


@pytest.fixture(scope="module")
def pixels(images):
    return images.images.float() / 127.5 - 1


@pytest.fixture(scope="module")
def provenance(images, tiny_networks):
    return tiny_networks(images)[1]


@pytest.fixture(scope="module")
def of_kind(images, generator_of):
    """Give a generator of a kind with random weights; tests leave it as it is."""
    made = {kind: generator_of(kind, images) for kind in ("diffusion", "vae", "none")}
    return made.__getitem__


@pytest.fixture(scope="module")
def diffusion(of_kind):
    return of_kind("diffusion")


def sampling(generator, labels, *, steps=10, guidance_scale=1.0):
    return generator.sample(
        torch.tensor(labels),
        null_label=NULL,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(labels))],
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
    )


def sampled(generator, asks, labels, *, steps=10, every=1):
    """Sample; give the images and one mean posterior for each `ask`."""
    looks = [MeanPosterior(ask, Levels.of(generator, steps, every, WINDOW)) for ask in asks]
    return trace(sampling(generator, labels, steps=steps), *looks).images, looks


def outside(generator, ask, pixels, labels, *, steps=50, every=1, seed=0):
    """Trace images from outside, as a pipeline does."""
    look = MeanPosterior(ask, Levels.of(generator, steps, every, WINDOW), only_window=True)
    trace(generator.renoise(pixels, torch.as_tensor(labels), num_inference_steps=steps, seed=seed), look)
    return look


def attribution_of(look, top_k=3, *, is_trajectory=True):
    return look.attribution(top_k, is_trajectory=is_trajectory, reachable=ALL)


def softmax_of(provenance, feature_maps, alpha_bar, labels, class_logits=None):
    return provenance.index_logits(feature_maps, alpha_bar, torch.tensor(labels), class_logits).softmax(dim=1)


def exact_of(generator, images):
    return generator.closed_form(images, dtype=torch.float64, device=CPU)


@torch.no_grad()
def test_a_denoiser_is_traced_step_by_step_on_what_it_was_given(
    diffusion, provenance, images, closed_form_of, sampler_of, mean_over_ratios
):
    asks = [ask_network(provenance), ask_closed_form(closed_form_of(images))]
    found, (network, exact) = sampled(diffusion, asks, LABELS)
    noisy = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in range(3)])
    scheduler, network_probs, exact_probs, inside, entropies = sampler_of(10), [], [], [], []
    for timestep in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[timestep].expand(3)
        with record_feature_maps(diffusion.network) as feature_maps:
            noise = diffusion.network(noisy, timestep, class_labels=torch.tensor(LABELS)).sample
        if alpha_bar[0] > WINDOW[0]:
            probs = softmax_of(provenance, feature_maps, alpha_bar, LABELS)
            entropies.append(torch.special.entr(probs).sum(1))
            if alpha_bar[0] < WINDOW[1]:
                inside.append(float(alpha_bar[0]))
                network_probs.append(probs)
                exact_probs.append(closed_form_of(images).probs(noisy, alpha_bar, torch.tensor(LABELS)))
        noisy = scheduler.step(noise, timestep, noisy).prev_sample
    assert len(inside) >= 3
    assert torch.equal(found, noisy)
    for look, probs in ((network, network_probs), (exact, exact_probs)):
        torch.testing.assert_close(look.posterior(), mean_over_ratios(inside, probs))
    torch.testing.assert_close(attribution_of(network).step_entropy, torch.stack(entropies, dim=1))


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_so_many_steps_are_traced_back_from_the_last(every, diffusion, provenance, images, closed_form_of):
    asks = [ask_network(provenance), ask_closed_form(closed_form_of(images))]
    whole, all_steps = sampled(diffusion, asks, LABELS, steps=20)
    part, few_steps = sampled(diffusion, asks, LABELS, steps=20, every=every)
    assert torch.equal(part, whole)
    for full, thin in zip(map(attribution_of, all_steps), map(attribution_of, few_steps), strict=True):
        kept = slice((full.alpha_bar.numel() - 1) % every, None, every)
        assert torch.equal(thin.step_entropy, full.step_entropy[:, kept])
        assert torch.equal(thin.alpha_bar, full.alpha_bar[kept])
        late = thin.commitment_step - full.commitment_step
        assert ((late >= 0) & (late < every)).all(), "to so many steps the same"


@torch.no_grad()
def test_outside_images_are_traced_at_every_so_many_levels(diffusion, provenance, pixels):
    null = torch.full((12,), NULL)
    whole, thin = (
        attribution_of(
            outside(diffusion, ask_network(provenance), pixels, null, steps=20, every=every), is_trajectory=False
        )
        for every in (1, 2)
    )
    levels = diffusion.alpha_bars(20)
    kept = [n for n in range(1, 20, 2) if WINDOW[0] < levels[n] < WINDOW[1]]
    assert torch.equal(thin.alpha_bar, levels[kept])
    assert set(thin.alpha_bar.tolist()) < set(whole.alpha_bar.tolist())


@torch.no_grad()
def test_the_posterior_of_an_outside_image_is_the_mean_over_its_levels(diffusion, provenance, pixels, mean_over_ratios):
    labels = torch.arange(12) % 4
    look = outside(diffusion, ask_network(provenance), pixels, labels, steps=20, seed=7)
    levels, probs = [], []
    for step in diffusion.renoise(pixels, labels, num_inference_steps=20, seed=7):
        if WINDOW[0] < step.alpha_bar < WINDOW[1]:
            alpha_bars = step.alpha_bar.expand(12)
            levels.append(float(step.alpha_bar))
            probs.append(softmax_of(provenance, step.feature_maps, alpha_bars, labels.tolist()))
    torch.testing.assert_close(look.posterior(), mean_over_ratios(levels, probs))


def directions_of(unet, images, timestep, labels):
    """The last layer's gradients of each output's mean square, by autograd, in unit length."""
    with torch.enable_grad():
        weights = list(unet.conv_out.requires_grad_().parameters())
        output = unet(images, timestep, class_labels=labels).sample
        rows = [torch.autograd.grad(o.square().mean(), weights, retain_graph=True) for o in output]
    unet.requires_grad_(requires_grad=False)
    found = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    return found / found.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("steps", [50, 10])
@torch.no_grad()
def test_credit_features_are_those_of_the_last_step_and_its_gradients(diffusion, provenance, pixels, steps):
    """Along the trajectory, of an outside image, and of noisy images recorded beforehand."""
    unet = diffusion.network

    def looks():
        return [CreditFeatures(provenance, denoiser=unet), CreditFeatures(provenance)]

    def replayed(noisy, labels):
        """Look at recorded images again, each as a step of its own."""
        again = looks()
        levels = zip(noisy.images, noisy.timesteps, strict=True)
        trace((diffusion.step_at(*level, labels, number=n) for n, level in enumerate(levels)), *again)
        return again

    def check(features, plain, noisy, labels):
        last, timestep, level = noisy.images[-1], noisy.timesteps[-1], noisy.alpha_bars[-1]
        wanted = directions_of(unet, last, timestep, labels)
        found = features.features()
        torch.testing.assert_close(found[:, -wanted.shape[1] :], wanted)
        torch.testing.assert_close(plain.features(), found[:, : -wanted.shape[1]])
        for again, expected in zip(replayed(noisy, labels), (features, plain), strict=True):
            torch.testing.assert_close(again.features(), expected.features())
        with record_feature_maps(unet) as feature_maps:
            unet(last, timestep, class_labels=labels)
        embedded = provenance.embed(feature_maps, level.expand(len(last)))
        by_hand = torch.cat([embedded, last.flatten(1)], dim=1) / level.sqrt()
        torch.testing.assert_close(plain.features(), by_hand, rtol=1e-3, atol=1e-4)

    labels, recorder, along = torch.tensor(LABELS), Recorder(least_alpha_bar=0.01), looks()
    images = trace(sampling(diffusion, LABELS, steps=steps, guidance_scale=3.0), *along, recorder).images
    assert torch.equal(trace(sampling(diffusion, LABELS, steps=steps, guidance_scale=3.0)).images, images)
    check(*along, recorder.noisy_images(), labels)

    null, recorder, noised = torch.full((12,), NULL), Recorder(least_alpha_bar=0.01), looks()
    trace(diffusion.renoise(pixels, null, num_inference_steps=steps, seed=0), *noised, recorder)
    check(*noised, recorder.noisy_images(), null)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "labels"), [("vae", [NULL] * 3), ("none", None)])
def test_credit_features_of_other_kinds_are_the_embedding_and_the_image(kind, labels, of_kind, provenance, pixels):
    generator, look = of_kind(kind), CreditFeatures(provenance)
    null = torch.full((12,), NULL)
    steps = generator.renoise(pixels, null, num_inference_steps=50, seed=0) if labels is None else None
    last = trace(sampling(generator, labels) if steps is None else steps, look)
    image = pixels if last.images is None else last.images
    found, level = look.features(), torch.tensor(CLEAN_ALPHA_BAR)
    embedded = provenance.embed(last.feature_maps, level.expand(len(image)))
    torch.testing.assert_close(found, torch.cat([embedded, image.flatten(1)], dim=1) / level.sqrt())


@torch.no_grad()
def test_a_recorder_keeps_what_the_denoiser_was_given(diffusion, sampler_of):
    recorder, steps = Recorder(least_alpha_bar=0.01), []
    trace(sampling(diffusion, LABELS, steps=20), recorder, steps.append)
    kept = [step for step in steps if step.alpha_bar >= 0.01]
    noisy = recorder.noisy_images()
    assert 0 < len(kept) < 20
    assert torch.equal(noisy.images, torch.stack([step.query for step in kept]))
    assert torch.equal(noisy.timesteps, sampler_of(20).timesteps[-len(kept) :])
    assert torch.equal(noisy.alpha_bars, diffusion.alpha_bars(20)[-len(kept) :])


@pytest.mark.parametrize(("kind", "labels"), [("diffusion", LABELS), ("vae", [NULL] * 3)])
@torch.no_grad()
def test_looking_changes_no_image(kind, labels, of_kind, provenance):
    generator = of_kind(kind)
    traced, _ = sampled(generator, [ask_network(provenance)], labels)
    for step in sampling(generator, labels):
        images = step.images
    assert torch.equal(images, traced)
    assert torch.equal(trace(sampling(generator, labels)).images, traced)


@torch.no_grad()
def test_a_sample_of_an_autoencoder_is_traced_on_its_decoded_image_and_its_latent(of_kind, provenance, images):
    vae = of_kind("vae")
    asks = [ask_network(provenance), ask_closed_form(exact_of(vae, images))]
    found, (network, exact) = sampled(vae, asks, [NULL] * 3)
    shape = (1, *vae.noise_shape)
    latents = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in range(3)])
    decoded = vae.network.decode(latents).sample
    torch.testing.assert_close(found, decoded)
    alpha_bar = torch.full((3,), CLEAN_ALPHA_BAR)
    expected = softmax_of(provenance, vae.network.feature_maps_of(decoded), alpha_bar, [NULL] * 3)
    torch.testing.assert_close(network.posterior(), expected)
    expected = exact_of(vae, images).probs(latents, alpha_bar, torch.full((3,), NULL))
    torch.testing.assert_close(exact.posterior(), expected)
    assert Levels.of(vae, 10, 1, WINDOW) == Levels(None, ALL_LEVELS)


@torch.no_grad()
def test_an_outside_image_is_traced_on_what_an_autoencoder_makes_of_it(of_kind, provenance, images, pixels):
    vae, labels = of_kind("vae"), torch.tensor([0, NULL, 1, 2])
    network, exact = ask_network(provenance), ask_closed_form(exact_of(vae, images))
    found, other = (outside(vae, ask, pixels[:4], labels, seed=3) for ask in (network, exact))
    for look in (found, other):
        torch.testing.assert_close(look.posterior().sum(1).float(), torch.ones(4))
    assert not torch.allclose(found.posterior(), other.posterior().float(), atol=1e-3)
    steps = list(vae.renoise(pixels[:4], labels, num_inference_steps=50, seed=3))
    alpha_bar = torch.full((4,), CLEAN_ALPHA_BAR)
    by_hand = [softmax_of(provenance, step.feature_maps, alpha_bar, labels.tolist()) for step in steps]
    torch.testing.assert_close(found.posterior(), torch.stack(by_hand).mean(dim=0))
    assert attribution_of(found, is_trajectory=False).step_entropy.shape == (4, len(steps))
    # Of one image alone the same, whatever is in the batch; other noise is other latents.
    alone = outside(vae, network, pixels[2:3], labels[2:3], seed=3)
    torch.testing.assert_close(alone.posterior(), found.posterior()[2:3])
    assert not torch.equal(outside(vae, exact, pixels[:4], labels, seed=4).posterior(), other.posterior())


@torch.no_grad()
def test_the_latents_of_an_outside_image_are_drawn_from_its_own_gaussian(of_kind, images, pixels):
    # Mean posterior over many draws of q(z | x_0), by hand with noise of its own: what a trace's few draws estimate.
    vae, closed_form = of_kind("vae"), exact_of(of_kind("vae"), images)
    null, alpha_bar = torch.full((400,), NULL), torch.full((400,), CLEAN_ALPHA_BAR)
    ask = ask_closed_form(closed_form)
    traced = torch.stack([outside(vae, ask, pixels[:1], null[:1], seed=seed).posterior()[0] for seed in range(16)])
    noise = torch.randn(400, *vae.noise_shape, generator=torch.Generator().manual_seed(0))
    latents = vae.network(pixels[:1].expand(400, -1, -1, -1), noise, with_feature_maps=False).latents
    by_hand = closed_form.probs(latents, alpha_bar, null)
    error = 5 * (traced.var(0) / 16 + by_hand.var(0) / 400).sqrt() + 1e-9
    assert ((traced.mean(0) - by_hand.mean(0)).abs() < error).all()
    assert by_hand.std(0).max() > 0.001, "draws differ"


@torch.no_grad()
def test_a_classifier_is_traced_on_the_image_itself(of_kind, provenance, images, pixels):
    classifier, labels = of_kind("none"), [0, NULL, 1, NULL]
    found = outside(classifier, ask_network(provenance), pixels[:4], labels)
    alpha_bar = torch.full((4,), CLEAN_ALPHA_BAR)
    output = classifier.network(pixels[:4])
    expected = softmax_of(provenance, output.feature_maps, alpha_bar, labels, output.class_logits)
    torch.testing.assert_close(found.posterior(), expected)
    exact = outside(classifier, ask_closed_form(exact_of(classifier, images)), pixels[:4], [NULL] * 4)
    torch.testing.assert_close(exact.posterior(), torch.eye(4, 12, dtype=torch.float64))
    assert attribution_of(exact, is_trajectory=False).commitment_step.tolist() == [-1] * 4


@torch.no_grad()
def test_the_class_of_a_two_branch_head_is_the_classifiers(of_kind, images, tiny_networks, pixels):
    classifier = of_kind("none")
    head = {"kind": "ClassConditionalHead", "num_classes": NULL, "num_slots": 4}
    _, provenance = tiny_networks(images, head=head, has_class_head=False)
    look = outside(classifier, ask_network(provenance), pixels, [NULL] * 12)
    mass = look.posterior() @ torch.nn.functional.one_hot(images.labels, NULL).float()
    torch.testing.assert_close(mass, classifier.network(pixels).class_logits.softmax(dim=1))


HEAD = {"kind": "TwoStageHead", "num_cells": 3, "num_classes": NULL, "cells": "classes"}


@torch.no_grad()
def test_traces_look_into_as_many_cells_as_the_network_was_saved_with(of_kind, images, tiny_networks, pixels):
    for beam, most in ((1, 1), (2, 2), (None, NULL)):
        _, provenance = tiny_networks(images, head=HEAD, beam=beam)
        look = outside(of_kind("none"), ask_network(provenance), pixels, [NULL] * 12)
        assert {len(set(images.labels[row > 0].tolist())) for row in look.posterior()} == {most}


@torch.no_grad()
def test_a_search_leaves_out_what_it_did_not_look_at(of_kind, images, tiny_networks, pixels):
    labels = torch.tensor([NULL] * 6 + [0, 1, 2] * 2)
    probs = {}
    for beam in (1, None):
        _, provenance = tiny_networks(images, head=HEAD, beam=beam)
        (step,) = of_kind("none").renoise(pixels, labels, num_inference_steps=50, seed=0)
        probs[beam] = ask_network(provenance)(step)
    found = probs[1] > 0
    torch.testing.assert_close(probs[1][:6], probs[None][:6] * found[:6], rtol=1e-4, atol=1e-7)
    assert (probs[1][:6].sum(dim=1) < 0.999).any(), "other cells hold something"
    torch.testing.assert_close(probs[1][6:].sum(dim=1), torch.ones(6))


@torch.no_grad()
@pytest.mark.parametrize("beam", [None, 2])
def test_a_network_under_a_temperature_keeps_what_its_beam_leaves_out(beam, of_kind, images, tiny_networks, pixels):
    """Probabilities to the power 1/T, normalised to the mass of the unconditional posterior that was looked at."""
    _, provenance = tiny_networks(images, head=HEAD, beam=beam)
    labels = torch.tensor([NULL] * 6 + [0, 1, 2] * 2)
    (step,) = of_kind("none").renoise(pixels, labels, num_inference_steps=50, seed=0)
    temperatures = Temperatures(null_label=NULL)
    temperatures.log_temperatures[Tracer.CLOSED_FORM] = 5.0  # the other tracer's, which must not count
    temperatures.log_temperatures[Tracer.NETWORK] = torch.tensor([[0.5], [3.0]]).log()
    plain, found = ask_network(provenance)(step), ask_network(provenance, temperatures)(step)
    powers = plain ** (1 / torch.tensor([3.0] * 6 + [0.5] * 6))[:, None]
    expected = powers * (plain.sum(dim=1) / powers.sum(dim=1))[:, None]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(found, plain, atol=1e-3)
    assert (found[:6].sum(dim=1) < 0.999).any() == (beam is not None)
