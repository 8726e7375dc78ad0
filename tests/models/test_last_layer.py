"""Last-layer gradients: against automatic differentiation."""

import torch
from torch import nn

from provgen.models.diffusion import last_layer_gradients, make_denoiser, record_features


def test_they_are_the_gradients_of_the_last_layer_alone():
    torch.manual_seed(0)
    unet = make_denoiser("tiny", image_size=8, image_channels=3, num_classes=2).eval()
    nn.init.normal_(unet.conv_out.bias)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    with record_features(unet) as features:
        output = unet(images, torch.tensor(100), class_labels=labels).sample
    found = last_layer_gradients(unet, features[0], output)
    for row, image in enumerate(output):
        loss = image.square().mean()
        wanted = torch.autograd.grad(loss, list(unet.conv_out.parameters()), retain_graph=True)
        torch.testing.assert_close(found[row], torch.cat([part.flatten() for part in wanted]))
    unet(images, torch.tensor(100), class_labels=labels)
    assert len(features) == 1, "nothing is recorded outside the block"
