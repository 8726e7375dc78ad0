"""What differs between the kinds of generators, against formulas and networks called by hand."""

import pytest
import torch

from provgen.generators.kinds import ClassifierKind, DiffusionKind, VaeKind, make_kind
from provgen.models.classifier import CLEAN_ALPHA_BAR
from provgen.models.diffusion import encoder_shapes

KINDS = {"diffusion": DiffusionKind, "vae": VaeKind, "none": ClassifierKind}
CPU = torch.device("cpu")


@pytest.fixture
def images(random_images):
    return random_images(9, num_classes=3)


@pytest.fixture
def kind_of(tiny_settings, images):
    return lambda name, *overrides: make_kind(tiny_settings(f"generator.kind={name}", *overrides), images)


def network_of(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind.make_network().eval().requires_grad_(requires_grad=False)


def pixels_of(images):
    return images.images.double() / 127.5 - 1


@pytest.mark.parametrize("name", KINDS)
def test_settings_choose_the_kind(name, kind_of):
    assert type(kind_of(name)) is KINDS[name]


def test_without_saying_so_it_is_a_denoiser(tiny_settings, images):
    assert isinstance(make_kind(tiny_settings(), images), DiffusionKind)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", ["tiny", "medium"])
def test_all_kinds_have_stages_of_the_same_shapes(name, size, tiny_settings, random_images):
    images = random_images(4, channels=3, size=12)
    kind = make_kind(tiny_settings(f"generator.kind={name}", f"generator.size={size}"), images)
    assert kind.shapes() == encoder_shapes(size, 12, 3)


@pytest.mark.parametrize("name", KINDS)
def test_an_image_size_that_cannot_be_halved_is_refused(name, tiny_settings, random_images, message_of):
    kind = make_kind(tiny_settings(f"generator.kind={name}"), random_images(4, size=9))
    assert "data.image_size must be a multiple of 2" in message_of(kind.make_network)


def test_only_a_denoiser_is_told_labels_some_of_the_time(kind_of):
    given = "generator.label_dropout=0.3"
    assert [kind_of(name, given).label_dropout for name in KINDS] == [0.3, 1.0, 1.0]


def test_timesteps_are_those_nearest_to_the_levels(kind_of, alphas_cumprod):
    levels = (0.02, 0.3, 0.5, 0.97)
    by_hand = [min(range(1000), key=lambda t, at=level: abs(float(alphas_cumprod[t]) - at)) for level in levels]
    assert kind_of("diffusion").timesteps(levels) == by_hand
    assert kind_of("vae").timesteps(levels) == kind_of("none").timesteps(levels) == [0]


def test_the_noise_schedule_is_the_settings(kind_of, alphas_cumprod):
    assert torch.equal(kind_of("diffusion").noise_scheduler.alphas_cumprod, alphas_cumprod)
    other = kind_of("diffusion", "generator.beta_schedule=squaredcos_cap_v2").noise_scheduler.alphas_cumprod
    assert not torch.allclose(other, alphas_cumprod)


@pytest.mark.parametrize("name", KINDS)
def test_noise_has_the_shape_that_the_network_takes(name, kind_of, images):
    kind = kind_of(name)
    shape = kind.noise_shape()
    if name != "vae":
        assert shape == (1, 8, 8)
        return
    output = network_of(kind)(pixels_of(images).float(), torch.zeros(9, *shape), with_feature_maps=False)
    assert output.latents.shape == (9, *shape)
    assert len(shape) == 3
    assert torch.Size(shape).numel() < 64, "a latent is smaller than the image"


@pytest.mark.parametrize("name", KINDS)
def test_asking_draws_nothing_from_the_global_generator(name, kind_of):
    kind = kind_of(name)
    before = torch.get_rng_state()
    kind.noise_shape()
    kind.shapes()
    kind.make_observer(CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_networks_have_names_of_their_own_in_checkpoints_and_pipelines(kind_of):
    observers = [kind_of(name).make_observer(CPU) for name in KINDS]
    assert [observer.name for observer in observers] == ["denoiser", "vae", "classifier"]
    assert [observer.component for observer in observers] == ["unet", "vae", "classifier"]


@pytest.mark.parametrize(
    ("overrides", "has_head"),
    [
        ((), True),
        (("provenance.class_loss_weight=0",), False),
        (("provenance.class_loss_weight=0", "provenance.index_head=class_conditional"), True),
        (("provenance.index_head=none",), True),
    ],
)
def test_a_classifier_has_a_class_head_where_something_trains_it(overrides, has_head, kind_of):
    network = network_of(kind_of("none", *overrides))
    assert (network.class_head is not None) == has_head
    assert network.config.num_classes == (3 if has_head else 0)


def test_images_without_classes_have_no_class_head(tiny_settings, random_images):
    kind = make_kind(tiny_settings("generator.kind=none"), random_images(4, num_classes=0))
    assert network_of(kind).class_head is None


def test_an_autoencoder_weighs_its_divergence_as_it_is_told(kind_of):
    assert kind_of("vae", "generator.kl_weight=0.2").make_observer(CPU).kl_weight == 0.2


@pytest.mark.parametrize("name", ["diffusion", "none"])
def test_the_closed_form_of_images_is_that_of_the_forward_process(name, kind_of, images, closed_form_of):
    kind = kind_of(name)
    closed_form = kind.closed_form(network_of(kind), images, dtype=torch.float64, device=CPU)
    labels = torch.tensor([0, 3, 2, 3, 1])
    noisy = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    query = (noisy, torch.tensor([0.001, 0.1, 0.4, 0.8, 0.99]), labels)
    probs = closed_form.probs(*query)
    assert probs.dtype == torch.float64
    torch.testing.assert_close(probs, closed_form_of(images).probs(*query), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_noise_the_closed_form_names_the_copy_and_nothing_else(dtype, kind_of, images):
    kind = kind_of("none")
    closed_form = kind.closed_form(network_of(kind), images, dtype=dtype, device=CPU)
    alpha_bar = torch.full((9,), CLEAN_ALPHA_BAR)
    probs = closed_form.probs(pixels_of(images), alpha_bar, torch.full((9,), 3))
    torch.testing.assert_close(probs, torch.eye(9, dtype=dtype))


def test_the_closed_form_of_an_autoencoder_compares_the_gaussians_of_all_examples(kind_of, images):
    kind = kind_of("vae")
    network = network_of(kind)
    closed_form = kind.closed_form(network, images, dtype=torch.float64, device=CPU)
    output = network(pixels_of(images).float(), torch.zeros(9, *kind.noise_shape()), with_feature_maps=False)
    gaussians = torch.distributions.Normal(output.mean.double(), (output.log_variance.double() / 2).exp())
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, *kind.noise_shape(), generator=generator, dtype=torch.float64)
    densities = gaussians.log_prob(latents[:, None]).flatten(2).sum(2)
    labels, alpha_bar = torch.tensor([3, 0, 3, 2, 3]), torch.full((5,), CLEAN_ALPHA_BAR)
    ruled_out = (labels[:, None] != 3) & (labels[:, None] != images.labels)
    expected = densities.masked_fill(ruled_out, -torch.inf).softmax(dim=1)
    torch.testing.assert_close(closed_form.probs(latents, alpha_bar, labels), expected, rtol=1e-5, atol=1e-9)
    assert ((expected > 0.01) & (expected < 0.9)).sum() > 5, "undecided enough for the test to fail"


@pytest.mark.parametrize("name", KINDS)
def test_a_closed_form_names_what_is_covered_alone(name, kind_of, images):
    kind = kind_of(name)
    network = network_of(kind)
    covered = torch.arange(9) % 2 == 0
    query = (
        torch.randn(4, *kind.noise_shape(), generator=torch.Generator().manual_seed(0)),
        torch.full((4,), 0.3),
        torch.full((4,), 3),
    )
    whole, some = (
        kind.closed_form(network, images, dtype=torch.float64, device=CPU, covered=mask).probs(*query)
        for mask in (None, covered)
    )
    assert not some[:, ~covered].any()
    expected = whole[:, covered] / whole[:, covered].sum(1, keepdim=True)
    torch.testing.assert_close(some[:, covered], expected, rtol=1e-5, atol=1e-9)
    assert whole[:, ~covered].any()
