"""Settings of a run: frozen dataclasses, read from YAML plus `key=value` overrides.

Only `build`, the command line and the recipes know these classes; library classes take plain arguments.
Every field's docstring gives its unit and what is allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from provgen.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images, at which size, and which of them are held out."""

    source: Literal["digits", "fashion_mnist", "mnist", "cifar10", "folder"] = "digits"
    """Where images come from; `digits` is embedded, `folder` is any image folder."""
    path: str | None = None
    """Folder with the images or the packed files; null for `digits`, or to download by torchvision."""
    image_size: int = 8
    """Height and width in pixels; other sizes are resized, at least 4."""
    holdout_fraction: float = 0.1
    """Share of every class kept out of training, in [0, 0.9]."""
    max_train_images: int | None = None
    """At most this many training images, class-stratified; null takes all."""
    split_seed: int = 0
    """Seed of the held-out split and of `max_train_images`."""

    def __post_init__(self) -> None:
        _require(self.image_size >= 4, "data.image_size", self.image_size, "at least 4 pixels")
        _require(
            0 <= self.holdout_fraction <= 0.9, "data.holdout_fraction", self.holdout_fraction, "in [0, 0.9]"
        )
        _require(
            self.max_train_images is None or self.max_train_images >= 2,
            "data.max_train_images",
            self.max_train_images,
            "null or at least 2",
        )
        _require(
            self.source != "folder" or self.path is not None,
            "data.path",
            self.path,
            "the path of an image folder when data.source=folder",
        )


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """The image generator."""

    kind: Literal["diffusion"] = "diffusion"
    """A UNet2DModel denoiser with DDPM training and DDIM sampling."""
    size: Literal["tiny", "small", "medium", "large"] = "small"
    """Named size; about 0.02, 0.16, 2 and 15 million parameters."""
    label_dropout: float = 0.2
    """Share of training rows whose label is replaced by the null label, in [0, 1]."""
    num_train_timesteps: int = 1000
    """Noise levels of the forward process, at least 10."""
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    """Noise schedule, by its diffusers name."""

    def __post_init__(self) -> None:
        _require(0 <= self.label_dropout <= 1, "generator.label_dropout", self.label_dropout, "in [0, 1]")
        _require(
            self.num_train_timesteps >= 10,
            "generator.num_train_timesteps",
            self.num_train_timesteps,
            "at least 10",
        )


@dataclass(frozen=True, kw_only=True)
class ProvenanceSettings:
    """The provenance network trained beside the generator."""

    index_head: Literal["class_independent", "none"] = "class_independent"
    """One softmax over all training examples, or no provenance network at all."""
    shared_stages: int | None = None
    """Encoder stages that are read (stem, down blocks, middle), at least 1; null reads all."""
    width: int = 64
    """Embedding channels, at least 1; index logits are inner products of this length."""
    gradient: Literal["joint", "stop"] = "joint"
    """Whether the provenance losses also train the denoiser's encoder."""
    targets: Literal["one_hot", "posterior"] = "posterior"
    """What the index head is trained towards: the example itself, or the closed-form posterior."""
    loss_weight: float = 0.01
    """Weight of the index cross-entropy (nats) against the denoising loss, positive."""
    class_loss_weight: float = 0.01
    """Weight of the class cross-entropy (nats, null-label rows only), at least 0."""
    label_mixing: float = 0.0
    """Share of the target spread evenly over the example's class (alpha of arXiv 2510.03361), in [0, 1]."""

    def __post_init__(self) -> None:
        _require(
            self.shared_stages is None or self.shared_stages >= 1,
            "provenance.shared_stages",
            self.shared_stages,
            "null or at least 1",
        )
        _require(self.width >= 1, "provenance.width", self.width, "at least 1")
        _require(self.loss_weight > 0, "provenance.loss_weight", self.loss_weight, "positive")
        _require(
            self.class_loss_weight >= 0,
            "provenance.class_loss_weight",
            self.class_loss_weight,
            "at least 0",
        )
        _require(0 <= self.label_mixing <= 1, "provenance.label_mixing", self.label_mixing, "in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How long, how fast and how often."""

    max_steps: int = 1000
    """Optimiser steps in all, at least 1."""
    batch_size: int = 128
    """Images per optimiser step over all processes together, at least 1."""
    learning_rate: float = 2e-3
    """AdamW step size after warm-up, positive."""
    warmup_steps: int = 100
    """Optimiser steps of linear warm-up, at least 0."""
    ema_decay: float = 0.995
    """Largest decay per optimiser step of the averaged weights, in [0, 1)."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Arithmetic of the denoiser: float32, or bfloat16 autocast."""
    log_every: int = 10
    """Optimiser steps between logged losses, at least 1."""
    evaluate_every: int = 500
    """Optimiser steps between tables of index metrics against their ceilings, at least 1."""
    checkpoint_every: int = 500
    """Optimiser steps between checkpoints, at least 1."""
    seed: int = 0
    """Seed of weights, batches and noise, at least 0."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "log_every", "evaluate_every", "checkpoint_every"):
            _require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "at least 1")
        _require(self.warmup_steps >= 0, "training.warmup_steps", self.warmup_steps, "at least 0")
        _require(self.learning_rate > 0, "training.learning_rate", self.learning_rate, "positive")
        _require(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "in [0, 1)")
        _require(self.seed >= 0, "training.seed", self.seed, "at least 0")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything `recipes/train.py` needs to know."""

    data: DataSettings = field(default_factory=DataSettings)
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    provenance: ProvenanceSettings = field(default_factory=ProvenanceSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    output_dir: str = "runs/digits"
    """Run folder, created if missing; an existing run in it is resumed."""


def load_settings(path: Path | None, overrides: list[str]) -> Settings:
    """Read settings from a YAML file (or the defaults) and `key=value` overrides.

    Raises:
        InputError: Unreadable file, unknown key, wrong type, non-finite or impossible value; the one-line
            message names the key, what was given and what is allowed.
    """
    config = OmegaConf.structured(Settings)
    given = [] if path is None else [_read_yaml(path)]
    given += [_read_override(override) for override in overrides]
    for part in given:
        for key, value in _leaves(part):
            config = _with(config, key, value)
    return _to_settings(config)


def save_settings(settings: Settings, path: Path, versions: dict[str, str]) -> None:
    """Write settings as YAML that `load_settings` reads back; `versions` go into leading comments."""
    comments = "".join(f"# {name}: {version}\n" for name, version in versions.items())
    path.write_text(comments + OmegaConf.to_yaml(OmegaConf.structured(settings)), encoding="utf-8")


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise InputError(f"no settings file at {path}; give a YAML file such as recipes/digits.yaml")
    try:
        config = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {_first_line(error)}") from error
    if not isinstance(config, DictConfig):
        raise InputError(
            f"{path} holds {type(config).__name__}; it must hold `section:` and `key: value` lines"
        )
    return config


def _read_override(override: str) -> DictConfig:
    key, separator, _ = override.partition("=")
    if not separator or not key.strip():
        raise InputError(
            f"cannot read the override {override!r}; write key=value, such as training.max_steps=500"
        )
    try:
        return OmegaConf.from_dotlist([override])
    except (YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"cannot read the override {override!r}: {_first_line(error)}") from error


def _leaves(config: DictConfig, prefix: str = "") -> list[tuple[str, Any]]:
    """List `(dotted key, value)`; values are kept raw so that interpolations can be refused."""
    pairs: list[tuple[str, Any]] = []
    for key in map(str, config):
        name = f"{prefix}{key}"
        if OmegaConf.is_interpolation(config, key):
            raise InputError(
                f"{name}: interpolations such as ${{oc.env:X}} are not allowed; write the value itself"
            )
        value = config[key]
        pairs += _leaves(value, f"{name}.") if isinstance(value, DictConfig) else [(name, value)]
    return pairs


def _with(config: DictConfig, key: str, value: Any) -> DictConfig:
    known = _known_keys()
    if key in {name.split(".")[0] for name in known if "." in name}:
        raise InputError(
            f"{key} is a section, got {value!r}; set one of its keys, such as {_first_of(key, known)}"
        )
    if key not in known:
        close = get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        raise InputError(f"unknown setting {key}={value}; {hint}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key} must be a finite number, got {value}")
    *section, name = key.split(".")
    try:
        merged = OmegaConf.merge(config, {section[0]: {name: value}} if section else {name: value})
    except OmegaConfBaseException as error:
        raise InputError(f"{key}: {_first_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _to_settings(config: DictConfig) -> Settings:
    settings = OmegaConf.to_object(config)
    assert isinstance(settings, Settings)
    return settings


def _known_keys() -> list[str]:
    keys = []
    for section in fields(Settings):
        value = section.default_factory() if callable(section.default_factory) else None
        keys += [f"{section.name}.{f.name}" for f in fields(value)] if is_dataclass(value) else [section.name]
    return keys


def _first_of(section: str, known: list[str]) -> str:
    return next(name for name in known if name.startswith(f"{section}."))


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise InputError(f"{key} must be {allowed}, got {value}")


def _first_line(error: Exception) -> str:
    return " ".join(str(error).splitlines()[:1]) or type(error).__name__
