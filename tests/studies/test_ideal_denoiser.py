"""The ideal denoiser ends on training images, as those of a class in turn, and one step of it is done by hand."""

import torch

from provgen.generators.closed_form import ClosedFormPosterior
from provgen.models.diffusion import make_sampling_scheduler, make_training_scheduler
from provgen.studies.faithfulness.attributor import LEAST_ALPHA_BAR
from provgen.studies.faithfulness.planted import ideal_samples


def sample(images, labels, *, num_classes, noise, asked, steps=50):
    closed_form = ClosedFormPosterior(images, labels, null_label=num_classes)
    scheduler = make_sampling_scheduler(make_training_scheduler("linear"))
    return ideal_samples(closed_form, scheduler, noise, asked, num_inference_steps=steps)


def test_it_ends_on_training_images_of_the_class_that_was_asked_for(generator):
    images = 2 * torch.rand(30, 1, 4, 4, generator=generator, dtype=torch.float64) - 1
    labels, noise = torch.arange(30) % 3, torch.randn(40, 1, 4, 4, generator=generator, dtype=torch.float64)
    asked = torch.arange(40) % 4  # 3 is no class
    made, trajectory = sample(images, labels, num_classes=3, noise=noise, asked=asked)
    distances, parents = torch.cdist(made.flatten(1), images.flatten(1)).min(dim=1)
    assert distances.max() < 0.01
    is_conditional = asked < 3
    assert torch.equal(labels[parents[is_conditional]], asked[is_conditional])
    assert len(labels[parents[~is_conditional]].unique()) == 3
    assert (trajectory.alpha_bars >= LEAST_ALPHA_BAR).all()
    assert trajectory.alpha_bars.diff().min() > 0
    assert trajectory.images.shape[1:] == noise.shape


def test_one_image_is_all_it_can_make(generator):
    """With one training image the denoised image is that image, so x_t keeps its noise at every level."""
    image = torch.full((1, 1, 2, 2), 0.3, dtype=torch.float64)
    noise = torch.randn(2, 1, 2, 2, generator=generator, dtype=torch.float64)
    made, trajectory = sample(image, torch.zeros(1).long(), num_classes=0, noise=noise, asked=torch.zeros(2).long())
    torch.testing.assert_close(made, image.expand(2, -1, -1, -1))
    for x, level in zip(trajectory.images, trajectory.alpha_bars.double(), strict=True):
        implied = (x - level.sqrt() * image) / (1 - level).sqrt()
        assert (implied - implied[:1] - (noise - noise[:1])).abs().max() < 0.05, "only the mean of the noise drifts"
