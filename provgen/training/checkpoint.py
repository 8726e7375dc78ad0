"""Checkpoints: one folder per step, parts by name, whole or not there at all."""

from __future__ import annotations

import json
import shutil
from json import JSONDecodeError
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from provgen.errors import InputError
from provgen.run import atomic_path
from provgen.training.trainer import CoTrainer

KEPT = 2
"""Newest checkpoints that stay on disk."""


def save_checkpoint(trainer: CoTrainer, folder: Path, step: int, fingerprint: str) -> None:
    """Write `folder/step-NNNNNN`, on the main process only, and drop all but the newest checkpoints.

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
    state = {"schema_version": 1, "step": step, "fingerprint": fingerprint}
    with atomic_path(folder / f"step-{step:06d}") as partial:
        partial.mkdir()
        for name, tensors in parts.items():
            # Bytes through Python: safetensors' own writer hides a full disk behind an error of its own.
            contiguous = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            (partial / f"{name}.safetensors").write_bytes(save(contiguous))
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for old in list_checkpoints(folder)[:-KEPT]:
        shutil.rmtree(old)


def resume_latest(trainer: CoTrainer, folder: Path, fingerprint: str) -> int:
    """Load the newest checkpoint into every process's trainer, and give the steps done; 0 without a checkpoint.

    Raises:
        InputError: The checkpoint belongs to another training set or other networks, or is damaged.
    """
    saved = list_checkpoints(folder)
    if not saved:
        return 0
    path = saved[-1]
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if state["fingerprint"] != fingerprint:
            raise InputError(f"{path} was trained on other images or labels; restore them or choose a new output_dir")
        _load(trainer, path, state["step"])
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError, JSONDecodeError) as error:
        raise InputError(
            f"{path} cannot be loaded ({' '.join(str(error).split())[:200]}); "
            "delete it to go back to the one before, or choose a new output_dir"
        ) from error
    return int(state["step"])


def list_checkpoints(folder: Path) -> list[Path]:
    """List finished checkpoints, oldest first; what a kill left half written is not among them."""
    finished = (path.parent for path in folder.glob("step-*/state.json"))
    return sorted(finished, key=lambda path: int(path.name.removeprefix("step-")))


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
