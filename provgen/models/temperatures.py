"""Temperatures of posteriors over training images, and the noise levels at which posteriors say something."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

# ModelMixin must stand in this module's own namespace, as in `models/provenance.py`.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from scipy.interpolate import PchipInterpolator
from torch import Tensor

ALL_LEVELS = (0.0, 1.0)
"""Window of a generator without noise levels."""


class Tracer(IntEnum):
    """Whose logits are divided by a temperature."""

    NETWORK = 0
    """Those of the provenance network."""
    CLOSED_FORM = 1
    """Those of the exact posterior."""


class Temperatures(ModelMixin, ConfigMixin):
    """Temperature T of p(i | x_t) = softmax_i(logits / T) by noise level, as fitted by `tracing/temperatures.py`.

    1 belongs to a generator that has learned its images by heart, and wider mixing raises T. Between
    fitted levels its logarithm follows a monotone cubic (Fritsch and Carlson 1980, SIAM Journal on Numerical Analysis
    17) of the log signal-to-noise ratio, beyond them it is constant. A new object has T = 1 and the window of all.
    """

    @register_to_config
    def __init__(
        self,
        *,
        num_levels: int = 1,
        null_label: int = 0,  # noqa: ARG002 - register_to_config keeps it
        low: float = ALL_LEVELS[0],  # noqa: ARG002
        high: float = ALL_LEVELS[1],  # noqa: ARG002
        least_explained: float = 0.0,  # noqa: ARG002
        copy: float = 1.0,  # noqa: ARG002
    ) -> None:
        """Make an empty table.

        Args:
            num_levels: Noise levels at which temperatures are fitted.
            null_label: The label that stands for no label.
            low: Noise level above which posteriors say more than the prior, in [0, 1).
            high: Noise level below which the image is not yet decided, in (0, 1].
            least_explained: Share of an image that training images must explain, or it has no sources.
            copy: Share that one training image alone explains of copies.
        """
        super().__init__()
        self.alpha_bars: Tensor
        self.register_buffer("alpha_bars", torch.full((num_levels,), 0.5, dtype=torch.float64))
        self.log_temperatures: Tensor
        self.register_buffer("log_temperatures", torch.zeros(len(Tracer), 2, num_levels, dtype=torch.float64))

    @property
    def window(self) -> tuple[float, float]:
        """Noise levels whose posteriors are averaged, ends excluded."""
        return self.config.low, self.config.high

    def temperature(self, tracer: Tracer, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Give the temperature of every query, (query,), for noise levels (query,) and labels int64 (query,)."""
        conditional, unconditional = (self._at(tracer, row, alpha_bar) for row in range(2))
        return torch.where(class_labels != self.config.null_label, conditional, unconditional)

    def _at(self, tracer: Tracer, row: int, alpha_bar: Tensor) -> Tensor:
        fitted = self.log_temperatures[tracer, row].cpu().double().numpy()
        if len(fitted) == 1:
            return torch.full_like(alpha_bar, float(np.exp(fitted[0])))
        places = torch.logit(self.alpha_bars.cpu().double()).numpy()
        asked = torch.logit(alpha_bar.cpu().double()).numpy().clip(places[0], places[-1])
        return torch.from_numpy(np.exp(PchipInterpolator(places, fitted)(asked))).to(alpha_bar)
