"""What methods are tuned on and what is reported of them: subset models and queries, split once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from provgen.analysis.datamodeling import datamodeling_scores, predicted_outputs
from provgen.attribution.attributor import AttributionScores
from provgen.errors import InputError
from provgen.run_folder import atomic_path


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which subset models and queries methods are tuned on, and which are reported."""

    subsets: Tensor
    """bool (subset,), true for calibration."""
    queries: Tensor
    """bool (query,), true for calibration."""

    @classmethod
    def draw(cls, num_subsets: int, num_queries: int, *, calibration: int, seed: int) -> Split:
        """Take `calibration` subsets, and the same share of the queries, at least one of either and not all.

        Raises:
            InputError: Fewer than two subsets are left to report.
        """
        if not 2 <= calibration <= num_subsets - 2:
            raise InputError(
                f"{num_subsets} subset models cannot be split into {calibration} for calibration and 2 or more to "
                "report; train more with `provgen retrain`, or choose another --calibration-subsets"
            )
        share = max(1, num_queries * calibration // num_subsets)
        generator = torch.Generator().manual_seed(seed)
        subsets, queries = (torch.randperm(n, generator=generator) for n in (num_subsets, num_queries))
        return cls(subsets=subsets < calibration, queries=queries < share)


def tune(scores: AttributionScores, masks: Tensor, outputs: Tensor, split: Split) -> str:
    """Choose the setting with the largest mean LDS on the calibration half.

    Args:
        scores: Of all queries.
        masks: bool (subset, train), of all subsets.
        outputs: (query, subset), minus the losses.
        split: What may be looked at.
    """
    wanted = outputs[split.queries][:, split.subsets]
    means = [
        float(datamodeling_scores(predicted_outputs(v[split.queries], masks[split.subsets]), wanted).mean())
        for v in scores.values
    ]
    return scores.settings[max(range(len(means)), key=means.__getitem__)]


def reported(scores: Tensor, masks: Tensor, split: Split) -> Tensor:
    """Predict the outputs that are reported, float64 (query, subset), from scores (query, train)."""
    return predicted_outputs(scores[~split.queries], masks[~split.subsets])


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What calibration chose for generated queries, and what it may have looked at."""

    calibration_queries: Sequence[int]
    """Numbers of the queries."""
    timesteps: Sequence[int]
    """Of gradient methods."""
    settings: Mapping[str, str]
    """By method."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        content = {
            "schema_version": 1,
            "calibration_queries": list(self.calibration_queries),
            "timesteps": list(self.timesteps),
            "settings": dict(self.settings),
        }
        with atomic_path(path) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Tuned:
        """Read it.

        Raises:
            InputError: It is not there.
        """
        if not path.is_file():
            raise InputError(f"{path} is missing; run `provgen faithfulness` first")
        content = json.loads(path.read_text(encoding="utf-8"))
        names = ("calibration_queries", "timesteps", "settings")
        return cls(**{name: content[name] for name in names})

    def require(self, methods: Sequence[str]) -> None:
        """Refuse methods that were not tuned.

        Raises:
            InputError: Names the first, and those that were.
        """
        unknown = [name for name in methods if name not in self.settings]
        if unknown:
            raise InputError(f"unknown method {unknown[0]!r}; tuned are: {'; '.join(self.settings)}")
