"""`ProvenancePipeline`: images with one seed each, and the training examples each one comes from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor, nn

from provgen.data.dataset import ImageSet
from provgen.data.images import from_pil, naming_image, read_image, to_pil, to_uint8, to_unit_range
from provgen.data.manifest import Manifest
from provgen.errors import InputError
from provgen.generators.classifier import ClassifierGenerator
from provgen.generators.closed_form import Posterior
from provgen.generators.diffusion import DiffusionGenerator
from provgen.generators.protocol import Generator
from provgen.generators.vae import VaeGenerator
from provgen.models.classifier import ImageClassifier
from provgen.models.credit import CreditHead
from provgen.models.provenance import ProvenanceNetwork
from provgen.models.temperatures import ALL_LEVELS, Temperatures
from provgen.models.vae import ImageVae
from provgen.run import check_seal, read_json, seal
from provgen.tracing.attribution import Attribution, Mixtures, SupportLimits, check_top_k
from provgen.tracing.trace import (
    CreditFeatures,
    Draw,
    Levels,
    Look,
    MeanPosterior,
    ask_closed_form,
    ask_network,
    resample,
    trace,
)

MANIFEST_NAME = "manifest.parquet"

COMPONENTS = {
    "provenance": ProvenanceNetwork,
    "unet": UNet2DModel,
    "vae": ImageVae,
    "classifier": ImageClassifier,
    "scheduler": DDIMScheduler,
    "credit": CreditHead,
    "temperatures": Temperatures,
}
"""The only class that each part of a pipeline may have."""

CLARITY = 3.0
"""Signal-to-noise ratio at which gradients are taken, over that at which an image is decided."""

ATTRIBUTE_BATCH = 64
"""Outside images traced at a time; bounds the (query, train) matrices."""

Picture = Image.Image | np.ndarray | Tensor | str | PathLike[str]
"""An image from outside: a PIL image, an array (height, width[, channel]), a tensor of the model's size, or a path."""
Labels = Sequence[int | None] | np.ndarray | Tensor | int | None
"""One class per image, None for no class; a single one for a single image."""


@dataclass
class ProvenancePipelineOutput(BaseOutput):
    """Generated images and their sources."""

    images: Any
    """PIL images; with `output_type="pt"` a uint8 tensor (query, channel, height, width)."""
    attribution: Any
    """`Attribution` by the provenance network; None with `top_k=None`."""
    closed_form: Any = None
    """`Attribution` of the same trajectories by the closed form; None when none was given."""
    resamplings: Any = None
    """How often every image was resampled, int64 (query,)."""


class ProvenancePipeline(DiffusionPipeline):
    """Generates images and traces every one to the training images it comes from.

    Holds one of a denoiser (`unet`, with its `scheduler`), an autoencoder (`vae`) or a classifier, which traces
    images from outside only. Without `provenance` it generates and traces nothing. `temperatures` are those of its
    posteriors; without them they are 1. With `credit` weights are shares of credit and no longer posteriors. Load it
    with `ProvenancePipeline.from_pretrained`; `DiffusionPipeline.from_pretrained` does not find a subclass that lives
    in another package.
    """

    model_cpu_offload_seq = "unet->vae->classifier->provenance->credit->temperatures"
    _optional_components = list(COMPONENTS)  # noqa: RUF012 - diffusers' own name

    def __init__(
        self,
        provenance: ProvenanceNetwork | None = None,
        unet: UNet2DModel | None = None,
        vae: ImageVae | None = None,
        classifier: ImageClassifier | None = None,
        scheduler: DDIMScheduler | None = None,
        credit: CreditHead | None = None,
        temperatures: Temperatures | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            provenance=provenance,
            unet=unet,
            vae=vae,
            classifier=classifier,
            scheduler=scheduler,
            credit=credit,
            temperatures=temperatures,
        )
        self._manifest: Manifest | None = None
        self.mixtures: Mixtures | None = None

    @property
    def network(self) -> UNet2DModel | ImageVae | ImageClassifier:
        """The generator's network, of whichever kind."""
        return self.unet or self.vae or self.classifier

    @property
    def generator(self) -> Generator:
        """The generator, of whichever kind; its training losses are not set here."""
        if self.unet is not None:
            return self.denoiser
        if self.vae is not None:
            return VaeGenerator(network=self.vae)
        shape = (self.manifest.channels, self.manifest.image_size, self.manifest.image_size)
        return ClassifierGenerator(network=self.classifier, image_shape=shape)

    @property
    def denoiser(self) -> DiffusionGenerator:
        """The diffusion generator; only of a pipeline that holds one."""
        return DiffusionGenerator(network=self.unet, scheduler=self.scheduler)

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
        if self.provenance is not None and manifest.fingerprint != self.provenance.config.fingerprint:
            raise InputError(
                "this pipeline was trained on another data set (fingerprint "
                f"{self.provenance.config.fingerprint[:12]}, the data set has {manifest.fingerprint[:12]}); "
                "use the images and labels it was trained on, or train again"
            )
        self._manifest = manifest
        return self

    def with_training_images(self, train: ImageSet) -> ProvenancePipeline:
        """Attach the training images, so that attributions say how much of an image they explain; returns self."""
        config = None if self.temperatures is None else self.temperatures.config
        limits = None if config is None else SupportLimits(least=config.least_explained, copy=config.copy)
        self.mixtures = Mixtures(train, self.device, limits)
        return self

    @property
    def window(self) -> tuple[float, float]:
        """Noise levels whose posteriors are averaged, ends excluded."""
        return ALL_LEVELS if self.temperatures is None else self.temperatures.window

    @property
    def clear_from(self) -> float:
        """Noise level from which on little noise is left in an image that is decided."""
        high = self.window[1]
        return CLARITY * high / (CLARITY * high + 1 - high)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Save networks, scheduler, manifest and checksums (safetensors, JSON and Parquet only)."""
        super().save_pretrained(save_directory, **kwargs)
        folder = Path(save_directory)
        for path in folder.rglob("*.json"):
            _forget_origin(path)
        self.manifest.save(folder / MANIFEST_NAME)
        seal(folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> ProvenancePipeline:
        """Load what `save_pretrained` wrote.

        Raises:
            InputError: No pipeline there, or one that is damaged, foreign, or of another version of provgen.
        """
        folder = Path(pretrained_model_name_or_path).expanduser()
        if not (folder / "model_index.json").is_file():
            raise InputError(f"no pipeline in {folder}; train one with `provgen train` first")
        remedy = _remedy(folder)
        check_seal(folder, remedy)
        _check_components(folder, remedy)
        try:
            pipeline = super().from_pretrained(str(folder), **{**kwargs, "use_safetensors": True})
        except MemoryError:
            raise
        except Exception as error:  # whatever a damaged file makes diffusers raise
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{folder} cannot be loaded ({type(error).__name__}: {reason}); {remedy}") from error
        assert isinstance(pipeline, ProvenancePipeline)
        pipeline._check_finite(folder)
        return pipeline.with_manifest(Manifest.load(folder / MANIFEST_NAME))

    def _check_finite(self, folder: Path) -> None:
        for name, part in self.components.items():
            tensors = part.state_dict().items() if isinstance(part, nn.Module) else ()
            # What a file lacks stays on torch's meta device, which holds no numbers.
            if wrong := [key for key, value in tensors if value.is_meta or not value.isfinite().all()]:
                raise InputError(f"{folder / name} lacks {wrong[0]}, or it is not finite; {_remedy(folder)}")

    @property
    def null_label(self) -> int:
        """The class label that stands for no label."""
        return len(self.manifest.class_names)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = None,
        *,
        batch_size: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        top_k: int | None = 8,
        trace_every: int = 1,
        resample_below: float | None = None,
        max_resamplings: int = 4,
        closed_form: Posterior | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ProvenancePipelineOutput:
        """Generate images and trace each along its own trajectory.

        Args:
            class_labels: One class per image, None for no class: a list, array or tensor, or one label alone for one
                image. Without it `batch_size` images of no class.
            batch_size: Images, when no labels are given.
            generator: One per image, so that an image does not depend on its batch.
            num_inference_steps: DDIM steps, at least 10.
            guidance_scale: Classifier-free guidance; 1 is none. Traces always follow the conditional branch.
            top_k: Sources per image, at most the number of training images; None generates without traces.
            trace_every: Sampling steps from one that is traced to the next; the commitment step is known to as many.
            resample_below: Entropy of a sample's sources in nats, shortly before it is finished, below which it is
                drawn again; such samples are often copies. A bound is read off held-out images. None keeps all.
            max_resamplings: Times that a sample may be drawn again.
            closed_form: Also trace by the closed form (needs the training images).
            output_type: `pil` or `pt`.
            return_dict: False gives the tuple (images, attribution, closed form, resamplings) instead.

        Raises:
            InputError: An impossible label, `top_k` or step count, or sampling gave pixels that are not finite.
        """
        if top_k is not None:
            self._check_traceable(top_k)
        _check_whole(batch_size=batch_size, num_inference_steps=num_inference_steps, max_resamplings=max_resamplings)
        _check_options(guidance_scale, output_type, trace_every)
        _check_resampling(resample_below, max_resamplings, is_traced=top_k is not None)
        given, generators = _listed_labels(class_labels), _listed_generators(generator)
        count = _read_count(given, batch_size, generators)
        sampling = _Sampling(
            pipeline=self,
            class_labels=_read_labels(given, count, self.null_label).to(self._execution_device),
            generator=generators,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        if top_k is None:
            images, resamplings = sampling.images(torch.arange(count)), torch.zeros(count).long()
            attributions: tuple[Attribution | None, Attribution | None] = (None, None)
        else:
            draw = partial(sampling.traced, trace_every=trace_every, closed_form=closed_form)
            most = 0 if resample_below is None else max_resamplings
            drawn, resamplings = resample(draw, count, below=resample_below or 0.0, most=most)
            images, attributions = drawn.images, self._attributions(drawn, sampling.class_labels, top_k)
        output = (_finished(images, output_type), *attributions, resamplings)
        # Typed as what it nearly always is, so that callers need not tell the two apart.
        return ProvenancePipelineOutput(*output) if return_dict else output  # type: ignore[return-value]

    @torch.no_grad()
    def attribute(
        self,
        images: Picture | Sequence[Picture],
        *,
        top_k: int = 8,
        class_labels: Labels = None,
        closed_form: Posterior | None = None,
        num_inference_steps: int = 50,
        trace_every: int = 1,
        seed: int = 0,
    ) -> Attribution:
        """Trace images from outside.

        Each is noised to the sampler's noise levels inside the trace window, with the same seeded noise for
        every image, so that a trace does not depend on what else is in the batch.

        Args:
            images: One image or a list: PIL images, uint8 arrays (height, width[, channel]) and files may have any
                size and mode; a batch of arrays has the query first. Tensors are uint8 and of the model's size,
                (query, channel, height, width), or (channel, height, width) in a list.
            top_k: Sources per image, at most the number of training images.
            class_labels: One class per image, None where it is not known; for one image its label alone.
            closed_form: Trace by the closed form instead of the network.
            num_inference_steps: Sampler steps whose noise levels are used, at least 10.
            trace_every: Levels from one that is used to the next.
            seed: Seed of the noise, at least 0.

        Raises:
            InputError: No images, an impossible label, `top_k` or seed, images of another size, or a file that is none.
        """
        self._check_traceable(top_k)
        _check_whole(num_inference_steps=num_inference_steps, seed=seed)
        _check_least(trace_every=trace_every, least=1)
        _check_least(seed=seed, least=0)
        pixels = _read_pixels(images, channels=self.manifest.channels, size=self.manifest.image_size)
        clean = to_unit_range(pixels, self.network.dtype).to(self._execution_device)
        labels = _read_labels(_listed_labels(class_labels), len(pixels), self.null_label).to(clean.device)

        generator = self.generator
        levels = Levels.of(generator, num_inference_steps, trace_every, self.window)
        ask = (
            ask_network(self.provenance, self.temperatures)
            if closed_form is None
            else ask_closed_form(closed_form, self.temperatures)
        )
        has_credit = self.credit is not None and closed_form is None

        def attributed(batch: Tensor, given: Tensor) -> Attribution:
            posterior = MeanPosterior(ask, levels, only_window=True)
            features = self._credit_features() if has_credit else None
            looks = [posterior] if features is None else [posterior, features]
            trace(generator.renoise(batch, given, num_inference_steps=num_inference_steps, seed=seed), *looks)
            return posterior.attribution(
                top_k,
                is_trajectory=False,
                reachable=self.manifest.reachable,
                credit=None if features is None else self._credit(features, given),
                explained=None if self.mixtures is None else self.mixtures.explain(batch),
            )

        batches = zip(clean.split(ATTRIBUTE_BATCH), labels.split(ATTRIBUTE_BATCH), strict=True)
        return Attribution.concatenate([attributed(*batch) for batch in batches])

    def _attributions(self, drawn: Draw, class_labels: Tensor, top_k: int) -> tuple[Attribution, Attribution | None]:
        """Summarise the traces of samples: by the network, and by the closed form where there is one."""
        summarise = partial(
            MeanPosterior.attribution,
            top_k=top_k,
            is_trajectory=self.generator.has_noise_levels,
            reachable=self.manifest.reachable,
        )
        credit = None if drawn.features is None else self._credit(drawn.features, class_labels)
        explained = None if self.mixtures is None else self.mixtures.explain(drawn.images.clamp(-1, 1))
        exact = None if drawn.closed_form is None else summarise(drawn.closed_form, explained=explained)
        return summarise(drawn.posterior, credit=credit, explained=explained), exact

    def _credit_features(self) -> CreditFeatures:
        """Start what the credit head compares images by."""
        denoiser = self.unet if self.credit.wants_gradients else None
        return CreditFeatures(self.provenance, denoiser=denoiser, clear_from=self.clear_from)

    def _credit(self, features: CreditFeatures, class_labels: Tensor) -> Tensor:
        """Give shares of credit (query, train)."""
        shares: Tensor = self.credit(features.features().to(self.credit.dtype), class_labels)
        return shares

    def _check_traceable(self, top_k: int) -> None:
        if self.provenance is None:
            raise InputError(
                "this pipeline has no provenance network to trace with; give top_k=None, or train with one"
            )
        _check_whole(top_k=top_k)
        check_top_k(top_k, self.provenance.config.num_covered)


def _forget_origin(path: Path) -> None:
    """Take the local path that a part was loaded from out of its configuration."""
    content = read_json(path, "save the pipeline again")
    if content.pop("_name_or_path", None) is not None:
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _remedy(folder: Path) -> str:
    """Say what to do about a pipeline that cannot be used."""
    config = folder.parent / "config.yaml"
    if folder.name == "pipeline" and config.is_file():
        return f"restore it, or write it again with `provgen train --config {config}`"
    return "restore it, or save it again"


def _check_components(folder: Path, remedy: str) -> None:
    """Refuse a pipeline with any class but provgen's own, before anything of it is loaded."""
    index = read_json(folder / "model_index.json", remedy)
    for name, entry in index.items():
        if name.startswith("_") or entry == [None, None]:
            continue
        known = COMPONENTS.get(name)
        if known is None or not isinstance(entry, list) or entry[-1:] != [known.__name__]:
            raise InputError(f"{folder / 'model_index.json'} asks for {name}={entry}, which is not provgen's; {remedy}")
        if entry[0] not in ("diffusers", known.__module__):
            raise InputError(f"{folder / 'model_index.json'} takes {name} from {entry[0]}; {remedy}")


@dataclass(frozen=True, kw_only=True)
class _Sampling:
    """What is sampled in one call of a pipeline, and how."""

    pipeline: ProvenancePipeline
    class_labels: Tensor
    """int64 (query,)."""
    generator: torch.Generator | list[torch.Generator] | None
    num_inference_steps: int
    guidance_scale: float

    def images(self, rows: Tensor, *looks: Look) -> Tensor:
        """Sample the queries of some rows with a progress bar, and show every step to looks."""
        own, generator = self.generator, self.pipeline.generator
        steps = generator.sample(
            self.class_labels[rows.to(self.class_labels.device)],
            null_label=self.pipeline.null_label,
            generator=[own[row] for row in rows.tolist()] if isinstance(own, list) else own,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )
        with self.pipeline.progress_bar(total=len(generator.alpha_bars(self.num_inference_steps))) as bar:
            images = trace(steps, *looks, lambda _: bar.update()).images
        assert images is not None, "sampling ends in images"
        if not images.isfinite().all():
            raise InputError(f"sampling gave pixels that are not finite; {self._remedy()}")
        return images

    def _remedy(self) -> str:
        """Say what to do when samples are no numbers."""
        if self.guidance_scale == 1:
            return "the weights of this pipeline are damaged, so restore it or train again in a new output_dir"
        return f"guidance_scale={self.guidance_scale:g} is too large; give a number between 1 and 10"

    def traced(self, rows: Tensor, *, trace_every: int, closed_form: Posterior | None) -> Draw:
        """Sample the queries of some rows, and trace them."""
        pipeline = self.pipeline
        levels = Levels.of(pipeline.generator, self.num_inference_steps, trace_every, pipeline.window)
        temperatures = pipeline.temperatures
        posterior = MeanPosterior(ask_network(pipeline.provenance, temperatures), levels)
        exact = None if closed_form is None else MeanPosterior(ask_closed_form(closed_form, temperatures), levels)
        features = None if pipeline.credit is None else pipeline._credit_features()
        looks = [look for look in (posterior, exact, features) if look is not None]
        return Draw(self.images(rows, *looks), posterior, exact, features)


def _check_options(guidance_scale: float, output_type: str, trace_every: int) -> None:
    """Refuse what no sampler and no caller can use."""
    if output_type not in ("pil", "pt"):
        raise InputError(f"output_type must be pil or pt, got {output_type!r}")
    if not _is_finite(guidance_scale):
        raise InputError(f"guidance_scale must be a finite number, got {guidance_scale!r}")
    _check_least(trace_every=trace_every, least=1)


def _is_finite(value: object) -> bool:
    """Whether a value is a number, and not NaN or infinite."""
    return isinstance(value, Real) and isfinite(value)


def _check_whole(**values: object) -> None:
    """Refuse what is no whole number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise InputError(f"{name} must be a whole number, got {value!r}")


def _check_least(*, least: int, **values: int) -> None:
    """Refuse what is no whole number, or a smaller one than `least`."""
    _check_whole(**values)
    for name, value in values.items():
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")


def _check_resampling(resample_below: float | None, max_resamplings: int, *, is_traced: bool) -> None:
    """Refuse resampling that could never end, or that have no trace to go by."""
    if resample_below is None:
        return
    if not is_traced:
        raise InputError("resample_below looks at traces; give top_k as well, or leave it out")
    if not _is_finite(resample_below) or resample_below <= 0 or max_resamplings < 1:
        raise InputError(
            "resample_below must be a positive finite number and max_resamplings at least 1, got "
            f"{resample_below!r} and {max_resamplings}"
        )


def _listed_labels(class_labels: Labels) -> list[Any] | None:
    """List class labels as Python's own numbers; one alone makes a list of one, and none at all stay None."""
    if class_labels is None:
        return None
    values = class_labels.tolist() if isinstance(class_labels, Tensor | np.ndarray | np.generic) else class_labels
    listed = list(values) if isinstance(values, Sequence) and not isinstance(values, str) else [values]
    return [value.tolist() if isinstance(value, Tensor | np.generic) else value for value in listed]


def _listed_generators(
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> torch.Generator | list[torch.Generator] | None:
    """Give one random generator for all images, or the list of one per image."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    listed = list(generator) if isinstance(generator, Sequence) else [generator]
    if wrong := [one for one in listed if not isinstance(one, torch.Generator)]:
        raise InputError(
            f"generator must be a torch.Generator, or a list of one per image, got {wrong[0]!r}; "
            "make one of a seed by torch.Generator().manual_seed(seed)"
        )
    return listed


def _read_count(
    class_labels: list[Any] | None, batch_size: int, generator: torch.Generator | list[torch.Generator] | None
) -> int:
    """Give the number of images asked for: one per label, `batch_size` without labels."""
    count = batch_size if class_labels is None else len(class_labels)
    if count < 1:
        raise InputError(f"the number of images must be at least 1, got {count}")
    if batch_size not in (1, count):
        raise InputError(f"give one class label per image: batch_size={batch_size}, but {count} labels")
    if isinstance(generator, list) and len(generator) != count:
        raise InputError(f"give one generator per image: {count} images, {len(generator)} generators")
    return count


def _read_labels(given: list[Any] | None, count: int, null_label: int) -> Tensor:
    """Turn one class label per image, None for no class, into int64 (query,); without any, all are null."""
    if given is None:
        return torch.full((count,), null_label)
    if len(given) != count:
        raise InputError(f"give one class label per image, None for no class: {count} images, {len(given)} labels")
    labels = [null_label if label is None else label for label in given]
    allowed = range(null_label + 1)
    # True is 1 to Python, but it is no class that anyone means.
    if bad := [label for label in labels if type(label) is not int or label not in allowed]:
        classes = f"0 to {null_label - 1}, or None for no class" if null_label else "None, there are no classes"
        raise InputError(f"class labels must be {classes}, got {bad[0]!r}")
    return torch.tensor(labels)


def _read_pixels(images: Picture | Sequence[Picture], *, channels: int, size: int) -> Tensor:
    """Turn images into uint8 (query, channel, height, width); all but tensors are resized and converted."""
    if isinstance(images, Tensor):
        _check_tensor(images, "query", channels, size, size)
    pictures = _listed_pictures(images)
    if not pictures:
        raise InputError("no images to attribute; give at least one")
    return torch.stack([
        _read_picture(picture, f"images[{place}]", channels=channels, size=size)
        for place, picture in enumerate(pictures)
    ])  # fmt: skip


def _listed_pictures(images: Picture | Sequence[Picture]) -> list[Any]:
    """List images; an array is a batch where it has one dimension more than an image."""
    if isinstance(images, np.ndarray):
        return list(images) if images.ndim == 3 + _has_channels(images) else [images]
    if isinstance(images, Tensor) or (isinstance(images, Sequence) and not isinstance(images, str)):
        return list(images)
    return [images]


def _has_channels(pixels: np.ndarray) -> bool:
    """Whether the last axis of an array counts grey, RGB or RGBA; no image is so narrow."""
    return pixels.ndim > 2 and pixels.shape[-1] in (1, 3, 4)


def _read_picture(picture: object, name: str, *, channels: int, size: int) -> Tensor:
    """Turn one image of whatever form into uint8 (channel, size, size)."""
    if isinstance(picture, Tensor):
        _check_tensor(picture, channels, size, size)
        return picture.cpu()
    if isinstance(picture, str | PathLike):
        return read_image(Path(picture), image_size=size, channels=channels)
    if isinstance(picture, np.ndarray):
        picture = _from_array(picture, name)
    if not isinstance(picture, Image.Image):
        raise InputError(f"{name} must be a PIL image, an array, a tensor or a path, got {type(picture).__name__}")
    with naming_image(Path(name)):
        return from_pil(picture, image_size=size, channels=channels)


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    """Turn uint8 pixels (height, width[, channel]) into a PIL image."""
    if pixels.dtype != np.uint8 or pixels.ndim != 2 + _has_channels(pixels):
        raise InputError(
            f"{name} must be uint8 of shape (height, width) or (height, width, channel) with 1, 3 or 4 channels, "
            f"got {pixels.dtype} of shape {pixels.shape}"
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def _check_tensor(images: Tensor, *wanted: int | str) -> None:
    """Refuse a tensor that is not uint8 or not of the wanted shape, in which "query" is any number."""
    fits = images.ndim == len(wanted) and all(w in ("query", h) for w, h in zip(wanted, images.shape, strict=True))
    if images.dtype != torch.uint8 or not fits:
        raise InputError(
            f"images must be uint8 of shape ({', '.join(map(str, wanted))}), "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )


def _finished(images: Tensor, output_type: str) -> list[Image.Image] | Tensor:
    pixels = to_uint8(images.cpu())
    if output_type == "pt":
        return pixels
    return [to_pil(image) for image in pixels]
