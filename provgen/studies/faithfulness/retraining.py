"""Generators trained on parts of the training images, the truth that traces are held to, and what is kept of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from provgen import build, evaluation
from provgen.build import MAY_CHANGE, RunData, TrainedRun
from provgen.data.dataset import ImageSet
from provgen.data.manifest import Manifest
from provgen.data.splits import stratified_subset
from provgen.errors import InputError
from provgen.pipeline import ProvenancePipeline
from provgen.run import atomic_path, claim_folder
from provgen.settings import Settings, flat_settings

KINDS = ("generated", "holdout")
"""Of queries."""


@dataclass(frozen=True, kw_only=True)
class QueryImages:
    """Images that subset models are asked about."""

    images: Tensor
    """uint8 (query, channel, height, width)."""
    labels: Tensor
    """int64 (query,), the null label where there is no class."""


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """Everything that is measured of the subset models of a run."""

    subsets: Tensor
    """Numbers of the subsets, int64 (subset,)."""
    masks: Tensor
    """bool (subset, train)."""
    level_losses: dict[str, Tensor]
    """By kind of query, float32 (seed, query, subset, level), from clean to noisy."""
    queries: dict[str, QueryImages]
    """By kind."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """Mean over the noise levels by kind of query, float64 (seed, query, subset)."""
        return {kind: some.double().mean(dim=3) for kind, some in self.level_losses.items()}


class RetrainedFolder:
    """fingerprint.json, masks.npz, queries.npz, and a small file for every model, each whole or not there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def start(self, masks: Tensor, queries: Mapping[str, QueryImages], fingerprint: Mapping[str, Any]) -> None:
        """Start the folder, or go on with it.

        Args:
            masks: bool (subset, train); a folder may be started again with more or fewer subsets.
            queries: By kind; those that are there already stay.
            fingerprint: What the models are of.

        Raises:
            InputError: There are models of something else in it.
        """
        claim_folder(self.root, fingerprint)
        if not (self.root / "queries.npz").is_file():
            arrays = {f"{k}_{name}": v.numpy() for k in KINDS for name, v in vars(queries[k]).items()}
            self._write(self.root / "queries.npz", **arrays)
        if not (self.root / "masks.npz").is_file() or len(self.masks()) < len(masks):
            packed = np.packbits(masks.numpy(), axis=1)
            self._write(self.root / "masks.npz", masks=packed, train=np.array(masks.shape[1]))

    def queries(self) -> dict[str, QueryImages] | None:
        """Read the queries; None before the start."""
        if not (self.root / "queries.npz").is_file():
            return None
        with np.load(self.root / "queries.npz") as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        return {k: QueryImages(images=arrays[f"{k}_images"], labels=arrays[f"{k}_labels"]) for k in KINDS}

    def has(self, subset: int, seed: int) -> bool:
        """Whether a model has been measured."""
        return self._path(subset, seed).is_file()

    def save(self, subset: int, seed: int, losses: Mapping[str, Tensor]) -> None:
        """Write what one model makes of the queries, (query, level) by kind."""
        self._write(self._path(subset, seed), **{kind: losses[kind].float().numpy() for kind in KINDS})

    def measured(self) -> list[tuple[int, int]]:
        """List the `(subset, seed)` of the models that are there."""
        names = sorted(path.stem.split("-") for path in (self.root / "losses").glob("subset-*-seed-*.npz"))
        return [(int(subset), int(seed)) for _, subset, _, seed in names]

    def load(self) -> Retrained:
        """Read as many models as have the same seeds for every subset.

        Raises:
            InputError: There are fewer than two subsets.
        """
        subsets, seeds = _rectangle(self.measured())
        if len(subsets) < 2:
            raise InputError(
                f"{len(subsets)} subset models in {self.root}, at least 2 are needed; run `provgen retrain` first"
            )
        return self._read(subsets, seeds)

    def load_several_seeds(self) -> Retrained | None:
        """Read as many models as have two or more seeds, the same for every subset; None for fewer than two subsets."""
        subsets, seeds = _rectangle(self.measured(), least_seeds=2)
        return self._read(subsets, seeds) if len(subsets) >= 2 else None

    def masks(self) -> Tensor:
        """Read which examples every subset has, bool (subset, train), whether its models have been trained or not."""
        with np.load(self.root / "masks.npz") as file:
            bits = np.unpackbits(file["masks"], axis=1, count=int(file["train"]))
        return torch.from_numpy(bits).bool()

    def _read(self, subsets: Sequence[int], seeds: Sequence[int]) -> Retrained:
        queries = self.queries()
        assert queries is not None  # they are written before the first model
        numbers = torch.tensor(subsets)
        return Retrained(
            subsets=numbers,
            masks=self.masks()[numbers],
            level_losses={kind: self._losses(kind, seeds, subsets) for kind in KINDS},
            queries=queries,
        )

    def _losses(self, kind: str, seeds: Sequence[int], subsets: Sequence[int]) -> Tensor:
        """Read losses of one kind of query, (seed, query, subset, level)."""
        rows = [torch.stack([self._loss(kind, n, seed) for n in subsets], dim=1) for seed in seeds]
        return torch.stack(rows)

    def _loss(self, kind: str, subset: int, seed: int) -> Tensor:
        with np.load(self._path(subset, seed)) as file:
            return torch.from_numpy(file[kind])

    def _path(self, subset: int, seed: int) -> Path:
        return self.root / "losses" / f"subset-{subset:04d}-seed-{seed}.npz"

    @staticmethod
    def _write(path: Path, **arrays: Any) -> None:
        with atomic_path(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)


def _rectangle(models: Sequence[tuple[int, int]], *, least_seeds: int = 1) -> tuple[list[int], list[int]]:
    """Choose subsets and the first so many seeds that all of them have: as many models as possible."""
    there, best = set(models), ([], [])  # type: ignore[var-annotated]
    seeds = sorted({seed for _, seed in models})
    for count in range(least_seeds, len(seeds) + 1):
        first = seeds[:count]
        whole = [n for n in sorted({n for n, _ in models}) if all((n, seed) in there for seed in first)]
        if len(whole) * count >= len(best[0]) * len(best[1]):
            best = (whole, first)
    return best


LEVELS = 20
"""Equal parts of the schedule in which a subset model's loss on a query is kept."""

DRAWS_PER_LEVEL = 5
"""Timesteps and noises in each part. On digits the mean over 20 draws has a rank correlation of 0.80 (generated
queries) and 0.84 (held-out ones) over subsets with the mean over 100 draws, that over 50 one of 0.93 and 0.95."""


def subset_settings(settings: Settings, *, seed: int, share_of_steps: float = 1.0) -> Settings:
    """Give the settings of a model that is trained on a part of the images.

    Where the provenance network has no gradient into the generator (`provenance.gradient=stop`), the generator is
    bit for bit the one trained alone, so it is trained alone.

    Args:
        settings: Of the run that is explained.
        seed: Of the model's training.
        share_of_steps: Its steps, as a share of the run's.
    """
    steps = max(1, round(share_of_steps * settings.training.max_steps))
    training = replace(settings.training, seed=seed, max_steps=steps)
    chosen = settings.provenance
    if chosen.gradient == "stop":
        chosen = replace(chosen, index_head="none")
    return replace(settings, training=training, provenance=chosen)


def subset_data(data: RunData, mask: Tensor) -> RunData:
    """Keep the training images of `mask`, bool (train,); they are counted anew."""
    train = data.train.select(mask.nonzero().flatten())
    return RunData(train=train, holdout=data.holdout, manifest=Manifest.of(train, data.holdout))


def train_generator(settings: Settings, data: RunData, accelerator: Accelerator) -> Any:
    """Train on this process alone, whatever others do; give the generator with its averaged weights."""
    stream = build.make_stream(settings, data.train)
    trainer = build.make_trainer(settings, data, accelerator, is_shared=False)
    for step in range(settings.training.max_steps):
        trainer.step(stream.batch(step).to(accelerator.device), step)
    accelerator.free_memory()  # it would hold on to every model it has prepared
    return evaluation.averaged_networks(trainer)[trainer.observer.name]


def make_queries(trained: TrainedRun, count: int) -> dict[str, QueryImages]:
    """Make `count` queries of either kind, `generated` (seeds 0, 1, ..., classes in turn) and `holdout`.

    Raises:
        InputError: The run is no diffusion model, or holds too few images out.
    """
    if trained.pipeline.unet is None:
        raise InputError(
            "traces are tested on diffusion models, and this run is none; train one with generator.kind=diffusion"
        )
    holdout, train = trained.data.holdout, trained.data.train
    if len(holdout) < count:
        raise InputError(
            f"the run holds {len(holdout)} images out, fewer than {count} queries; ask for fewer --num-queries"
        )
    samples = evaluation.sample(trained.pipeline, trained.settings, trained.data, count=count).images
    classes = torch.arange(count) % train.num_classes if train.num_classes else torch.zeros(count).long()
    rows = stratified_subset(holdout.labels, count, seed=0)
    return {
        "generated": QueryImages(images=samples, labels=classes),
        "holdout": QueryImages(images=holdout.images[rows], labels=holdout.labels[rows]),
    }


def query_losses(
    network: Any, settings: Settings, train: ImageSet, queries: Mapping[str, QueryImages]
) -> dict[str, Tensor]:
    """Measure a generator's loss on every query at every level, with noise that is the same for every generator.

    Returns:
        (query, level) by kind, from clean to noisy.
    """
    draws = LEVELS * DRAWS_PER_LEVEL
    losses = {
        kind: evaluation.losses_by_draw(network, settings, as_image_set(some, train), draws=draws)
        for kind, some in queries.items()
    }
    return {kind: some.unflatten(1, (LEVELS, DRAWS_PER_LEVEL)).mean(dim=2) for kind, some in losses.items()}


def as_image_set(queries: QueryImages, train: ImageSet) -> ImageSet:
    """Give queries the classes of the training images."""
    count = len(queries.images)
    return ImageSet(
        images=queries.images,
        labels=queries.labels,
        class_names=train.class_names,
        paths=tuple(f"query/{number:05d}" for number in range(count)),
        sha256=("",) * count,
        contributors=(None,) * count,
        licenses=(None,) * count,
    )


def fingerprint(settings: Settings, **more: Any) -> dict[str, Any]:
    """Say what models depend on, so that those of other settings are never mixed with them."""
    free = MAY_CHANGE - {"training.max_steps"}
    return {**{key: value for key, value in flat_settings(settings).items() if key not in free}, **more}


def regenerate(network: Any, trained: TrainedRun, *, label: int, seed: int) -> Tensor:
    """Sample with another denoiser from the noise of a sample of `trained`: uint8 (channel, height, width)."""
    pipeline = ProvenancePipeline(None, unet=network, scheduler=trained.pipeline.scheduler)
    pipeline = pipeline.with_manifest(trained.data.manifest)
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed)]
    images: Tensor = pipeline([label], generator=generator, top_k=None, output_type="pt").images
    return images[0]
