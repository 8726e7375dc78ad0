"""Experiments: YAML files that list variants of one run and what they are expected to show."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from provgen.errors import InputError
from provgen.settings import Settings, flat_settings
from provgen.settings_file import load_settings
from provgen.studies.paper.findings import EXPECTED, Claim
from provgen.studies.paper.table import METRICS, text_of

Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Description:
    """What the file of an experiment says; the fields are its keys."""

    title: str
    question: str
    """One sentence."""
    config: str
    """Name of the shipped settings that every variant starts from."""
    settings: Values = field(default_factory=dict)
    """Dotted key to value, for all variants."""
    vary: dict[str, list[Any]] = field(default_factory=dict)
    """Dotted key to values: every combination is a variant."""
    variants: dict[str, Values] = field(default_factory=dict)
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
    """What the paper found."""


QUICK_KEYS = ("seeds", "settings", "vary", "variants", "x", "lines", "claims")
"""What the small version may say differently."""


def read_description(path: Path, *, quick: bool) -> Description:
    """Read the file of an experiment.

    The keys under `quick` replace those of the full version if `quick` is asked for; `settings` one by one, the others
    as a whole.

    Raises:
        InputError: An unreadable file; a key that is unknown, missing or of the wrong type; an unknown metric.
    """
    content = _read_yaml(path)
    small = _mapping(path, "quick", content.pop("quick", {}))
    _require_known(path, "quick.", small, QUICK_KEYS)
    if quick:
        small["settings"] = _mapping(path, "settings", content.get("settings", {})) | small.get("settings", {})
        content |= small | {"title": f"{content.get('title')} (quick)"}
    return _description(path, content)


def _read_yaml(path: Path) -> Values:
    if not path.is_file():
        shipped = ", ".join(sorted(other.stem for other in path.parent.glob("*.yaml")))
        hint = f"there are {shipped}" if shipped else "give a YAML file such as recipes/paper/alpha.yaml"
        raise InputError(f"no experiment at {path}; {hint}")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        first_line = " ".join(str(error).splitlines()[:1])
        raise InputError(f"{path} is not valid YAML: {first_line}; mend it") from error
    return _mapping(path, "the file", content)


def _description(path: Path, content: Values) -> Description:
    known = [key.name for key in fields(Description)]
    _require_known(path, "", content, known)
    optional = [f.name for f in fields(Description) if (f.default, f.default_factory) != (MISSING, MISSING)]
    for key in known:
        if key not in content and key not in optional:
            raise InputError(f"{path.name}: {key} is missing, write `{key}: ...`")
    vary = _mapping(path, "vary", content.get("vary"))
    for key, values in vary.items():
        for value in _list(path, f"vary.{key}", values):
            _settings(path, "vary", {key: value})
    variants = _mapping(path, "variants", content.get("variants"))
    if not vary and not variants:
        raise InputError(f"{path.name}: vary or variants is missing, write `vary: {{key: [values]}}`")
    claims = _list(path, "claims", content.get("claims") or [], may_be_empty=True)
    return Description(
        **{key: _string(path, key, content[key]) for key in ("title", "question", "config")},
        settings=_settings(path, "settings", content.get("settings")),
        vary=vary,
        variants={_name(path, key): _settings(path, f"variants.{key}", v) for key, v in variants.items()},
        seeds=_count(path, content["seeds"]),
        x=None if content.get("x") is None else _string(path, "x", content["x"]),
        lines=tuple(_one_or_more(content.get("lines"))),
        figure=_metrics(path, "figure", content["figure"]),
        table=_metrics(path, "table", content["table"]),
        claims=tuple(_claim(path, claim) for claim in claims),
    )


def _claim(path: Path, given: Any) -> Claim:
    content = _mapping(path, "a claim", given)
    known = [key.name for key in fields(Claim)]
    _require_known(path, "claims.", content, known)
    for key in known:
        if key not in content and key != "where":
            raise InputError(f"{path.name}: a claim has no {key}, write `{key}: ...`")
    (metric,) = _metrics(path, "claims.metric", [content["metric"]])
    if content["expected"] not in EXPECTED:
        raise InputError(f"{path.name}: expected must be {', '.join(EXPECTED)}, got {content['expected']}")
    tolerance = content["tolerance"]
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not tolerance >= 0:
        raise InputError(f"{path.name}: tolerance must be a number, at least 0, got {tolerance}")
    return Claim(
        text=_string(path, "claims.text", content["text"]),
        metric=metric,
        along=_string(path, "claims.along", content["along"]),
        where=_mapping(path, "claims.where", content.get("where")),
        expected=content["expected"],
        tolerance=float(tolerance),
    )


def _require_known(path: Path, prefix: str, content: Mapping[Any, Any], known: Iterable[str]) -> None:
    for key in content:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
            raise InputError(f"{path.name}: unknown key {prefix}{key}; {hint}")


def _mapping(path: Path, key: str, value: Any) -> Values:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(inner, str) for inner in value):
        raise InputError(f"{path.name}: {key} must hold `name: value` lines, got {value!r}")
    return dict(value)


def _settings(path: Path, key: str, value: Any) -> Values:
    """Read dotted keys with a single value each."""
    settings = _mapping(path, key, value)
    for name, inner in settings.items():
        if isinstance(inner, dict | list):
            raise InputError(f"{path.name}: {key}.{name} must be a single value, write section.key: value")
    return settings


def _list(path: Path, key: str, value: Any, *, may_be_empty: bool = False) -> list[Any]:
    if not isinstance(value, list) or not (value or may_be_empty):
        raise InputError(f"{path.name}: {key} must be a list such as [1, 2], got {value!r}")
    return value


def _one_or_more(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _string(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{path.name}: {key} must be text, not empty, got {value!r}")
    return value.strip()


def _name(path: Path, name: str) -> str:
    if not re.fullmatch(r"\w[\w.+-]*", name, flags=re.ASCII):
        raise InputError(f"{path.name}: {name!r} is no name of a variant, use letters, digits and . _ + -")
    return name


def _count(path: Path, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{path.name}: seeds must be a number of runs, at least 1, got {value!r}")
    return value


def _metrics(path: Path, key: str, value: Any) -> tuple[str, ...]:
    for name in _list(path, key, value):
        if name not in METRICS:
            close = get_close_matches(str(name), METRICS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(METRICS)}"
            raise InputError(f"{path.name}: {key} names no metric by {name!r}; {hint}")
    return tuple(value)


OF_THE_DRIVER = ("output_dir", "training.seed")
"""Settings that every run gets a value of its own of."""

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


def load_experiment(path: Path, configs: Path, *, quick: bool = False, overrides: Sequence[str] = ()) -> Experiment:
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
    return Experiment(name=path.stem, config=config, common=common, description=description, variants=tuple(variants))


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


def _refuse_varied(path: Path, varied: Sequence[str], description: Description, overrides: Sequence[str]) -> None:
    """Refuse settings that would make variants alike, and those that the driver sets."""
    given = [override.partition("=")[0] for override in overrides]
    for key in OF_THE_DRIVER:
        if key in {*varied, *description.settings, *given}:
            raise InputError(f"{path.name}: {key} is different in every run, and cannot be set for all of them")
    for key in varied:
        if key in given:
            raise InputError(f"{path.name}: {key} is what varies here, so it cannot be set for all variants")


def _require_varied(path: Path, varied: Sequence[str], description: Description) -> None:
    """Refuse an x axis, lines and claims over what does not vary, and lines that would mix variants."""
    axes = [*([] if description.x is None else [description.x]), *description.lines]
    for key in axes + [key for claim in description.claims for key in (claim.along, *claim.where)]:
        if key not in varied:
            raise InputError(f"{path.name}: {key} does not vary; x, lines and claims name {', '.join(varied)}")
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
            base = replace(base, **{section: replace(getattr(base, section), **{field: _typed(key, override)})})
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
