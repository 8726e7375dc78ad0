"""Settings of a run: frozen dataclasses, read from YAML by `settings_file`.

Only `build` and the layers above it know these classes; library classes take plain arguments.
Every field's docstring gives its unit and what is allowed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from provgen.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which images, at which size, and which of them are held out."""

    source: Literal["digits", "fashion_mnist", "mnist", "cifar10", "folder"] = "digits"
    """Where images come from; `digits` is embedded, `folder` is any image folder."""
    path: str | None = None
    """Folder with the images or the packed files; null for `digits`, or to download by torchvision."""
    image_size: int = 8
    """Height and width in pixels; other sizes are resized, in [4, 1024]."""
    holdout_fraction: float = 0.1
    """Share of every class kept out of training, in [0, 0.9]."""
    max_train_images: int | None = None
    """At most this many training images, class-stratified, in [2, 10^9]; null takes all."""
    split_seed: int = 0
    """Seed of the held-out split and of `max_train_images`, in [0, 2^31)."""
    max_bytes: int = 2**28
    """Most bytes that one image (4 a pixel) or packed file may unpack to, in [2^16, 2^40]; raise it for larger ones."""

    def __post_init__(self) -> None:
        _require(4 <= self.image_size <= 1024, "data.image_size", self.image_size, "in [4, 1024] pixels")
        _require(0 <= self.holdout_fraction <= 0.9, "data.holdout_fraction", self.holdout_fraction, "in [0, 0.9]")
        most = self.max_train_images
        _require(most is None or 2 <= most <= 10**9, "data.max_train_images", most, "null or in [2, 10^9]")
        _require(0 <= self.split_seed < 2**31, "data.split_seed", self.split_seed, "in [0, 2^31)")
        _require(2**16 <= self.max_bytes <= 2**40, "data.max_bytes", self.max_bytes, "in [2^16, 2^40]")
        _require(
            self.source != "folder" or self.path is not None,
            "data.path",
            self.path,
            "the path of an image folder when data.source=folder",
        )


@dataclass(frozen=True, kw_only=True)
class GeneratorSettings:
    """The image generator."""

    kind: Literal["diffusion", "vae", "none"] = "diffusion"
    """A denoiser, a variational autoencoder, or no generator at all but a classifier of clean images."""
    size: Literal["tiny", "small", "medium", "large"] = "small"
    """Named size; denoisers have about 0.04, 0.16, 1 and 6 million parameters."""
    label_dropout: float = 0.2
    """Diffusion: share of training rows whose label is replaced by the null label, in [0, 1]."""
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    """Diffusion: noise schedule, by its diffusers name."""
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """Diffusion: what the denoiser predicts, the noise or the velocity, by its diffusers name."""
    kl_weight: float = 0.3
    """VAE: weight of the latent's divergence (nats per pixel) against the squared error, positive."""

    def __post_init__(self) -> None:
        _require(0 <= self.label_dropout <= 1, "generator.label_dropout", self.label_dropout, "in [0, 1]")
        _require(self.kl_weight > 0, "generator.kl_weight", self.kl_weight, "positive")


@dataclass(frozen=True, kw_only=True)
class ProvenanceSettings:
    """The provenance network trained beside the generator."""

    index_head: str = "class_independent"
    """`class_independent`, `class_conditional` or `two_stage`, or `none`: no provenance network at all."""
    cells: Literal["kmeans", "classes"] = "kmeans"
    """Two-stage head: what its cells are."""
    num_cells: int | None = None
    """Two-stage head: k-means cells, in [1, 10^5]; null for a fifth of the root of the example count, at least 2."""
    beam: int | None = 4
    """Two-stage head: cells looked into while tracing, in [1, 10^5]; null looks into all."""
    shared_stages: int | None = None
    """Encoder stages of the generator that are shared (stem, down blocks, middle): 0 to all; null shares all."""
    width: int = 64
    """Embedding channels, in [1, 4096]; index logits are inner products of this length."""
    start: Literal["images", "random"] = "images"
    """Where the index head's prototypes start: at principal coordinates of the training images, or anywhere."""
    gradient: Literal["joint", "stop"] = "joint"
    """Whether the provenance losses also train the generator's encoder."""
    targets: Literal["one_hot", "posterior"] = "posterior"
    """What the index head is trained towards: the example itself, or the closed-form posterior."""
    loss_weight: float = 0.01
    """Weight of the index cross-entropy (nats) against the generator's loss, positive."""
    class_loss_weight: float = 0.01
    """Weight of the class cross-entropy (nats; rows told no class, all rows of a classifier), at least 0."""
    label_mixing: float = 0.0
    """Share of the target spread over like examples (alpha of arXiv 2510.03361), in [0, 1]."""
    mixing: Literal["class", "neighbors"] = "class"
    """Which examples are alike: all of the class, or the nearest of the class."""
    num_neighbors: int = 10
    """How many are nearest, in [1, 10^4]."""
    coverage: float = 1.0
    """Share of the training images that the index head can name, in (0, 1]."""
    coverage_rule: Literal["stratified", "k_center", "entropy"] = "stratified"
    """Which: drawn evenly from every class, spread out in pixel space, or those hardest to tell apart."""

    def __post_init__(self) -> None:
        for name in ("num_cells", "beam"):
            value = getattr(self, name)
            _require(value is None or 1 <= value <= 10**5, f"provenance.{name}", value, "null or in [1, 10^5]")
        shared = self.shared_stages
        _require(shared is None or shared >= 0, "provenance.shared_stages", shared, "null or at least 0")
        _require(1 <= self.width <= 4096, "provenance.width", self.width, "in [1, 4096]")
        _require(1 <= self.num_neighbors <= 10**4, "provenance.num_neighbors", self.num_neighbors, "in [1, 10^4]")
        _require(self.loss_weight > 0, "provenance.loss_weight", self.loss_weight, "positive")
        weight = self.class_loss_weight
        _require(weight >= 0, "provenance.class_loss_weight", weight, "at least 0")
        _require(0 <= self.label_mixing <= 1, "provenance.label_mixing", self.label_mixing, "in [0, 1]")
        _require(0 < self.coverage <= 1, "provenance.coverage", self.coverage, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How long, how fast and how often."""

    max_steps: int = 1000
    """Optimiser steps in all, in [1, 10^9]."""
    batch_size: int = 128
    """Images per optimiser step over all processes together, in [1, 65536]."""
    learning_rate: float = 2e-3
    """AdamW step size after warm-up, positive."""
    warmup_steps: int = 100
    """Optimiser steps of linear warm-up, in [0, 10^9]."""
    ema_decay: float = 0.995
    """Largest decay per optimiser step of the averaged weights, in [0, 1)."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Arithmetic of the generator: float32, or bfloat16 autocast."""
    log_every: int = 10
    """Optimiser steps between logged losses, in [1, 10^9]."""
    evaluate_every: int = 500
    """Optimiser steps between tables of index metrics against their ceilings, in [1, 10^9]."""
    checkpoint_every: int = 500
    """Optimiser steps between checkpoints, in [1, 10^9]."""
    seed: int = 0
    """Seed of weights, batches and noise, in [0, 2^31)."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "log_every", "evaluate_every", "checkpoint_every"):
            _require(1 <= getattr(self, name) <= 10**9, f"training.{name}", getattr(self, name), "in [1, 10^9]")
        _require(1 <= self.batch_size <= 2**16, "training.batch_size", self.batch_size, "in [1, 65536]")
        _require(0 <= self.warmup_steps <= 10**9, "training.warmup_steps", self.warmup_steps, "in [0, 10^9]")
        _require(self.learning_rate > 0, "training.learning_rate", self.learning_rate, "positive")
        _require(0 <= self.ema_decay < 1, "training.ema_decay", self.ema_decay, "in [0, 1)")
        _require(0 <= self.seed < 2**31, "training.seed", self.seed, "in [0, 2^31)")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything `recipes/train.py` needs to know."""

    data: DataSettings = field(default_factory=DataSettings)
    generator: GeneratorSettings = field(default_factory=GeneratorSettings)
    provenance: ProvenanceSettings = field(default_factory=ProvenanceSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    output_dir: str = "runs/digits"
    """Run folder, created if missing; an existing run in it is resumed."""


def flat_settings(settings: Settings) -> dict[str, Any]:
    """Give every setting by its dotted key."""
    flat: dict[str, Any] = {}
    for name, value in asdict(settings).items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise InputError(f"{key} must be {allowed}, got {value}")
