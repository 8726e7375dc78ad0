"""Experiments: YAML files that list variants of one run and what they are expected to show."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from provgen.errors import InputError
from provgen.settings import Settings, flat_settings
from provgen.settings_file import load_settings, read_dataclass, read_yaml
from provgen.studies.paper.findings import Claim
from provgen.studies.paper.table import require_metric, text_of

Scalar = bool | int | float | str | None

OF_EACH_RUN = ("output_dir", "training.seed")
"""Settings that are different in every run."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the file of an experiment says; the fields are its keys."""

    title: str
    question: str
    """What the runs are to answer, in one sentence."""
    config: str
    """Name of the shipped settings that every variant starts from."""
    settings: dict[str, Scalar] = field(default_factory=dict)
    """Dotted key to value, for all variants."""
    vary: dict[str, list[Scalar]] = field(default_factory=dict)
    """Dotted key to values: every combination is a variant."""
    variants: dict[str, dict[str, Scalar]] = field(default_factory=dict)
    """Name to dotted keys and values: a variant each, or one for every combination of `vary`."""
    seeds: int
    """Runs of each variant, with seeds 0, 1, ..."""
    x: str | None = None
    """Key on the x axis of the figure; null draws a row for each variant."""
    lines: tuple[str, ...] = ()
    """Keys whose values get a line each."""
    figure: tuple[str, ...]
    """Metrics with a panel each."""
    table: tuple[str, ...]
    """Metrics with a column each."""
    claims: tuple[Claim, ...] = ()
    """What the runs are expected to show, written down before them."""

    def __post_init__(self) -> None:
        for name in (*self.figure, *self.table):
            require_metric(name)
        if self.seeds < 1:
            raise InputError(f"seeds must be a number of runs, at least 1, got {self.seeds}")
        if not self.vary and not self.variants:
            raise InputError("vary or variants is missing; write `vary: {key: [values]}`")
        for key, values in self.vary.items():
            if not values:
                raise InputError(f"vary.{key} must be a list such as [1, 2], got {values}")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of an experiment's table."""

    name: str
    """Name of its folders and of its row, unique within the experiment."""
    overrides: tuple[str, ...]
    """Everything on top of the shipped settings, as `key=value`."""
    settings: Settings
    """Settings that it is trained with, but for the seed and the folder."""
    values: dict[str, Any]
    """Settings that vary in the experiment, by dotted key."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Variants of one run, and which of their metrics are shown."""

    name: str
    """Name of its file and of its folder."""
    config: Path
    """Shipped settings that all variants start from."""
    common: tuple[str, ...]
    """What every variant has on top of `config`, as `key=value`."""
    description: Description
    """What its file says."""
    variants: tuple[Variant, ...]
    """Variants in the order of the table."""

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

    def row(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        """Make a row of the experiment's table: what the run is, then every metric."""
        head = {"experiment": self.experiment.name, "variant": self.variant.name, "seed": self.seed}
        return {**head, **self.variant.values, **measured}


def read_description(path: Path, *, quick: bool) -> Description:
    """Read the file of an experiment.

    The keys under `quick` replace those of the full version if `quick` is asked for; `settings` one by one, the others
    as a whole.

    Raises:
        InputError: An unreadable file; a key that is unknown, missing or of the wrong type; an unknown metric.
    """
    if not path.is_file():
        shipped = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        raise InputError(f"no experiment at {path}; there are {shipped or 'none beside it'}")
    with _named(path.name):
        full = read_yaml(path)
        changes = _mapping("quick", full.pop("quick", {}))
        settings = _mapping("settings", full.get("settings", {})) | _mapping("settings", changes.get("settings", {}))
        small = {**full, **changes, "settings": settings, "title": f"{full.get('title')} (quick)"}
        # Both are read, whichever is asked for: a mistake is found before the long runs, not after.
        descriptions = {False: _description(full), True: _description(small)}
    return descriptions[quick]


def load_experiment(path: Path, configs: Path, *, quick: bool = False, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment from its YAML file and check the settings of every variant.

    Args:
        path: The file.
        configs: Folder of the shipped settings.
        quick: Take the small version.
        overrides: `key=value` of the command line, for every variant.

    Raises:
        InputError: Anything unknown, missing or impossible in the file or in the settings.
    """
    description = read_description(path, quick=quick)
    with _named(path.name):
        chosen = _combinations(description)
        varied = tuple(dict.fromkeys(key for values in chosen.values() for key in values))
        _refuse_set_for_all(description, overrides, varied)
        _require_varied(description, varied)
        config = configs / f"{description.config}.yaml"
        common = (*_pairs(description.settings), *overrides)
        variants = [_variant(name, config, (*common, *_pairs(values)), varied) for name, values in chosen.items()]
        if not quick:
            _require_comparable(description, variants)
    return Experiment(name=path.stem, config=config, common=common, description=description, variants=tuple(variants))


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Put the place of a mistake before its message."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def _description(content: Mapping[Any, Any]) -> Description:
    claims = content.get("claims", [])
    if not isinstance(claims, list):
        raise InputError(f"claims must be a list of claims, got {claims!r}")
    pairs = [(str(key), value) for key, value in content.items() if key != "claims"]
    description = read_dataclass(Description, pairs)
    read = []
    for number, claim in enumerate(claims, start=1):
        with _named(f"claim {number}"):
            read.append(read_dataclass(Claim, [(str(key), value) for key, value in _mapping("a claim", claim).items()]))
    return replace(description, claims=tuple(read))


def _mapping(key: str, value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{key} must hold `key: value` lines, got {value!r}")
    return value


def _combinations(description: Description) -> dict[str, dict[str, Scalar]]:
    """Give the own settings of every variant by name: the named ones, each with every combination that varies."""
    chosen: dict[str, dict[str, Scalar]] = {}
    for name, values in (description.variants or {"": {}}).items():
        if name and not re.fullmatch(r"\w[\w.+-]*", name, flags=re.ASCII):
            raise InputError(f"{name!r} is no name of a variant; use letters, digits and . _ + -")
        for combination in product(*description.vary.values()):
            varied = dict(zip(description.vary, combination, strict=True))
            labels = [f"{key.split('.')[-1]}={text_of(value)}" for key, value in varied.items()]
            full_name = re.sub(r"[^\w.,=+-]", "_", ",".join([name] * bool(name) + labels), flags=re.ASCII)
            # Some file systems do not tell capitals apart.
            if full_name.casefold() in map(str.casefold, chosen):
                raise InputError(f"two variants are named {full_name}; rename one of them")
            chosen[full_name] = values | varied
    return chosen


def _variant(name: str, config: Path, overrides: tuple[str, ...], varied: Sequence[str]) -> Variant:
    settings = load_settings(config, list(overrides))
    flat = flat_settings(settings)
    return Variant(name=name, overrides=overrides, settings=settings, values={key: flat[key] for key in varied})


def _refuse_set_for_all(description: Description, overrides: Sequence[str], varied: Sequence[str]) -> None:
    """Refuse settings that would make variants alike, and those that each run has of its own."""
    given = [override.partition("=")[0] for override in overrides]
    for key in OF_EACH_RUN:
        if key in {*varied, *given, *description.settings}:
            raise InputError(f"{key} is different in every run; it cannot be set for all of them")
    for key in varied:
        if key in given:
            raise InputError(f"{key} is what varies here; it cannot be set for all variants")


def _require_varied(description: Description, varied: Sequence[str]) -> None:
    """Refuse an x axis, lines and claims over what does not vary, and lines that would mix variants."""
    axes = [*([] if description.x is None else [description.x]), *description.lines]
    for key in axes + [key for claim in description.claims for key in (claim.along, *claim.where)]:
        if key not in varied:
            raise InputError(f"{key} does not vary; x, lines and claims name {', '.join(varied)}")
    mixed = [key for key in varied if key not in axes]
    if description.x is not None and mixed:
        raise InputError(f"{mixed[0]} varies and is neither x nor in lines; add it to lines")


def _require_comparable(description: Description, variants: Sequence[Variant]) -> None:
    """Refuse claims that compare fewer than two things."""
    names = [variant.name for variant in variants]
    for claim in description.claims:
        if claim.reference is not None and claim.reference not in names:
            raise InputError(f"reference names no variant by {claim.reference!r}; there are {', '.join(names)}")
        values = {variant.values[claim.along] for variant in variants if claim.is_about(variant.values)}
        if len(values) + (claim.reference is not None) < 2:
            raise InputError(
                f"where of the claim on {claim.metric} leaves fewer than two values of {claim.along}; "
                "compare it with the values of the variants"
            )


def _pairs(values: Mapping[str, Any]) -> list[str]:
    """Write settings as they stand on the command line."""
    for key, value in values.items():
        if isinstance(value, dict | list):
            raise InputError(f"{key} must be a single value, got {value!r}; write section.key: value")
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
