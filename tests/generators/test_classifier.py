"""The classifier's loss by hand, its one step, and its closed form, which names exact copies."""

import pytest
import torch

from provgen.models.classifier import CLEAN_ALPHA_BAR

NULL = 3
CPU = torch.device("cpu")


@torch.no_grad()
def test_a_classifier_is_charged_for_the_class_where_there_is_one(make, make_batch):
    classifier = make("none", "provenance.class_loss_weight=0.2")
    batch = make_batch(classifier)
    output = classifier.forward(batch)
    log_probs = output.class_logits.log_softmax(dim=1)
    expected = [
        -log_probs[row, label] if label < NULL else torch.tensor(0.0)
        for row, label in enumerate(batch.clean_labels.tolist())
    ]
    torch.testing.assert_close(output.parts["class_loss"], torch.stack(expected))
    torch.testing.assert_close(output.loss, 0.2 * torch.stack(expected))
    assert (output.loss == 0).tolist() == (batch.clean_labels == NULL).tolist()
    assert (output.loss == 0).sum() == 2
    assert torch.equal(output.query, batch.clean_images)
    assert torch.equal(output.feature_maps[0], batch.clean_images)
    assert torch.equal(output.alpha_bar, torch.full((12,), CLEAN_ALPHA_BAR))
    assert (output.class_labels == NULL).all(), "the label is what it shall find out"


def test_images_without_a_class_leave_no_gradient_in_a_classifier(make, make_batch):
    classifier = make("none", "provenance.class_loss_weight=1")
    classifier.network.requires_grad_()
    batch = make_batch(classifier)
    without_class = (batch.clean_labels == NULL).nonzero().flatten()
    classifier.forward(batch.select(without_class)).loss.sum().backward()
    assert not any(parameter.grad.any() for parameter in classifier.network.parameters())


def test_a_classifier_without_a_class_head_has_no_loss(make, make_batch):
    classifier = make("none", "provenance.class_loss_weight=0")
    output = classifier.forward(make_batch(classifier))
    assert torch.equal(output.loss, torch.zeros(12))
    assert output.parts == {}
    assert output.class_logits is None


@torch.no_grad()
def test_outside_images_are_shown_as_they_are_in_one_step(make, pixels):
    classifier = make("none")
    labels = torch.arange(12) % 4
    (step,) = classifier.renoise(pixels, labels, num_inference_steps=50, seed=0)
    output = classifier.network(pixels)
    assert torch.equal(step.query, pixels)
    assert torch.equal(step.class_logits, output.class_logits)
    torch.testing.assert_close(step.feature_maps, output.feature_maps)
    torch.testing.assert_close(classifier.encode(pixels), output.feature_maps[-1].flatten(1))


def test_a_classifier_generates_nothing(make, message_of):
    classifier = make("none")
    message = message_of(
        classifier.sample, torch.full((2,), NULL), null_label=NULL, generator=None, num_inference_steps=50,
        guidance_scale=1.0,
    )  # fmt: skip
    assert "cannot generate 2 images" in message
    assert "generator.kind=none" in message
    assert [make(kind).can_sample for kind in ("diffusion", "vae", "none")] == [True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_noise_the_closed_form_names_the_copy_and_nothing_else(dtype, make, images, pixels):
    closed_form = make("none").closed_form(images, dtype=dtype, device=CPU)
    alpha_bar = torch.full((12,), CLEAN_ALPHA_BAR)
    probs = closed_form.probs(pixels.double(), alpha_bar, torch.full((12,), NULL))
    torch.testing.assert_close(probs, torch.eye(12, dtype=dtype))
