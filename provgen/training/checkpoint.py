"""Checkpoints: one folder per step, parts by name, whole or not there at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from provgen.errors import InputError
from provgen.run import atomic_path, check_seal, read_json, seal
from provgen.training.trainer import CoTrainer

KEPT = 2
"""Newest checkpoints that stay on disk."""


REMEDY = "delete that folder to go back to the checkpoint before, or choose a new output_dir"
"""What to do about a checkpoint that cannot be resumed."""


def save_checkpoint(trainer: CoTrainer, folder: Path, step: int, made_by: Mapping[str, Any]) -> None:
    """Write `folder/step-NNNNNN`, on the main process only, and drop all but the newest checkpoints.

    Args:
        trainer: Networks, their averages and the optimiser.
        folder: Folder of checkpoints.
        step: Steps done.
        made_by: What must be the same to resume: the settings, and the fingerprint of the data.

    Raises:
        InputError: The file system refused; older checkpoints are intact.
    """
    moments = {
        f"{name}/{kind}": value
        for name, parameter in _named_parameters(trainer).items()
        for kind, value in trainer.optimizer.state[parameter].items()
    }
    parts: dict[str, dict[str, Tensor]] = {"optimizer": moments}
    for name, network in trainer.networks.items():
        parts[name] = dict(network.state_dict())
        parts[f"{name}_ema"] = trainer.averaged(name)
    state = {"schema_version": 2, "step": step, "made_by": dict(made_by)}
    with atomic_path(folder / f"step-{step:06d}") as partial:
        partial.mkdir()
        for name, tensors in parts.items():
            # Bytes through Python: safetensors' own writer hides a full disk behind an error of its own.
            contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            (partial / f"{name}.safetensors").write_bytes(save(contiguous))
        (partial / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        seal(partial)
    for old in list_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def resume_latest(trainer: CoTrainer, folder: Path, made_by: Mapping[str, Any]) -> int:
    """Load the newest checkpoint into every process's trainer, and give the steps done; 0 without a checkpoint.

    Raises:
        InputError: The checkpoint belongs to another training set, settings or networks, or is damaged.
    """
    saved = list_checkpoints(folder)
    if not saved:
        return 0
    path = saved[-1]
    check_seal(path, REMEDY)
    state = read_json(path / "state.json", REMEDY)
    step, known = state.get("step"), state.get("made_by")
    if type(step) is not int or step != _step(path) or not isinstance(known, dict):
        raise InputError(f"{path / 'state.json'} is not what was saved, or of another version of provgen; {REMEDY}")
    for key, value in known.items():
        if made_by.get(key, value) != value:
            raise InputError(f"{path} was trained with {key}={value}, now {key}={made_by[key]}; {REMEDY}")
    try:
        _load(trainer, path, step)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} cannot be loaded ({' '.join(str(error).split())[:200]}); {REMEDY}") from error
    return step


def trained_with(folder: Path) -> dict[str, Any]:
    """Give what the newest checkpoint was made by, as `save_checkpoint` was told; nothing without a checkpoint.

    Raises:
        InputError: It is damaged.
    """
    saved = list_checkpoints(folder)
    known = read_json(saved[-1] / "state.json", REMEDY).get("made_by", {}) if saved else {}
    return known if isinstance(known, dict) else {}


def list_checkpoints(folder: Path) -> list[Path]:
    """List finished checkpoints, oldest first; what a kill left half written is not among them, nor copies."""
    finished = (path.parent for path in folder.glob("step-*/state.json"))
    return sorted((path for path in finished if re.fullmatch(r"step-\d{6,}", path.name)), key=_step)


def last_step(folder: Path) -> int:
    """Give the steps that the newest checkpoint has done; 0 without one."""
    return max(map(_step, list_checkpoints(folder)), default=0)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _load(trainer: CoTrainer, path: Path, step: int) -> None:
    for name, network in trainer.networks.items():
        network.load_state_dict(load_file(path / f"{name}.safetensors"))
        averaged = load_file(path / f"{name}_ema.safetensors")
        average = trainer.averages[name]
        average.optimization_step = step
        for (key, _), shadow in zip(network.named_parameters(), average.shadow_params, strict=True):
            shadow.copy_(averaged[key])
    moments = load_file(path / "optimizer.safetensors")
    for name, parameter in _named_parameters(trainer).items():
        # A parameter that no loss reaches has no state: the encoder of a classifier that shares nothing, say.
        if f"{name}/step" in moments:
            trainer.optimizer.state[parameter] = {
                kind: moments[f"{name}/{kind}"].to(parameter.device) for kind in ("step", "exp_avg", "exp_avg_sq")
            }


def _named_parameters(trainer: CoTrainer) -> dict[str, torch.nn.Parameter]:
    return {
        f"{name}.{key}": parameter
        for name, network in trainer.networks.items()
        for key, parameter in network.named_parameters()
    }
