"""Each generator's forward pass worked out beside it, row by row; the rows of a share are rows of the whole."""

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from provgen.generators.kinds import make_kind
from provgen.generators.observers import ClassifierObserver, Observation, VaeObserver

from provgen.data.batches import BatchStream
from provgen.models.classifier import CLEAN_ALPHA_BAR

KINDS = ("diffusion", "vae", "none")


@pytest.fixture
def images(random_images):
    """Twelve images of three classes; the last two have none."""
    some = random_images(12, num_classes=3)
    some.labels[-2:] = 3
    return some


@pytest.fixture
def kind_of(tiny_settings, images):
    def call(kind, *overrides):
        settings = tiny_settings(f"generator.kind={kind}", "generator.label_dropout=0.5", *overrides)
        return make_kind(settings, images)

    return call


@pytest.fixture
def make_batch(images):
    def call(kind, size=12):
        stream = BatchStream(
            images,
            batch_size=size,
            num_train_timesteps=1000,
            label_dropout=kind.label_dropout,
            seed=0,
            noise_shape=kind.noise_shape(),
        )
        return stream.batch(0)

    return call


def network_of(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind.make_network().eval()


def observe(kind, network, batch) -> Observation:
    with torch.no_grad():
        return kind.make_observer(torch.device("cpu")).observe(network, batch)


def test_a_denoiser_is_given_the_noisy_image_and_charged_for_the_noise(kind_of, make_batch, alphas_cumprod):
    kind = kind_of("diffusion")
    network, batch = network_of(kind), make_batch(kind)
    seen = observe(kind, network, batch)
    alpha_bar = torch.stack([alphas_cumprod[t] for t in batch.timesteps])
    assert torch.equal(seen.alpha_bar, alpha_bar)
    pairs = zip(alpha_bar, batch.clean_images, batch.noise, strict=True)
    noisy = torch.stack([a.sqrt() * image + (1 - a).sqrt() * noise for a, image, noise in pairs])
    torch.testing.assert_close(seen.query, noisy)
    assert torch.equal(seen.feature_maps[0], seen.query)
    assert torch.equal(seen.class_labels, batch.labels)
    assert (batch.labels[batch.clean_labels < 3] == 3).any(), "some labels are dropped"
    with torch.no_grad():
        predicted = network(noisy, batch.timesteps, class_labels=batch.labels).sample
    expected = torch.stack([F.mse_loss(p, n) for p, n in zip(predicted, batch.noise, strict=True)])
    torch.testing.assert_close(seen.loss, expected)
    assert seen.parts == {"denoising_loss": seen.loss}
    assert seen.class_logits is None


def test_an_autoencoder_is_charged_for_pixels_and_divergence(kind_of, make_batch):
    kind = kind_of("vae", "generator.kl_weight=0.7")
    network, batch = network_of(kind), make_batch(kind)
    seen = observe(kind, network, batch)
    with torch.no_grad():
        output = network(batch.clean_images, batch.noise, with_feature_maps=True)
        decoded = network.decode(seen.query).sample
    errors = [F.mse_loss(a, b) for a, b in zip(decoded, batch.clean_images, strict=True)]
    torch.testing.assert_close(seen.parts["reconstruction_loss"], torch.stack(errors))
    gaussians = torch.distributions.Normal(output.mean, (output.log_variance / 2).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    divergence = torch.distributions.kl_divergence(gaussians, standard).flatten(1).sum(1) / 64
    torch.testing.assert_close(seen.parts["latent_divergence"], divergence)
    torch.testing.assert_close(seen.loss, torch.stack(errors) + 0.7 * divergence)
    torch.testing.assert_close(seen.query, gaussians.mean + gaussians.stddev * batch.noise)


def test_the_stages_of_an_autoencoder_are_those_of_what_it_decodes(kind_of, make_batch):
    kind = kind_of("vae")
    network, batch = network_of(kind), make_batch(kind)
    seen = observe(kind, network, batch)
    with torch.no_grad():
        decoded = network.decode(seen.query).sample
        expected = network.feature_maps_of(decoded)
    torch.testing.assert_close(seen.feature_maps, expected)
    torch.testing.assert_close(seen.feature_maps[0], decoded)
    assert torch.equal(seen.alpha_bar, torch.full((12,), CLEAN_ALPHA_BAR))
    assert (seen.class_labels == 3).all(), "an autoencoder is told nothing"


def test_an_autoencoder_costs_the_same_whether_its_stages_are_shown_or_not(kind_of, make_batch):
    kind = kind_of("vae")
    network, batch = network_of(kind), make_batch(kind)
    with torch.no_grad():
        shown, hidden = (VaeObserver(0.3).observe(network, batch, with_feature_maps=s) for s in (True, False))
    assert torch.equal(shown.loss, hidden.loss)
    assert torch.equal(shown.query, hidden.query)


def test_a_classifier_is_charged_for_the_class_where_there_is_one(kind_of, make_batch):
    kind = kind_of("none", "provenance.class_loss_weight=0.2")
    network, batch = network_of(kind), make_batch(kind)
    seen = observe(kind, network, batch)
    log_probs = seen.class_logits.log_softmax(dim=1)
    expected = [
        -log_probs[row, label] if label < 3 else torch.tensor(0.0)
        for row, label in enumerate(batch.clean_labels.tolist())
    ]
    torch.testing.assert_close(seen.parts["class_loss"], torch.stack(expected))
    torch.testing.assert_close(seen.loss, 0.2 * torch.stack(expected))
    assert (seen.loss == 0).tolist() == (batch.clean_labels == 3).tolist()
    assert (seen.loss == 0).sum() == 2
    assert torch.equal(seen.query, batch.clean_images)
    assert torch.equal(seen.feature_maps[0], batch.clean_images)
    assert torch.equal(seen.alpha_bar, torch.full((12,), CLEAN_ALPHA_BAR))
    assert (seen.class_labels == 3).all(), "the label is what it shall find out"


def test_images_without_a_class_leave_no_gradient_in_a_classifier(kind_of, make_batch):
    kind = kind_of("none")
    network, batch = network_of(kind), make_batch(kind)
    nameless = (batch.clean_labels == 3).nonzero().flatten()
    ClassifierObserver(1.0).observe(network, batch.select(nameless)).loss.sum().backward()
    assert not any(parameter.grad.any() for parameter in network.parameters())


def test_a_classifier_without_a_class_head_has_no_loss(kind_of, make_batch):
    kind = kind_of("none", "provenance.class_loss_weight=0")
    seen = observe(kind, network_of(kind), make_batch(kind))
    assert torch.equal(seen.loss, torch.zeros(12))
    assert seen.parts == {}
    assert seen.class_logits is None


@pytest.mark.parametrize("name", KINDS)
def test_stages_have_the_shapes_that_the_kind_announces(name, kind_of, make_batch):
    kind = kind_of(name)
    seen = observe(kind, network_of(kind), make_batch(kind))
    assert [tuple(stage.shape) for stage in seen.feature_maps] == [(12, c, s, s) for c, s in kind.shapes()]
    assert all(stage.isfinite().all() for stage in seen.feature_maps)


@pytest.mark.parametrize("name", KINDS)
def test_the_rows_of_a_share_are_rows_of_the_whole(name, kind_of, make_batch):
    kind = kind_of(name)
    network, batch = network_of(kind), make_batch(kind)
    whole = observe(kind, network, batch)
    for process in range(3):
        share = observe(kind, network, batch.share(process, 3))
        rows = slice(4 * process, 4 * process + 4)
        for field in fields(Observation):
            value, expected = getattr(share, field.name), getattr(whole, field.name)
            if isinstance(value, torch.Tensor):
                value, expected = [value], [expected]
            for each, other in zip(_tensors(value), _tensors(expected), strict=True):
                torch.testing.assert_close(each, other[rows], rtol=1e-4, atol=1e-5)


def _tensors(value) -> list[torch.Tensor]:
    return list(value.values()) if isinstance(value, dict) else list(value or [])


@pytest.mark.parametrize("name", KINDS)
def test_the_whole_generator_learns_from_its_loss(name, kind_of, make_batch):
    kind = kind_of(name)
    network = network_of(kind).train()
    kind.make_observer(torch.device("cpu")).observe(network, make_batch(kind)).loss.mean().backward()
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", KINDS)
def test_a_loss_leaves_out_what_is_not_its_rows_own(name, kind_of, make_batch):
    kind = kind_of(name)
    network, batch = network_of(kind), make_batch(kind)
    before = observe(kind, network, batch).loss
    row = int((batch.clean_labels < 3).nonzero()[2])
    batch.clean_images[row] *= -1
    changed = (observe(kind, network, batch).loss - before).abs() > 1e-7
    assert changed.nonzero().flatten().tolist() == [row]
