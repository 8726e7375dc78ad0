"""Opening runs: their images in the order the manifest fixes, their settings, their trained pipeline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor

from provgen.attribution.coverage_entropy import posterior_entropies
from provgen.attribution.posterior import ClosedFormPosterior, Oracle
from provgen.data.coverage import entropy_coverage, k_center_coverage, stratified_coverage
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.data.manifest import Manifest
from provgen.data.sources import load_images
from provgen.data.splits import stratified_split, stratified_subset
from provgen.errors import InputError
from provgen.kinds import make_kind
from provgen.pipeline import ProvenancePipeline
from provgen.run_folder import RunFolder, atomic_path, require_run
from provgen.settings import Settings, flat_settings
from provgen.settings_file import load_settings, save_settings

MAY_CHANGE = {
    "output_dir",
    "data.path",  # the images may move: sha256 says whether they are the same
    "training.max_steps",
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
}
"""Settings that a resumed run may give another value."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The images of a run, in the order its manifest fixes."""

    train: ImageSet
    holdout: ImageSet
    manifest: Manifest

    @property
    def covered(self) -> Tensor:
        """Training images that the index head can name, bool (train,)."""
        return self.manifest.reachable


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run that has a pipeline."""

    folder: RunFolder
    settings: Settings
    data: RunData
    pipeline: ProvenancePipeline

    def closed_form(self, dtype: torch.dtype = torch.float32) -> Oracle:
        """Make the closed-form posterior over all of this run's training images, on the pipeline's device."""
        kind = make_kind(self.settings, self.data.train)
        return kind.closed_form(
            self.pipeline.network, self.data.train, dtype=dtype, device=self.pipeline.device
        )


def open_data(settings: Settings, folder: RunFolder) -> RunData:
    """Load the images; a run that has a manifest keeps its order and its split.

    Raises:
        InputError: The images cannot be read, or are no longer those of the manifest.
    """
    data = settings.data
    images = load_images(data.source, data.path, data.image_size)
    if folder.manifest.is_file():
        manifest = Manifest.load(folder.manifest)
        train, holdout = manifest.align(images)
        return RunData(train=train, holdout=holdout, manifest=manifest)
    train_rows, holdout_rows = stratified_split(images.labels, data.holdout_fraction, data.split_seed)
    train, holdout = images.select(train_rows), images.select(holdout_rows)
    if data.max_train_images is not None:
        train = train.select(stratified_subset(train.labels, data.max_train_images, data.split_seed))
    _require_images(train, data.path or data.source)
    manifest = Manifest.of(train, holdout)
    if settings.provenance.coverage < 1:
        manifest = manifest.with_reachable(_covered(settings, train))
    return RunData(train=train, holdout=holdout, manifest=manifest)


def start_run(settings: Settings, data: RunData, *, writes: bool) -> RunFolder:
    """Create the run folder, or check that the run in it was started with the same settings.

    Args:
        settings: Of this call.
        data: Its images.
        writes: Whether this process writes; only the main process may.

    Raises:
        InputError: It was started with others; names the first that differs.
    """
    folder = RunFolder(Path(settings.output_dir))
    if folder.config.is_file():
        _check_same(load_settings(folder.config, []), settings, folder)
    if not writes:
        return folder
    if not folder.manifest.is_file():
        data.manifest.save(folder.manifest)
    packages = ("provgen", "torch", "diffusers", "accelerate")
    versions = {name: version(name) for name in packages} | {"fingerprint": data.manifest.fingerprint}
    with atomic_path(folder.config) as partial:
        save_settings(settings, partial, versions)
    return folder


def open_trained_run(root: Path, device: torch.device) -> TrainedRun:
    """Open a run with its images, and its pipeline on `device`.

    Raises:
        InputError: No run, no pipeline in it, or images that are not those it was trained on.
    """
    folder = require_run(root)
    settings = replace(load_settings(folder.config, []), output_dir=str(root))
    if settings.provenance.index_head == "none":
        raise InputError(f"{root} was trained without a provenance network; there is nothing to trace with")
    if not (folder.pipeline / "model_index.json").is_file():
        raise InputError(
            f"{root} has no pipeline yet; finish training with `provgen train --config {folder.config}`"
        )
    data = open_data(settings, folder)
    disable_progress_bar()  # three files load in no time
    pipeline = ProvenancePipeline.from_pretrained(folder.pipeline).with_manifest(data.manifest)
    return TrainedRun(folder=folder, settings=settings, data=data, pipeline=pipeline.to(device))


def _covered(settings: Settings, train: ImageSet) -> Tensor:
    """Choose the examples that the index head can name, int64 (covered,)."""
    chosen, seed = settings.provenance, settings.data.split_seed
    count = round(chosen.coverage * len(train))
    if chosen.coverage_rule == "stratified":
        return stratified_coverage(train.labels, count, seed)
    if chosen.coverage_rule == "k_center":
        return k_center_coverage(to_unit_range(train.images).flatten(1), train.labels, count)
    closed_form = ClosedFormPosterior(to_unit_range(train.images), train.labels, null_label=train.num_classes)
    return entropy_coverage(posterior_entropies(closed_form, seed=seed), train.labels, count)


def _require_images(train: ImageSet, place: str) -> None:
    if len(train) < 2:
        raise InputError(f"only {len(train)} training image(s) in {place}; at least 2 are needed")
    present = set(train.labels.tolist())
    missing = [name for label, name in enumerate(train.class_names) if label not in present]
    if missing:
        raise InputError(
            f"no training image of class {missing[0]!r} is left ({len(missing)} such classes); "
            "raise data.max_train_images"
        )


def _check_same(started: Settings, given: Settings, folder: RunFolder) -> None:
    before, now = flat_settings(started), flat_settings(given)
    for key, value in before.items():
        if key not in MAY_CHANGE and now[key] != value:
            raise InputError(
                f"{folder.root} was started with {key}={value}, now {key}={now[key]}; "
                "use the same settings to resume it, or another output_dir"
            )
