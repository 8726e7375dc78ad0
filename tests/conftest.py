"""Tiny but real runs: an 8x8 digits subset, the smallest denoiser, few steps."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDIMScheduler

from provgen import build
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.errors import InputError
from provgen.evaluation import NetworkPosterior
from provgen.generators.closed_form import ClosedFormPosterior
from provgen.generators.diffusion import DiffusionGenerator
from provgen.generators.protocol import Generator
from provgen.models.diffusion import (
    encoder_shapes,
    make_denoiser,
    make_sampling_scheduler,
    make_training_scheduler,
)
from provgen.models.provenance import ProvenanceNetwork
from provgen.run import RunFolder
from provgen.settings_file import load_settings

TINY = (
    "data.max_train_images=40",
    "data.holdout_fraction=0.01",
    "generator.size=tiny",
    "provenance.width=16",
    "training.max_steps=20",
    "training.batch_size=16",
    "training.warmup_steps=5",
    "training.log_every=5",
    "training.evaluate_every=1000",
    "training.checkpoint_every=10",
)

# On a busy machine two threads spin a hundred times longer on these tiny tensors than one computes.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository():
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def expected_coverage():
    """Coverage of two sets of the same distribution, whatever it is (Naeem et al. 2020)."""

    def call(num_generated: int, num_reference: int, k: int = 5) -> float:
        j = torch.arange(1, k + 1, dtype=torch.float64)
        missed = (num_reference - j) / (num_generated + num_reference - j)
        return float(1 - missed.prod())

    return call


@pytest.fixture
def message_of():
    """Call something that must refuse its input; return the message, which must be one line."""

    def call(function, *args, **kwargs) -> str:
        with pytest.raises(InputError) as caught:
            function(*args, **kwargs)
        message = str(caught.value)
        assert len(message.splitlines()) == 1
        assert ";" in message or "," in message, "says what is allowed or what to do"
        return message

    return call


@pytest.fixture(scope="session")
def mean_over_ratios():
    """Average posteriors (query, train) at noise levels over the log signal-to-noise ratio, by numpy."""

    def average(alpha_bars, probs):
        places = np.log(np.array(alpha_bars)) - np.log1p(-np.array(alpha_bars))
        integral = np.trapezoid(np.stack([np.asarray(rows) for rows in probs]), places, axis=0)
        return torch.from_numpy(integral / (places[-1] - places[0])).to(probs[0])

    return average


@pytest.fixture(scope="session")
def tiny_overrides():
    """Overrides of the defaults that make a run of a second."""
    return TINY


@pytest.fixture(scope="session")
def tiny_settings():
    """Make the settings of such a run, with further overrides."""
    return lambda *overrides: load_settings(None, [*TINY, *overrides])


@pytest.fixture(scope="session")
def tiny_data(tiny_settings, tmp_path_factory):
    """Images and manifest of such a run: 40 digits."""
    return build.open_data(tiny_settings(), RunFolder(tmp_path_factory.mktemp("no_run")))


@pytest.fixture(scope="session")
def random_images():
    """Make a set of independent uniform pixels, labels in turn."""

    def make(count, *, num_classes=3, channels=1, size=8, seed=0) -> ImageSet:
        draws = torch.Generator().manual_seed(seed)
        shape = (count, channels, size, size)
        return ImageSet(
            images=torch.randint(0, 256, shape, generator=draws, dtype=torch.uint8),
            labels=torch.arange(count) % max(num_classes, 1),
            class_names=tuple("abcdefghij"[:num_classes]),
            paths=tuple(f"{i:03d}.png" for i in range(count)),
            sha256=tuple(f"{i:064d}" for i in range(count)),
            contributors=(None,) * count,
            licenses=(None,) * count,
        )

    return make


@pytest.fixture(scope="session")
def closed_form_of():
    """Make the closed form over a set of images, in float64."""

    def make(images: ImageSet, dtype=torch.float64) -> ClosedFormPosterior:
        pixels = to_unit_range(images.images, dtype)
        return ClosedFormPosterior(pixels, images.labels, null_label=images.num_classes)

    return make


@pytest.fixture(scope="session")
def tiny_networks():
    """Make a denoiser and a provenance network for a set of images, every weight random.

    `head` gives the kind of index head and its own arguments; `shared_stages` None shares all feature maps.
    """

    def make(images: ImageSet, *, seed=0, head=None, shared_stages=None, covered=None, **more) -> tuple:
        channels, size = images.images.shape[1:3]
        shapes = encoder_shapes("tiny", size, channels)
        covered = torch.arange(len(images)) if covered is None else covered
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            denoiser = make_denoiser("tiny", image_size=size, image_channels=channels, num_classes=images.num_classes)
            provenance = ProvenanceNetwork(
                stages=[list(shape) for shape in shapes],
                shared_stages=len(shapes) - 1 if shared_stages is None else shared_stages,
                head=head or {"kind": "ClassIndependentHead"},
                num_examples=len(images),
                num_covered=len(covered),
                num_classes=images.num_classes,
                **{"width": 16, "has_class_head": images.num_classes > 0, **more},
            )
            provenance.start(to_unit_range(images.images), images.labels, covered)
            # Embeddings start at zero, and a network that says nothing would pass many a test.
            for parameter in provenance.index_head.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.1)
        return denoiser.eval(), provenance.eval()

    return make


@pytest.fixture(scope="session")
def tiny_posterior(tiny_networks):
    """Make the posterior of such networks."""

    def make(images: ImageSet, **more) -> NetworkPosterior:
        denoiser, provenance = tiny_networks(images, **more)
        scheduler = make_sampling_scheduler(make_training_scheduler("linear"))
        return NetworkPosterior(DiffusionGenerator(network=denoiser, scheduler=scheduler), provenance)

    return make


@pytest.fixture(scope="session")
def generator_of(tiny_settings):
    """Make a generator of a kind for a set of images, with random weights that do not train."""

    def make(kind: str, images: ImageSet, *overrides: str) -> Generator:
        settings = tiny_settings(f"generator.kind={kind}", *overrides)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = build.make_network(settings, images).eval().requires_grad_(requires_grad=False)
        return build.make_generator(settings, images, network)

    return make


@pytest.fixture(scope="session")
def alphas_cumprod():
    return make_training_scheduler("linear").alphas_cumprod


@pytest.fixture(scope="session")
def sampler_of():
    """Make a sampler of so many steps, apart from any generator's."""

    def make(num_inference_steps: int) -> DDIMScheduler:
        scheduler = make_sampling_scheduler(make_training_scheduler("linear"))
        scheduler.set_timesteps(num_inference_steps)
        return scheduler

    return make


@pytest.fixture
def new_accelerator():
    """Make accelerators of different precision in one process."""

    def make(mixed_precision="no") -> Accelerator:
        forget_accelerators()
        return Accelerator(cpu=True, mixed_precision=mixed_precision)

    yield make
    forget_accelerators()


@pytest.fixture
def accelerator(new_accelerator):
    return new_accelerator()


def forget_accelerators() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def run_recipe(tmp_path_factory, repository):
    """Run a copy of a recipe in this process, as `python COPY ARGUMENTS` would; return the exit status."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "data").mkdir()

    def call(name: str, *arguments: object) -> int:
        copy = folder / f"{name}.py"
        copy.write_bytes((repository / "recipes" / f"{name}.py").read_bytes())
        forget_accelerators()
        before = sys.argv
        sys.argv = [str(copy), *map(str, arguments)]
        try:
            with pytest.raises(SystemExit) as caught:
                runpy.run_path(str(copy), run_name="__main__")
        finally:
            sys.argv = before
            forget_accelerators()
        return int(caught.value.code or 0)

    return call


@pytest.fixture(scope="session")
def root_of(tmp_path_factory, run_recipe):
    """Give the folder of a run of 20 steps on 40 digits of a kind of generator; copy it before writing into it."""
    roots = {}

    def call(kind: str) -> Path:
        if kind not in roots:
            root = tmp_path_factory.mktemp("trained") / "run"
            assert run_recipe("train", *TINY, f"generator.kind={kind}", f"output_dir={root}") == 0
            roots[kind] = root
        return roots[kind]

    return call


@pytest.fixture(scope="session")
def trained_of(root_of):
    """Open such a run; its pipeline keeps no state between calls."""
    opened = {}

    def call(kind: str) -> build.TrainedRun:
        if kind not in opened:
            opened[kind] = build.open_trained_run(root_of(kind), torch.device("cpu"))
            opened[kind].pipeline.set_progress_bar_config(disable=True)
        return opened[kind]

    return call


@pytest.fixture(scope="session")
def trained_root(root_of):
    """Folder of such a run of a denoiser."""
    return root_of("diffusion")


@pytest.fixture(scope="session")
def trained(trained_of):
    """That run opened."""
    return trained_of("diffusion")
