"""Traces of every kind of generator against the networks called by hand, and what each kind refuses."""

import pytest
import torch

from provgen.generators.kinds import make_kind
from provgen.models.classifier import CLEAN_ALPHA_BAR
from provgen.models.diffusion import make_sampling_scheduler, make_training_scheduler, record_feature_maps
from provgen.tracing.classifier_tracer import ClassifierTracer
from provgen.tracing.diffusion_tracer import DiffusionTracer
from provgen.tracing.trace import LEAST_ALPHA_BAR, WINDOW
from provgen.tracing.tracer import Request, network_probs
from provgen.tracing.vae_tracer import LATENT_DRAWS, VaeTracer

NULL = 3
ALL = torch.ones(12, dtype=torch.bool)


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
def network_of(images, tiny_settings):
    """Make a kind of generator and its network with random weights."""

    def call(name):
        kind = make_kind(tiny_settings(f"generator.kind={name}"), images)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return kind, kind.make_network().eval().requires_grad_(requires_grad=False)

    return call


@pytest.fixture(scope="module")
def closed_form_for(images):
    def call(kind, network):
        return kind.closed_form(network, images, dtype=torch.float64, device=torch.device("cpu"))

    return call


def request(labels, **changed) -> Request:
    defaults = {
        "class_labels": torch.tensor(labels),
        "null_label": NULL,
        "generator": [torch.Generator().manual_seed(seed) for seed in range(len(labels))],
        "num_inference_steps": 10,
        "trace_every": 1,
        "guidance_scale": 1.0,
        "is_traced": True,
        "closed_form": None,
        "progress_bar": lambda steps: steps,
    }
    return Request(**{**defaults, **changed})


def softmax_of(provenance, feature_maps, alpha_bar, labels, class_logits=None):
    return provenance.index_logits(feature_maps, alpha_bar, torch.tensor(labels), class_logits).softmax(dim=1)


@pytest.fixture(scope="module")
def diffusion(network_of, provenance):
    scheduler = make_sampling_scheduler(make_training_scheduler("linear"))
    return DiffusionTracer(network_of("diffusion")[1], provenance, scheduler)


@torch.no_grad()
def test_a_denoiser_is_traced_step_by_step_on_what_it_was_given(diffusion, provenance, images, closed_form_of):
    labels = [0, NULL, 2]
    made = diffusion.generate(request(labels, closed_form=closed_form_of(images)))
    noisy = torch.cat([torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(s)) for s in range(3)])
    scheduler, network_sum, exact_sum, in_window, entropies = diffusion.scheduler, 0, 0, 0, []
    for timestep in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[timestep].expand(3)
        with record_feature_maps(diffusion.unet) as feature_maps:
            noise = diffusion.unet(noisy, timestep, class_labels=torch.tensor(labels)).sample
        if alpha_bar[0] >= LEAST_ALPHA_BAR:
            probs = softmax_of(provenance, feature_maps, alpha_bar, labels)
            entropies.append(torch.special.entr(probs).sum(1))
            if WINDOW[0] < alpha_bar[0] < WINDOW[1]:
                network_sum, in_window = network_sum + probs, in_window + 1
                exact_sum = exact_sum + closed_form_of(images).probs(noisy, alpha_bar, torch.tensor(labels))
        noisy = scheduler.step(noise, timestep, noisy).prev_sample
    assert in_window >= 3
    assert torch.equal(made.images, noisy)
    torch.testing.assert_close(made.trace.posterior(), network_sum / in_window)
    torch.testing.assert_close(made.closed_trace.posterior(), exact_sum / in_window)
    attribution = made.trace.attribution(2, is_trajectory=made.is_trajectory, reachable=ALL)
    torch.testing.assert_close(attribution.step_entropy, torch.stack(entropies, dim=1))
    assert made.is_trajectory


@torch.no_grad()
@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_so_many_steps_are_traced_back_from_the_last(every, diffusion, images, closed_form_of):
    labels, closed_form = [0, NULL, 2], closed_form_of(images)
    whole = diffusion.generate(request(labels, num_inference_steps=20, closed_form=closed_form))
    some = diffusion.generate(request(labels, num_inference_steps=20, closed_form=closed_form, trace_every=every))
    assert torch.equal(some.images, whole.images)
    for all_steps, few_steps in ((whole.trace, some.trace), (whole.closed_trace, some.closed_trace)):
        full = all_steps.attribution(3, is_trajectory=True, reachable=ALL)
        thin = few_steps.attribution(3, is_trajectory=True, reachable=ALL)
        assert torch.equal(thin.step_entropy, full.step_entropy[:, (full.alpha_bar.numel() - 1) % every :: every])
        assert torch.equal(thin.alpha_bar, full.alpha_bar[(full.alpha_bar.numel() - 1) % every :: every])
        late = thin.commitment_step - full.commitment_step
        assert ((late >= 0) & (late < every)).all(), "to so many steps the same"


@torch.no_grad()
def test_outside_images_are_traced_at_every_so_many_levels(diffusion, pixels):
    null, asked = torch.full((12,), NULL), {"closed_form": None, "num_inference_steps": 20, "seed": 0}
    whole, thin = (
        diffusion.trace(pixels, null, trace_every=every, **asked).attribution(1, is_trajectory=False, reachable=ALL)
        for every in (1, 2)
    )
    last = len(diffusion.scheduler.timesteps) - 1
    levels = diffusion.scheduler.alphas_cumprod[diffusion.scheduler.timesteps]
    kept = [n for n in range(last % 2, last + 1, 2) if WINDOW[0] < levels[n] < WINDOW[1]]
    assert torch.equal(thin.alpha_bar, levels[kept])
    assert set(thin.alpha_bar.tolist()) < set(whole.alpha_bar.tolist())


@pytest.mark.parametrize(("steps", "clear"), [(50, 4), (20, 1), (10, 1)])
@torch.no_grad()
def test_gradients_of_the_last_layer_are_those_of_the_first_clear_level(diffusion, provenance, pixels, steps, clear):
    """Along the trajectory, of an outside image, and of queries noised beforehand, with or without gradients."""
    scheduler = diffusion.scheduler
    tracer = DiffusionTracer(diffusion.unet, provenance, scheduler, finds_coordinates=True, finds_gradients=True)
    made = tracer.generate(request([0, NULL, 2], num_inference_steps=steps, guidance_scale=3.0))
    images, trajectory = tracer.sampled(request([0, NULL, 2], num_inference_steps=steps, guidance_scale=3.0))
    assert torch.equal(made.images, images)

    def at_level(images, timestep, labels):
        with torch.enable_grad():
            weights = list(diffusion.unet.conv_out.requires_grad_().parameters())
            output = diffusion.unet(images, timestep, class_labels=labels).sample
            rows = [torch.autograd.grad(o.square().mean(), weights, retain_graph=True) for o in output]
        diffusion.unet.requires_grad_(requires_grad=False)
        found = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        return found / found.norm(dim=1, keepdim=True)

    def by_hand(noisy, labels):
        first = len(noisy.alpha_bar) - clear
        return at_level(noisy.images[first], noisy.timesteps[first], labels)

    labels = torch.tensor([0, NULL, 2])
    wanted = by_hand(trajectory, labels)
    found = made.trace.coordinates(0.5)
    torch.testing.assert_close(found[:, -wanted.shape[1] :], wanted)
    torch.testing.assert_close(found, tracer.coordinates(trajectory, labels, 0.5))
    plain = DiffusionTracer(diffusion.unet, provenance, scheduler, finds_coordinates=True)
    assert torch.equal(plain.coordinates(trajectory, labels, 0.5), found[:, : -wanted.shape[1]])

    null = torch.full((12,), NULL)
    noised = tracer.noised(pixels, num_inference_steps=steps, seed=0)
    outside = tracer.trace(pixels, null, closed_form=None, num_inference_steps=steps, trace_every=3, seed=0)
    torch.testing.assert_close(outside.coordinates(0.5), tracer.coordinates(noised, null, 0.5))
    wanted = by_hand(noised, null)
    torch.testing.assert_close(outside.coordinates(0.5)[:, -wanted.shape[1] :], wanted)


def test_passing_over_every_step_that_counts_is_refused(diffusion, message_of):
    asked = request([0], num_inference_steps=20, trace_every=20)
    assert "trace_every=20 passes over all of 20 steps" in message_of(diffusion.generate, asked)


@torch.no_grad()
def test_what_is_not_asked_for_is_not_traced(diffusion, network_of, provenance):
    plain = diffusion.generate(request([0, NULL], is_traced=False))
    assert torch.equal(plain.images, diffusion.generate(request([0, NULL])).images)
    vae = VaeTracer(network_of("vae")[1], provenance)
    decoded = vae.generate(request([NULL], is_traced=False))
    assert torch.equal(decoded.images, vae.generate(request([NULL])).images)
    for trace in (plain.trace, plain.closed_trace, decoded.trace, decoded.closed_trace):
        with pytest.raises(AssertionError):
            trace.posterior()


@torch.no_grad()
def test_a_generator_needs_no_provenance_network_unless_it_is_traced(network_of):
    _, network = network_of("vae")
    made = VaeTracer(network, None).generate(request([NULL], is_traced=False))
    assert made.images.shape == (1, 1, 8, 8)
    with pytest.raises(AssertionError):
        VaeTracer(network, None).generate(request([NULL]))


@torch.no_grad()
def test_a_sample_of_an_autoencoder_is_traced_on_its_decoded_image_and_its_latent(
    network_of, provenance, closed_form_for
):
    kind, network = network_of("vae")
    closed_form = closed_form_for(kind, network)
    made = VaeTracer(network, provenance).generate(request([NULL] * 3, closed_form=closed_form))
    shape = (1, *kind.noise_shape())
    latents = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in range(3)])
    decoded = network.decode(latents).sample
    torch.testing.assert_close(made.images, decoded)
    alpha_bar = torch.full((3,), CLEAN_ALPHA_BAR)
    expected = softmax_of(provenance, network.feature_maps_of(decoded), alpha_bar, [NULL] * 3)
    torch.testing.assert_close(made.trace.posterior(), expected)
    exact = closed_form.probs(latents, alpha_bar, torch.full((3,), NULL))
    torch.testing.assert_close(made.closed_trace.posterior(), exact)
    assert not made.is_trajectory


@torch.no_grad()
def test_an_outside_image_is_traced_on_what_an_autoencoder_makes_of_it(network_of, provenance, closed_form_for, pixels):
    kind, network = network_of("vae")
    closed_form, tracer = closed_form_for(kind, network), VaeTracer(network, provenance)
    labels = torch.tensor([0, NULL, 1, 2])
    asked = {"num_inference_steps": 50, "trace_every": 1, "seed": 3}
    found = tracer.trace(pixels[:4], labels, closed_form=None, **asked)
    exact = tracer.trace(pixels[:4], labels, closed_form=closed_form, **asked)
    for trace in (found, exact):
        torch.testing.assert_close(trace.posterior().sum(1).float(), torch.ones(4))
        assert trace.attribution(1, is_trajectory=False, reachable=ALL).step_entropy.shape == (
            4,
            LATENT_DRAWS,
        )
    assert not torch.allclose(found.posterior(), exact.posterior().float(), atol=1e-3)
    # Of one image alone the same, whatever is in the batch; other noise is other latents.
    alone = tracer.trace(pixels[2:3], labels[2:3], closed_form=None, **asked)
    torch.testing.assert_close(alone.posterior(), found.posterior()[2:3])
    other = tracer.trace(pixels[:4], labels, closed_form=closed_form, num_inference_steps=50, trace_every=1, seed=4)
    assert not torch.equal(other.posterior(), exact.posterior())


@torch.no_grad()
def test_the_latents_of_an_outside_image_are_drawn_from_its_own_gaussian(network_of, closed_form_for, pixels):
    # Mean posterior over many draws of q(z | x_0), by hand with noise of its own: what the tracer's few draws estimate.
    kind, network = network_of("vae")
    closed_form = closed_form_for(kind, network)
    null, alpha_bar = torch.full((400,), NULL), torch.full((400,), CLEAN_ALPHA_BAR)
    draws = []
    for seed in range(16):
        trace = VaeTracer(network, None).trace(
            pixels[:1], null[:1], closed_form=closed_form, num_inference_steps=50, trace_every=1, seed=seed
        )
        draws.append(trace.posterior()[0])
    tracer = torch.stack(draws)
    noise = torch.randn(400, *kind.noise_shape(), generator=torch.Generator().manual_seed(0))
    latents = network(pixels[:1].expand(400, -1, -1, -1), noise, with_feature_maps=False).latents
    by_hand = closed_form.probs(latents, alpha_bar, null)
    error = 5 * (tracer.var(0) / 16 + by_hand.var(0) / 400).sqrt() + 1e-9
    assert ((tracer.mean(0) - by_hand.mean(0)).abs() < error).all()
    assert by_hand.std(0).max() > 0.001, "draws differ"


@pytest.mark.parametrize("label", [0, 2])
def test_an_autoencoder_cannot_be_told_a_class(label, network_of, provenance, message_of):
    tracer = VaeTracer(network_of("vae")[1], provenance)
    assert "without class labels" in message_of(tracer.generate, request([NULL, label]))


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_an_autoencoder_cannot_be_guided(scale, network_of, provenance, message_of):
    tracer = VaeTracer(network_of("vae")[1], provenance)
    message = message_of(tracer.generate, request([NULL], guidance_scale=scale))
    assert f"guidance_scale must be 1, got {scale}" in message


@torch.no_grad()
def test_a_classifier_is_traced_on_the_image_itself(network_of, provenance, closed_form_for, pixels):
    kind, network = network_of("none")
    tracer, labels = ClassifierTracer(network, provenance), [0, NULL, 1, NULL]
    asked = {"num_inference_steps": 50, "trace_every": 1, "seed": 0}
    found = tracer.trace(pixels[:4], torch.tensor(labels), closed_form=None, **asked)
    alpha_bar = torch.full((4,), CLEAN_ALPHA_BAR)
    output = network(pixels[:4])
    expected = softmax_of(provenance, output.feature_maps, alpha_bar, labels, output.class_logits)
    torch.testing.assert_close(found.posterior(), expected)
    closed_form = closed_form_for(kind, network)
    exact = tracer.trace(pixels[:4], torch.tensor([NULL] * 4), closed_form=closed_form, **asked)
    torch.testing.assert_close(exact.posterior(), torch.eye(4, 12, dtype=torch.float64))
    assert exact.attribution(1, is_trajectory=False, reachable=ALL).commitment_step.tolist() == [-1] * 4


@torch.no_grad()
def test_the_class_of_a_two_branch_head_is_the_classifiers(images, network_of, tiny_networks, pixels):
    _, network = network_of("none")
    head = {"kind": "ClassConditionalHead", "num_classes": NULL, "num_slots": 4}
    _, provenance = tiny_networks(images, head=head, has_class_head=False)
    trace = ClassifierTracer(network, provenance).trace(
        pixels, torch.full((12,), NULL), closed_form=None, num_inference_steps=50, trace_every=1, seed=0
    )
    mass = trace.posterior() @ torch.nn.functional.one_hot(images.labels, NULL).float()
    torch.testing.assert_close(mass, network(pixels).class_logits.softmax(dim=1))


def test_a_classifier_generates_nothing(network_of, provenance, message_of):
    message = message_of(ClassifierTracer(network_of("none")[1], provenance).generate, request([NULL] * 2))
    assert "cannot generate 2 images" in message
    assert "generator.kind=none" in message


@torch.no_grad()
def test_traces_look_into_as_many_cells_as_the_network_was_saved_with(images, network_of, tiny_networks, pixels):
    _, network = network_of("none")
    head = {"kind": "TwoStageHead", "num_cells": 3, "num_classes": NULL, "cells": "classes"}
    named = {}
    for beam in (1, 2, None):
        _, provenance = tiny_networks(images, head=head, beam=beam)
        trace = ClassifierTracer(network, provenance).trace(
            pixels, torch.full((12,), NULL), closed_form=None, num_inference_steps=50, trace_every=1, seed=0
        )
        named[beam] = [set(images.labels[row > 0].tolist()) for row in trace.posterior()]
    for beam, most in ((1, 1), (2, 2), (None, NULL)):
        assert {len(classes) for classes in named[beam]} == {most}


@torch.no_grad()
def test_a_search_leaves_out_what_it_did_not_look_at(images, network_of, tiny_networks, pixels):
    _, network = network_of("none")
    head = {"kind": "TwoStageHead", "num_cells": 3, "num_classes": NULL, "cells": "classes"}
    labels = torch.tensor([NULL] * 6 + [0, 1, 2] * 2)
    output = network(pixels)
    probs = {}
    for beam in (1, None):
        _, provenance = tiny_networks(images, head=head, beam=beam)
        alpha_bar = torch.full((12,), CLEAN_ALPHA_BAR)
        probs[beam] = network_probs(provenance, output.feature_maps, alpha_bar, labels)
    found = probs[1] > 0
    torch.testing.assert_close(probs[1][:6], probs[None][:6] * found[:6], rtol=1e-4, atol=1e-7)
    assert (probs[1][:6].sum(dim=1) < 0.999).any(), "other cells hold something"
    torch.testing.assert_close(probs[1][6:].sum(dim=1), torch.ones(6))
