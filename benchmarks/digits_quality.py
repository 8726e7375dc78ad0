"""How good is the provenance network on digits, and what does it do to the generator?

    python benchmarks/digits_quality.py --output runs/digits_quality

Trains recipes/digits.yaml with the provenance network (default: joint gradient) and without, over several
seeds; resumable. Prints the KL gap and top-1 against the closed form, and the held-out denoising loss of the
two generators as a paired difference with its t interval over seeds.
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from scipy import stats
from torch import Tensor

from provgen import build, cli, evaluation
from provgen.generators.losses import generator_losses
from provgen.run import RunFolder
from provgen.settings_file import load_settings
from provgen.training.checkpoint import list_checkpoints, resume_latest
from provgen.training.logging import read_metrics

DRAWS = 100


def main(
    output: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/digits_quality"),
    seeds: Annotated[int, typer.Option(min=2, help="Training seeds 0, 1, ...")] = 3,
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
) -> None:
    """Train, measure, print."""
    losses: dict[str, list[float]] = {"class_independent": [], "none": []}
    for seed in range(seeds):
        for head in losses:
            run = RunFolder(output / f"{head}-{seed}")
            train(run, [f"provenance.index_head={head}", f"training.seed={seed}", *(overrides or [])])
            losses[head].append(float(holdout_losses(run).mean()))
        report_index(RunFolder(output / f"class_independent-{seed}"), seed)
    report_pairs(losses["class_independent"], losses["none"])


def train(run: RunFolder, settings: list[str]) -> None:
    """Train one run, unless it has finished."""
    config = cli.recipes_folder() / "digits.yaml"
    arguments = [*settings, f"output_dir={run.root}"]
    done = list_checkpoints(run.checkpoints)
    if not done or done[-1].name != f"step-{load_settings(config, arguments).training.max_steps:06d}":
        cli.load_recipe("train")(config=config, overrides=arguments)


def holdout_losses(run: RunFolder) -> Tensor:
    """Denoising loss of the averaged denoiser on each held-out image."""
    settings = load_settings(run.config, [])
    accelerator = build.make_accelerator(settings)
    data = build.open_data(settings, run)
    trainer = build.make_trainer(settings, data, accelerator)
    resume_latest(trainer, run.checkpoints, build.made_by(settings, data))
    generator = evaluation.averaged_generator(trainer)
    return generator_losses(generator, data.holdout, draws=DRAWS, seed=0).mean(dim=1)


def report_index(run: RunFolder, seed: int) -> None:
    """Print the index metrics of the last evaluation."""
    last: dict[str, Any] = [row for row in read_metrics(run.metrics) if "index_quality" in row][-1]
    for rows in ("conditional", "unconditional"):
        level = min((q for q in last["index_quality"] if q["rows"] == rows), key=lambda q: abs(q["alpha_bar"] - 0.9))
        print(
            f"seed {seed}, step {last['step']}, {rows} rows: mean KL gap {last[f'kl_gap_{rows}']:.3f} nats; top-1 at "
            f"alpha_bar={level['alpha_bar']:.2f} {level['top1']:.3f} of ceiling {level['top1_ceiling']:.3f}"
        )


def report_pairs(joint: list[float], alone: list[float]) -> None:
    """Print the paired relative difference of held-out denoising losses."""
    relative = torch.tensor([with_it / without - 1 for with_it, without in zip(joint, alone, strict=True)])
    mean, error = float(relative.mean()), float(relative.std()) / len(relative) ** 0.5
    half = error * float(stats.t.ppf(0.975, len(relative) - 1))
    print("held-out denoising loss, with: " + ", ".join(f"{loss:.5f}" for loss in joint))
    print("held-out denoising loss, without: " + ", ".join(f"{loss:.5f}" for loss in alone))
    print(f"paired difference {mean:+.2%} [{mean - half:+.2%}, {mean + half:+.2%}] over {len(relative)} seeds")


if __name__ == "__main__":
    cli.run(main)
