"""Reading and writing settings: YAML plus `key=value` overrides; every mistake is one line that names its key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from provgen.errors import InputError
from provgen.settings import Settings

TEXT_KEYS = ("data.path", "output_dir")
"""Settings that are free text: on the command line they are taken as they stand, `007` stays `007`."""

T = TypeVar("T")


def load_settings(path: Path | None, overrides: list[str]) -> Settings:
    """Read settings from a YAML file (or the defaults) and `key=value` overrides.

    A relative `data.path` is meant from where the command runs, and is made absolute. The settings file of a run is
    that of the run it lies in, from wherever it is read: its folder is the output_dir.

    Raises:
        InputError: Unreadable file, unknown key, wrong type, non-finite or impossible value; the one-line
            message names the key, what was given and what is allowed.
    """
    path = None if path is None else path.expanduser()
    pairs = [] if path is None else list(_leaves(read_yaml(path)))
    if path is not None and _is_of_a_run(path):
        pairs.append(("output_dir", str(path.parent)))
    pairs += [pair for override in overrides for pair in _read_override(override)]
    settings = read_dataclass(Settings, [(key, _precision(key, value)) for key, value in pairs])
    settings = replace(settings, output_dir=str(Path(settings.output_dir).expanduser()))
    if settings.data.path is None:
        return settings
    data_path = Path(settings.data.path).expanduser().absolute()
    return replace(settings, data=replace(settings.data, path=str(data_path)))


def _is_of_a_run(path: Path) -> bool:
    """Whether a settings file lies in a run folder; training writes it beside the manifest."""
    return path.name == "config.yaml" and (path.parent / "manifest.parquet").is_file()


def save_settings(settings: Settings, path: Path, versions: dict[str, str]) -> None:
    """Write settings as YAML that `load_settings` reads back; `versions` go into leading comments."""
    comments = "".join(f"# {name}: {version}\n" for name, version in versions.items())
    path.write_text(comments + OmegaConf.to_yaml(OmegaConf.structured(settings)), encoding="utf-8")


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read a YAML file of `key: value` lines.

    Raises:
        InputError: There is no such file, or it is not valid YAML, or it holds something else.
    """
    if not path.is_file():
        raise InputError(f"no settings file at {path}; give a YAML file such as recipes/digits.yaml")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is not valid YAML: {_first_line(error)}; mend the file") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path} holds no settings; it must hold `section:` and `key: value` lines")
    return content


def read_dataclass(cls: type[T], pairs: Sequence[tuple[str, Any]]) -> T:
    """Make a dataclass of typed fields, or of sections of them, from dotted keys and values; the last one wins.

    Raises:
        InputError: A key that is unknown or missing, or a value of the wrong type, or not finite; and whatever
            the class itself refuses. The one-line message names the key.
    """
    types = _known_keys(cls)
    for key, value in pairs:
        _refuse_interpolations(key, value)
        _require_known(key, value, types)
    config = _merge(OmegaConf.structured(cls), pairs, types)
    for key in sorted(OmegaConf.missing_keys(config)):
        raise InputError(f"{key} is missing; write `{key}: ...`")
    for key in types:
        value = OmegaConf.select(config, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key} must be a finite number, got {value}")
    made = OmegaConf.to_object(config)
    assert isinstance(made, cls)
    return made


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Hint at the known name that is nearest to `name`, or list all of them."""
    close = get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def _read_override(override: str) -> list[tuple[str, Any]]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise InputError(f"cannot read the override {override!r}; write key=value, such as training.max_steps=500")
    if key in TEXT_KEYS and text != "null":
        return [(key, text)]
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
    except (YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"cannot read the override {override!r}: {_first_line(error)}; quote the value") from error
    assert isinstance(content, dict)
    return list(_leaves(content))


def _leaves(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted key, value)`."""
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _precision(key: str, value: Any) -> Any:
    """Undo how YAML reads a bare `no`."""
    return "no" if key == "training.mixed_precision" and value is False else value


def _known_keys(cls: type) -> dict[str, str]:
    """Give the annotation of every field, such as `int | None`, by its dotted key."""
    keys: dict[str, str] = {}
    for field in fields(cls):
        section = field.default_factory() if callable(field.default_factory) else None
        if is_dataclass(section):
            keys |= {f"{field.name}.{inner.name}": str(inner.type) for inner in fields(section)}
        else:
            keys[field.name] = str(field.type)
    return keys


def _require_known(key: str, value: Any, known: Iterable[str]) -> None:
    if key in known:
        return
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        raise InputError(f"{key} is a section, got {value!r}; set one of its keys, such as {inside[0]}")
    raise InputError(f"unknown key {key}={value!r}; {did_you_mean(key, known)}")


def _refuse_interpolations(key: str, value: Any) -> None:
    """Refuse OmegaConf's own notations, however deep they lie."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _refuse_interpolations(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for inner in value:
            _refuse_interpolations(key, inner)
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise InputError(f"{key}: {value} is not allowed, nor are other interpolations; write the value itself")


def _merge(config: Any, pairs: Sequence[tuple[str, Any]], types: dict[str, str]) -> Any:
    """Put values into a structured config: all at once, and one by one only to find the culprit."""
    with suppress(OmegaConfBaseException, TypeError):
        return OmegaConf.merge(config, _nested(pairs))
    for key, value in pairs:
        try:
            config = OmegaConf.merge(config, _nested([(key, value)]))
        except (OmegaConfBaseException, TypeError) as error:
            raise InputError(f"{key} must be of type {types[key]}, got {value!r}") from error
    return config


def _nested(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Put dotted keys into the sections that they name."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        *section, name = key.split(".")
        target = content.setdefault(section[0], {}) if section else content
        target[name] = value
    return content


def _first_line(error: Exception) -> str:
    return " ".join(str(error).splitlines()[:1]) or type(error).__name__
