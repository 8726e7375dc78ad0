"""Reading and writing settings: YAML plus `key=value` overrides; every mistake is one line that names its key."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from provgen.errors import InputError
from provgen.settings import Settings

TEXT_KEYS = ("data.path", "output_dir")
"""Settings that are free text: on the command line they are taken as they stand, `007` stays `007`."""


def load_settings(path: Path | None, overrides: list[str]) -> Settings:
    """Read settings from a YAML file (or the defaults) and `key=value` overrides.

    A relative `data.path` is meant from where the command runs, and is made absolute.

    Raises:
        InputError: Unreadable file, unknown key, wrong type, non-finite or impossible value; the one-line
            message names the key, what was given and what is allowed.
    """
    config = OmegaConf.structured(Settings)
    pairs = [] if path is None else list(_leaves(_read_yaml(path)))
    for key, value in pairs + [pair for override in overrides for pair in _read_override(override)]:
        config = _with(config, key, value)
    return _to_settings(config)


def save_settings(settings: Settings, path: Path, versions: dict[str, str]) -> None:
    """Write settings as YAML that `load_settings` reads back; `versions` go into leading comments."""
    comments = "".join(f"# {name}: {version}\n" for name, version in versions.items())
    path.write_text(comments + OmegaConf.to_yaml(OmegaConf.structured(settings)), encoding="utf-8")


def _read_yaml(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise InputError(f"no settings file at {path}; give a YAML file such as recipes/digits.yaml")
    try:
        config = OmegaConf.load(path)
        content = OmegaConf.to_container(config, resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise InputError(
            f"{path} is not valid YAML: {_first_line(error)}; mend it, or start from recipes/digits.yaml"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no settings; it must hold `section:` and `key: value` lines")
    return content


def _read_override(override: str) -> list[tuple[str, Any]]:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise InputError(f"cannot read the override {override!r}; write key=value, such as training.max_steps=500")
    if key in TEXT_KEYS and text != "null":
        return list(_leaves({key: text}))
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([override]), resolve=False)
    except (YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"cannot read the override {override!r}: {_first_line(error)}; quote the value") from error
    assert isinstance(content, dict)
    return list(_leaves(content))


def _leaves(content: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield `(dotted key, value)`; OmegaConf's own notations are refused."""
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{name}.")
            continue
        if isinstance(value, str) and ("${" in value or value == "???"):
            raise InputError(f"{name}: {value} is not allowed, nor are other interpolations; write the value itself")
        yield name, value


def _with(config: DictConfig, key: str, value: Any) -> DictConfig:
    _require_known(key, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key} must be a finite number, got {value}")
    if key == "training.mixed_precision" and value is False:
        value = "no"  # how YAML reads a bare no
    *section, name = key.split(".")
    try:
        merged = OmegaConf.merge(config, {section[0]: {name: value}} if section else {name: value})
    except OmegaConfBaseException as error:
        raise InputError(f"{key} must be of type {_known_keys()[key]}, got {value!r}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _require_known(key: str, value: Any) -> None:
    known = _known_keys()
    if key in known:
        return
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        raise InputError(f"{key} is a section, got {value!r}; set one of its keys, such as {inside[0]}")
    close = get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
    raise InputError(f"unknown setting {key}={value!r}; {hint}")


def _to_settings(config: DictConfig) -> Settings:
    for key in _known_keys():
        value = OmegaConf.select(config, key)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key} must be a finite number, got {value}")
    settings = OmegaConf.to_object(config)
    assert isinstance(settings, Settings)
    if settings.data.path is None:
        return settings
    return replace(settings, data=replace(settings.data, path=str(Path(settings.data.path).absolute())))


def _known_keys() -> dict[str, str]:
    """Give the annotation of every setting, such as `int | None`, by its dotted key."""
    keys: dict[str, str] = {}
    for section in fields(Settings):
        value = section.default_factory() if callable(section.default_factory) else None
        if is_dataclass(value):
            keys |= {f"{section.name}.{f.name}": str(f.type) for f in fields(value)}
        else:
            keys[section.name] = str(section.type)
    return keys


def _first_line(error: Exception) -> str:
    return " ".join(str(error).splitlines()[:1]) or type(error).__name__
