"""Generators trained on parts of the training images, the truth that traces are held to, and what is kept of them."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from provgen import build, evaluation
from provgen.build import MAY_CHANGE, RunData, TrainedRun
from provgen.data.dataset import ImageSet
from provgen.data.manifest import Manifest
from provgen.data.splits import stratified_subset
from provgen.errors import InputError
from provgen.generators.losses import generator_losses
from provgen.pipeline import ProvenancePipeline
from provgen.run import atomic_path, claim_folder
from provgen.settings import Settings, flat_settings
from provgen.studies.jobs import ResultStore, require_no_npz

KINDS = ("generated", "holdout")
"""Where queries come from."""

LEVELS = 20
"""Equal parts of the schedule, each with the same number of draws of a subset model's loss on a query."""

DRAWS_PER_LEVEL = 5
"""Timesteps and noises in each part; with fewer, the noise of the loss changes the order of subset models."""


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
    losses: dict[str, Tensor]
    """Mean over the noise levels by kind of query, float64 (seed, query, subset)."""
    queries: dict[str, QueryImages]
    """Images that losses are of, by kind."""


class RetrainedFolder:
    """fingerprint.json, masks.npz, queries.npz, and losses/, a store of the losses of every model."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._store = ResultStore(root / "losses", ("subset", "seed"))

    def start(self, masks: Tensor, queries: Mapping[str, QueryImages], fingerprint: Mapping[str, Any]) -> None:
        """Start the folder, or go on with it: with more or fewer subsets, and the queries that are there already.

        Masks are bool (subset, train), and `fingerprint` is all that models depend on.

        Raises:
            InputError: There are models of something else in it.
        """
        claim_folder(self.root, fingerprint)
        require_no_npz(self.root / "losses")
        if not (self.root / "queries.npz").is_file():
            arrays = {f"{k}_{name}": v.numpy() for k in KINDS for name, v in vars(queries[k]).items()}
            self._write("queries.npz", **arrays)
        if not (self.root / "masks.npz").is_file() or len(self.masks()) < len(masks):
            packed = np.packbits(masks.numpy(), axis=1)
            self._write("masks.npz", masks=packed, train=np.array(masks.shape[1]))

    def queries(self) -> dict[str, QueryImages] | None:
        """Read the queries; None before the start."""
        if not (self.root / "queries.npz").is_file():
            return None
        names = [f"{kind}_{part}" for kind in KINDS for part in ("images", "labels")]
        arrays = {name: torch.from_numpy(array) for name, array in self._read("queries.npz", names).items()}
        return {k: QueryImages(images=arrays[f"{k}_images"], labels=arrays[f"{k}_labels"]) for k in KINDS}

    def save(self, subset: int, seed: int, losses: Mapping[str, Tensor]) -> None:
        """Write one model's losses on the queries, (query,) by kind."""
        self._store.save({"subset": subset, "seed": seed, **{kind: losses[kind].numpy() for kind in KINDS}})

    def measured(self) -> set[tuple[int, int]]:
        """Read the `(subset, seed)` of the models that are there."""
        return self._store.saved_keys()

    def compact(self) -> None:
        """Put what is there into few files."""
        self._store.compact()

    def load(self) -> Retrained:
        """Read as many models as have the same seeds for every subset.

        Raises:
            InputError: There are fewer than two subsets.
        """
        retrained = self._load(least_seeds=1)
        if retrained is None:
            require_no_npz(self.root / "losses")
            raise InputError(f"fewer than 2 subset models in {self.root}; run `provgen retrain` first")
        return retrained

    def load_several_seeds(self) -> Retrained | None:
        """Read as many models as have two or more seeds, the same for every subset; None for fewer than two subsets."""
        return self._load(least_seeds=2)

    def masks(self) -> Tensor:
        """Read which examples every subset has, bool (subset, train), whether its models have been trained or not."""
        arrays = self._read("masks.npz", ["masks", "train"])
        bits = np.unpackbits(arrays["masks"], axis=1, count=int(arrays["train"]))
        return torch.from_numpy(bits).bool()

    def _read(self, name: str, arrays: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Read some arrays of a file.

        Raises:
            InputError: It is missing or damaged.
        """
        path = self.root / name
        try:
            with np.load(path, allow_pickle=False) as file:
                return {array: file[array] for array in arrays}
        except (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error, NotImplementedError) as error:
            raise InputError(
                f"{path} is missing or damaged ({' '.join(str(error).split())[:100]}); restore it, or remove "
                f"{self.root} and run `provgen retrain` again"
            ) from error

    def _load(self, *, least_seeds: int) -> Retrained | None:
        rows = self._store.rows()
        subsets, seeds = _rectangle(rows, least_seeds=least_seeds)
        if len(subsets) < 2:
            return None
        queries, numbers = self.queries(), torch.tensor(subsets)
        if queries is None:  # they are written before the first model
            self._read("queries.npz", [])
            raise AssertionError
        arrays = {kind: np.array([[rows[n, seed][kind] for n in subsets] for seed in seeds]) for kind in KINDS}
        losses = {kind: torch.from_numpy(array).transpose(1, 2).contiguous() for kind, array in arrays.items()}
        return Retrained(subsets=numbers, masks=self.masks()[numbers], losses=losses, queries=queries)

    def _write(self, name: str, **arrays: Any) -> None:
        with atomic_path(self.root / name) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)


def _rectangle(models: Collection[tuple[int, ...]], *, least_seeds: int = 1) -> tuple[list[int], list[int]]:
    """Choose subsets and the first so many seeds that all of them have: as many models as possible."""
    best: tuple[list[int], list[int]] = ([], [])
    subsets, seeds = ({model[place] for model in models} for place in (0, 1))
    for count in range(least_seeds, len(seeds) + 1):
        first = sorted(seeds)[:count]
        whole = [n for n in sorted(subsets) if all((n, seed) in models for seed in first)]
        if len(whole) * count >= len(best[0]) * len(best[1]):
            best = (whole, first)
    return best


def subset_settings(settings: Settings, *, seed: int, share_of_steps: float = 1.0) -> Settings:
    """Give the settings of a model that is trained on a part of the images.

    Where the provenance network has no gradient into the generator (`provenance.gradient=stop`), the generator is
    bit for bit the one trained alone, so it is trained alone. Its steps are a share of those of the run.
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
    return evaluation.averaged_network(trainer, trainer.generator.name)


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
    samples = evaluation.sample(trained.pipeline, trained.data, count=count).images
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
        Mean over the levels by kind, float64 (query,).
    """
    losses = {}
    for kind, images in queries.items():
        image_set = _as_image_set(images, train)
        by_draw = generator_losses(
            build.make_generator(settings, image_set, network), image_set, draws=LEVELS * DRAWS_PER_LEVEL, seed=0
        )
        by_level = by_draw.unflatten(1, (LEVELS, DRAWS_PER_LEVEL)).mean(dim=2)
        losses[kind] = by_level.double().mean(dim=1).cpu()
    return losses


def _as_image_set(queries: QueryImages, train: ImageSet) -> ImageSet:
    """Give queries the classes of the training images."""
    count = len(queries.images)
    paths, unknown = tuple(f"query/{number:05d}" for number in range(count)), (None,) * count
    return replace(
        train, **vars(queries), paths=paths, sha256=("",) * count, contributors=unknown, licenses=unknown,
    )  # fmt: skip


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
