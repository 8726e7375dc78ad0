"""`ProvenancePipeline`: images with one seed each, and the training examples each one comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from provgen.attribution.network import NetworkPosterior
from provgen.attribution.posterior import ClosedFormPosterior
from provgen.attribution.scores import Attribution, check_top_k
from provgen.attribution.trajectory import LEAST_SIGNAL, WINDOW, TrajectoryTrace
from provgen.data.images import from_pil, to_pil, to_uint8, to_unit_range
from provgen.data.manifest import Manifest
from provgen.errors import InputError
from provgen.models.diffusion import record_stages
from provgen.models.provenance import ProvenanceNetwork
from provgen.training.batches import seeded_generator

MANIFEST_NAME = "manifest.parquet"

ATTRIBUTE_BATCH = 64
"""Outside images traced at a time; bounds the (query, train) matrices."""


@dataclass
class ProvenancePipelineOutput(BaseOutput):
    """Generated images and their sources."""

    images: Any
    """PIL images; with `output_type="pt"` a uint8 tensor (query, channel, height, width)."""
    attribution: Any
    """`Attribution` by the provenance network; None with `top_k=None`."""
    closed_form: Any = None
    """`Attribution` of the same trajectories by the closed form; None when none was given."""


class ProvenancePipeline(DiffusionPipeline):
    """Samples by DDIM and traces every sample along its own sampling trajectory.

    Load it with `ProvenancePipeline.from_pretrained`; `DiffusionPipeline.from_pretrained` does not find a
    subclass that lives in another package.
    """

    model_cpu_offload_seq = "unet->provenance"

    def __init__(self, unet: UNet2DModel, provenance: ProvenanceNetwork, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, provenance=provenance, scheduler=scheduler)
        self._manifest: Manifest | None = None

    @property
    def manifest(self) -> Manifest:
        """The training set's manifest: what an example index stands for."""
        assert self._manifest is not None, "set by from_pretrained and by with_manifest"
        return self._manifest

    def with_manifest(self, manifest: Manifest) -> ProvenancePipeline:
        """Attach the manifest of the training set; returns self.

        Raises:
            InputError: It is not the manifest of the set this network was trained on.
        """
        if manifest.fingerprint != self.provenance.config.fingerprint:
            raise InputError(
                "this pipeline was trained on another data set (fingerprint "
                f"{self.provenance.config.fingerprint[:12]}, the data set has {manifest.fingerprint[:12]}); "
                "use the images and labels it was trained on, or train again"
            )
        self._manifest = manifest
        return self

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save networks, scheduler and manifest (safetensors, JSON and Parquet only)."""
        super().save_pretrained(save_directory, **kwargs)
        self.manifest.save(Path(save_directory) / MANIFEST_NAME)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> ProvenancePipeline:
        """Load what `save_pretrained` wrote.

        Raises:
            InputError: No pipeline there.
        """
        folder = Path(pretrained_model_name_or_path)
        if not (folder / "model_index.json").is_file():
            raise InputError(f"no pipeline in {folder}; train one with `provgen train` first")
        pipeline = super().from_pretrained(str(folder), **kwargs)
        assert isinstance(pipeline, ProvenancePipeline)
        return pipeline.with_manifest(Manifest.load(folder / MANIFEST_NAME))

    @property
    def null_label(self) -> int:
        """The class label that stands for no label."""
        return int(self.provenance.config.num_classes)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | None] | Tensor | None = None,
        *,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        top_k: int | None = 8,
        closed_form: ClosedFormPosterior | None = None,
        output_type: str = "pil",
    ) -> ProvenancePipelineOutput:
        """Generate images and trace each along its own trajectory.

        Args:
            class_labels: One class per image, None for no class. Without it `batch_size` unlabelled images.
            batch_size: Images, when no labels are given.
            generator: One per image, so that an image does not depend on its batch.
            num_inference_steps: DDIM steps, at least 10.
            guidance_scale: Classifier-free guidance; 1 is none. Traces always follow the labelled branch.
            top_k: Sources per image, at most the number of training images; None generates without traces.
            closed_form: Also trace by the closed form (needs the training images).
            output_type: `pil` or `pt`.

        Raises:
            InputError: An impossible label, `top_k` or step count.
        """
        if top_k is not None:
            check_top_k(top_k, self.provenance.config.num_examples)
        if output_type not in ("pil", "pt"):
            raise InputError(f"output_type must be pil or pt, got {output_type!r}")
        if not isfinite(guidance_scale):
            raise InputError(f"guidance_scale must be a finite number, got {guidance_scale}")
        count = batch_size if class_labels is None else len(class_labels)
        if count < 1:
            raise InputError(f"the number of images must be at least 1, got {count}")
        labels = self._labels(class_labels, count)
        images = self._initial_noise(len(labels), generator)
        self._set_timesteps(num_inference_steps)
        levels = self.scheduler.alphas_cumprod[self.scheduler.timesteps]
        first_step = int((levels < LEAST_SIGNAL).sum())
        trace, closed_trace = TrajectoryTrace(first_step), TrajectoryTrace(first_step)
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            is_traced = top_k is not None and step >= first_step
            signal = self.scheduler.alphas_cumprod[timestep].to(images.device)
            with record_stages(self.unet) as stages:
                noise = self.unet(images, timestep, class_labels=labels).sample
            if is_traced:
                logits = self.provenance.index_logits(stages, signal.expand(len(images)), labels)
                trace.add(logits.softmax(dim=1), float(signal))
            if is_traced and closed_form is not None:
                closed_trace.add(closed_form.probs(images, signal.expand(len(images)), labels), float(signal))
            if guidance_scale != 1:
                unlabelled = self.unet(
                    images, timestep, class_labels=torch.full_like(labels, self.null_label)
                ).sample
                noise = torch.lerp(unlabelled, noise, guidance_scale)
            images = self.scheduler.step(noise, timestep, images).prev_sample
        return ProvenancePipelineOutput(
            images=_finished(images, output_type),
            attribution=None if top_k is None else trace.attribution(top_k, is_trajectory=True),
            closed_form=None
            if top_k is None or closed_form is None
            else closed_trace.attribution(top_k, is_trajectory=True),
        )

    @torch.no_grad()
    def attribute(
        self,
        images: Sequence[Image.Image] | Tensor,
        *,
        top_k: int = 8,
        class_labels: Sequence[int | None] | Tensor | None = None,
        closed_form: ClosedFormPosterior | None = None,
        num_inference_steps: int = 50,
        seed: int = 0,
    ) -> Attribution:
        """Trace images from outside.

        Each is noised to the sampler's noise levels inside the trace window, with the same seeded noise for
        every image, so that a trace does not depend on what else is in the batch.

        Args:
            images: PIL images of any size and mode, or uint8 (query, channel, height, width) of the model's size.
            top_k: Sources per image, at most the number of training images.
            class_labels: One class per image, None where it is not known.
            closed_form: Trace by the closed form instead of the network.
            num_inference_steps: Sampler steps whose noise levels are used, at least 10.
            seed: Of the noise.

        Raises:
            InputError: No images, an impossible label or `top_k`, or images of another size.
        """
        check_top_k(top_k, self.provenance.config.num_examples)
        pixels = self._pixels(images)
        labels = self._labels(class_labels, len(pixels))
        self._set_timesteps(num_inference_steps)
        parts = zip(pixels.split(ATTRIBUTE_BATCH), labels.split(ATTRIBUTE_BATCH), strict=True)
        return Attribution.concatenate(
            [
                self._renoised(some, given, closed_form, seed).attribution(top_k, is_trajectory=False)
                for some, given in parts
            ]
        )

    def _renoised(
        self, pixels: Tensor, labels: Tensor, closed_form: ClosedFormPosterior | None, seed: int
    ) -> TrajectoryTrace:
        """Trace uint8 images noised to the sampler's levels inside the window."""
        clean = to_unit_range(pixels, self.unet.dtype).to(self._execution_device)
        posterior = NetworkPosterior(self.unet, self.provenance)
        trace = TrajectoryTrace()
        for timestep in self.scheduler.timesteps:
            level = self.scheduler.alphas_cumprod[timestep]
            if not WINDOW[0] < level < WINDOW[1]:
                continue
            generator = seeded_generator(seed, 4, int(timestep))
            noise = randn_tensor(clean.shape[1:], generator=generator, device=clean.device, dtype=clean.dtype)
            noisy = level.sqrt().to(clean) * clean + (1 - level).sqrt().to(clean) * noise
            signal = level.to(clean.device).expand(len(clean))
            if closed_form is not None:
                probs = closed_form.probs(noisy, signal, labels)
            else:
                steps = timestep.to(clean.device).expand(len(clean))
                probs = posterior.index_logits(noisy, steps, signal, labels).softmax(dim=1)
            trace.add(probs, float(level))
        return trace

    def _labels(self, class_labels: Sequence[int | None] | Tensor | None, count: int) -> Tensor:
        if class_labels is None:
            return torch.full((count,), self.null_label, device=self._execution_device)
        given = class_labels.tolist() if isinstance(class_labels, Tensor) else list(class_labels)
        if len(given) != count:
            raise InputError(
                f"give one class label per image, None for no class: {count} images, {len(given)} labels"
            )
        labels = [self.null_label if label is None else label for label in given]
        allowed = range(self.null_label + 1)
        if bad := [label for label in labels if not isinstance(label, int) or label not in allowed]:
            classes = (
                f"0 to {self.null_label - 1}, or None for no class"
                if self.null_label
                else "None, there are no classes"
            )
            raise InputError(f"class labels must be {classes}, got {bad[0]!r}")
        return torch.tensor(labels, device=self._execution_device)

    def _initial_noise(self, count: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        config = self.unet.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        if isinstance(generator, list) and len(generator) != count:
            raise InputError(f"give one generator per image: {count} images, {len(generator)} generators")
        noise: Tensor = randn_tensor(
            shape, generator=generator, device=self._execution_device, dtype=self.unet.dtype
        )
        return noise

    def _set_timesteps(self, num_inference_steps: int) -> None:
        most = self.scheduler.config.num_train_timesteps
        if not 10 <= num_inference_steps <= most:
            raise InputError(f"num_inference_steps must be 10 to {most}, got {num_inference_steps}")
        self.scheduler.set_timesteps(num_inference_steps)

    def _pixels(self, images: Sequence[Image.Image] | Tensor) -> Tensor:
        config = self.unet.config
        if len(images) == 0:
            raise InputError("no images to attribute; give at least one")
        if isinstance(images, Tensor):
            wanted = (config.in_channels, config.sample_size, config.sample_size)
            if images.dtype != torch.uint8 or tuple(images.shape[1:]) != wanted:
                raise InputError(
                    f"images must be uint8 of shape (query, {', '.join(map(str, wanted))}), "
                    f"got {images.dtype} of shape {tuple(images.shape)}"
                )
            return images
        return torch.stack(
            [from_pil(image, image_size=config.sample_size, channels=config.in_channels) for image in images]
        )


def _finished(images: Tensor, output_type: str) -> list[Image.Image] | Tensor:
    pixels = to_uint8(images.cpu())
    if output_type == "pt":
        return pixels
    return [to_pil(image) for image in pixels]
