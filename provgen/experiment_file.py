"""Reading the YAML file of an experiment; every mistake is one line that names the file and the key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from provgen.errors import InputError
from provgen.report.findings import EXPECTED, Claim
from provgen.report.variant_report import METRICS

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
        small["settings"] = _mapping(path, "settings", content.get("settings", {})) | small.get(
            "settings", {}
        )
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
