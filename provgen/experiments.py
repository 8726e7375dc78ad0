"""Experiments: YAML files that list variants of one run and what they are expected to show."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from provgen.errors import InputError
from provgen.experiment_file import Description, read_description
from provgen.report.variant_report import text_of
from provgen.settings import Settings, flat_settings
from provgen.settings_file import load_settings

OF_THE_DRIVER = ("output_dir", "training.seed")
"""Settings that every run gets a value of its own of."""

Values = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of an experiment's table."""

    name: str
    """Safe in file names, unique within its experiment."""
    overrides: tuple[str, ...]
    """Everything on top of the shipped settings, as `key=value`."""
    settings: Settings
    """What it is trained with, but for the seed and the folder."""
    values: Values
    """Those of its settings that vary in the experiment, by dotted key."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Variants of one run, and which of their metrics are shown."""

    name: str
    """Of its file and of its folder."""
    config: Path
    """The shipped settings that all variants start from."""
    common: tuple[str, ...]
    """What every variant has on top of those, as `key=value`."""
    description: Description
    """What its file says."""
    variants: tuple[Variant, ...]
    """In the order of the table."""

    def runs(self) -> list[VariantRun]:
        """List every seed of every variant."""
        seeds = range(self.description.seeds)
        # All variants with the first seed come first: a table of half the runs is then a table of all variants.
        return [VariantRun(experiment=self, variant=v, seed=seed) for seed in seeds for v in self.variants]


@dataclass(frozen=True, kw_only=True)
class VariantRun:
    """One training run: a variant with a seed."""

    experiment: Experiment
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Folder of the run below the output folder."""
        return f"{self.experiment.name}/{self.variant.name}-seed{self.seed}"

    def overrides(self, output: Path) -> list[str]:
        """Give the arguments of the training recipe."""
        return [*self.variant.overrides, f"training.seed={self.seed}", f"output_dir={output / self.name}"]

    def settings(self, output: Path) -> Settings:
        """Give the settings it is trained with, those that `overrides` make."""
        shared = self.variant.settings
        training = replace(shared.training, seed=self.seed)
        return replace(shared, training=training, output_dir=str(output / self.name))

    def row(self, measured: Mapping[str, Any]) -> Values:
        """Make a row of the experiment's table: what the run is, then every metric."""
        head = {"experiment": self.experiment.name, "variant": self.variant.name, "seed": self.seed}
        return {**head, **self.variant.values, **measured}


def load_experiment(
    path: Path, configs: Path, *, quick: bool = False, overrides: Sequence[str] = ()
) -> Experiment:
    """Read an experiment and check the settings of every variant.

    Args:
        path: Its YAML file.
        configs: Folder of the shipped settings.
        quick: Take the small version.
        overrides: `key=value` of the command line, for every variant.

    Raises:
        InputError: Anything unknown, missing or impossible in the file or in the settings; the one-line message
            names the file.
    """
    description = read_description(path, quick=quick)
    config = configs / f"{description.config}.yaml"
    chosen = _combinations(description)
    varied = tuple(dict.fromkeys(key for _, values in chosen for key in values))
    _refuse_varied(path, varied, description, overrides)
    _require_varied(path, varied, description)
    common = (*_pairs(description.settings), *overrides)
    base = _load(path, config, common)
    variants = []
    for name, own in chosen:
        settings = _changed(path, name, base, own)
        flat = flat_settings(settings)
        values = {key: flat[key] for key in varied}
        given = (*common, *_pairs(own))
        variants.append(Variant(name=name, overrides=given, settings=settings, values=values))
    _require_distinct(path, variants)
    if not quick:
        _require_matches(path, variants, description)
    return Experiment(
        name=path.stem, config=config, common=common, description=description, variants=tuple(variants)
    )


def _combinations(description: Description) -> list[tuple[str, Values]]:
    """Name every variant: the named ones, each with every combination of the varied values."""
    keys = list(description.vary)
    found = []
    for name, values in (description.variants or {"": {}}).items():
        for combination in product(*description.vary.values()):
            varied = dict(zip(keys, combination, strict=True))
            parts = [name] * bool(name) + [f"{key.split('.')[-1]}={text_of(v)}" for key, v in varied.items()]
            found.append((re.sub(r"[^\w.,=+-]", "_", ",".join(parts), flags=re.ASCII), values | varied))
    return found


def _refuse_varied(
    path: Path, varied: Sequence[str], description: Description, overrides: Sequence[str]
) -> None:
    """Refuse settings that would make variants alike, and those that the driver sets."""
    given = [override.partition("=")[0] for override in overrides]
    for key in OF_THE_DRIVER:
        if key in {*varied, *description.settings, *given}:
            raise InputError(
                f"{path.name}: {key} is different in every run, and cannot be set for all of them"
            )
    for key in varied:
        if key in given:
            raise InputError(f"{path.name}: {key} is what varies here, so it cannot be set for all variants")


def _require_varied(path: Path, varied: Sequence[str], description: Description) -> None:
    """Refuse an x axis, lines and claims over what does not vary, and lines that would mix variants."""
    axes = [*([] if description.x is None else [description.x]), *description.lines]
    for key in axes + [key for claim in description.claims for key in (claim.along, *claim.where)]:
        if key not in varied:
            raise InputError(
                f"{path.name}: {key} does not vary; x, lines and claims name {', '.join(varied)}"
            )
    mixed = [key for key in varied if key not in axes]
    if description.x is not None and mixed:
        raise InputError(f"{path.name}: {mixed[0]} varies and is neither x nor in lines; add it to lines")


def _require_matches(path: Path, variants: Sequence[Variant], description: Description) -> None:
    """Refuse claims about variants that there are not."""
    for claim in description.claims:
        about = [variant.values for variant in variants if claim.is_about(variant.values)]
        if len({values[claim.along] for values in about}) < 2:
            raise InputError(
                f"{path.name}: where of the claim on {claim.metric} leaves fewer than two values of {claim.along}; "
                "compare it with the values of the variants"
            )


def _require_distinct(path: Path, variants: Sequence[Variant]) -> None:
    seen: set[str] = set()
    for variant in variants:
        name = variant.name.casefold()  # some file systems do not tell capitals apart
        if name in seen:
            raise InputError(f"{path.name}: two variants are named {variant.name}; rename one of them")
        seen.add(name)


def _load(path: Path, config: Path, overrides: Sequence[str]) -> Settings:
    try:
        return load_settings(config, list(overrides))
    except InputError as error:
        raise InputError(f"{path.name}: {error}") from error


def _changed(path: Path, name: str, base: Settings, own: Values) -> Settings:
    """Change some settings; the same as loading all of them again, in a fraction of the time."""
    try:
        for key, override in zip(own, _pairs(own), strict=True):
            section, _, field = key.partition(".")
            base = replace(
                base, **{section: replace(getattr(base, section), **{field: _typed(key, override)})}
            )
    except InputError as error:
        raise InputError(f"{path.name}, variant {name}: {error}") from error
    return base


@cache
def _typed(key: str, override: str) -> Any:
    """Read one `key=value`; variants have many of them in common."""
    return flat_settings(load_settings(None, [override]))[key]


def _pairs(values: Values) -> list[str]:
    return [f"{key}={_text(value)}" for key, value in values.items()]


def _text(value: object) -> str:
    """Write a YAML value as it stands on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
