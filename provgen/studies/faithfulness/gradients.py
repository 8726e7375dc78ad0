"""Attribution by gradients of the trained generator: dot products, and TRAK and D-TRAK in exact dual form."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, grad, vmap

from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.data.random import Stream, seeded_generator
from provgen.errors import InputError
from provgen.models.diffusion import denoiser_target
from provgen.run import atomic_path, read_json
from provgen.studies.faithfulness.attributor import Cache, Queries
from provgen.studies.faithfulness.baselines import UntunedScores
from provgen.tracing.calibrate import AttributionScores

Target = Literal["own", "zero"]

IMAGES_AT_ONCE = 32

TIMESTEPS_AT_ONCE = {"vectorised": 10, "one by one": 100}
"""Noise levels in one pass; more are added up."""

PROJECTION_SEED = 0


class RandomProjection:
    """Adds every feature, with a random sign, to a random one of fewer columns.

    Inner products are kept in expectation: E<Sa, Sb> = <a, b>, with variance of order |a|^2 |b|^2 / proj_dim (Charikar
    et al. 2002; Weinberger et al. 2009, arXiv 0902.2206). A dense Gaussian projection has the same order at a cost
    times the number of columns.
    """

    def __init__(self, num_features: int, proj_dim: int, *, seed: int, device: torch.device) -> None:
        """Draw a column of `proj_dim` and a sign for each of `num_features` numbers."""
        generator = torch.Generator().manual_seed(seed)
        self.columns = torch.randint(proj_dim, (num_features,), generator=generator).to(device)
        self.signs = (torch.randint(2, (num_features,), generator=generator) * 2 - 1).to(device)
        self.proj_dim = proj_dim

    def __call__(self, features: Tensor) -> Tensor:
        """Project (query, feature) to (query, proj_dim)."""
        projection = features.new_zeros(len(features), self.proj_dim)
        return projection.index_add_(1, self.columns, features * self.signs)


class LossGradients:
    """The gradient with respect to all parameters of an image's loss, averaged over noise levels.

    Target `own`: the training loss, as TRAK for diffusion takes it. Target `zero`: the mean square of the
    denoiser's output, which is D-TRAK (Zheng et al. 2024, arXiv 2311.00500). Their timesteps are 0, 1000/K, 2 x 1000/K,
    ...; the noise of a timestep is here the same for all images, so that an image does not depend on its batch.
    """

    def __init__(
        self, unet: UNet2DModel, scheduler: DDPMScheduler, *, target: Target, num_timesteps: int, seed: int
    ) -> None:
        """Take a denoiser in evaluation mode; `num_timesteps` K divides the training timesteps, `seed` is of noise."""
        steps = scheduler.config.num_train_timesteps
        assert steps % num_timesteps == 0
        self.unet, self.scheduler, self.target, self.seed = unet, scheduler, target, seed
        self.device: torch.device = unet.device
        self.timesteps = torch.arange(0, steps, steps // num_timesteps, device=unet.device)
        self.parameters = {name: p.detach() for name, p in unet.named_parameters()}
        self.size = sum(p.numel() for p in self.parameters.values())
        # On a CPU the many levels of one image fill a pass; grouped convolutions over images too are slower.
        self.way = "one by one" if unet.device.type == "cpu" else "vectorised"

    def __call__(self, images: Tensor, class_labels: Tensor) -> Tensor:
        """Give float32 (query, parameter) for images (query, channel, height, width) with labels (query,)."""
        total = images.new_zeros(len(images), self.size)
        for timesteps in self.timesteps.split(TIMESTEPS_AT_ONCE[self.way]):
            noise = torch.stack([self._noise(int(timestep), images) for timestep in timesteps])
            mean = self._mean_gradients(images, class_labels, timesteps, noise)
            total += mean * (len(timesteps) / len(self.timesteps))
        return total

    def fingerprint(self) -> dict[str, str | int]:
        """Say everything that the gradients depend on."""
        weights = hashlib.sha256()
        for name, parameter in self.parameters.items():
            weights.update(name.encode())
            weights.update(parameter.cpu().numpy().tobytes())
        return {
            "weights": weights.hexdigest(),
            "target": self.target,
            "num_timesteps": len(self.timesteps),
            "noise_seed": self.seed,
        }

    def _mean_gradients(self, images: Tensor, class_labels: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """Give the gradient (query, parameter) of every image's mean loss over some timesteps."""
        gradient = grad(self._loss)
        if self.way == "vectorised":
            over_images = vmap(gradient, in_dims=(None, 0, 0, None, None))
            by_name = over_images(self.parameters, images, class_labels, timesteps, noise)
            return torch.cat([by_name[name].flatten(1) for name in self.parameters], dim=1)
        pairs = zip(images, class_labels, strict=True)
        each = [gradient(self.parameters, image, label, timesteps, noise) for image, label in pairs]
        return torch.stack([torch.cat([g[name].flatten() for name in self.parameters]) for g in each])

    def _loss(
        self, parameters: dict[str, Tensor], image: Tensor, label: Tensor, timesteps: Tensor, noise: Tensor
    ) -> Tensor:
        """Give the mean over timesteps (step,) of one image's loss."""
        noisy = self.scheduler.add_noise(image.expand_as(noise), noise, timesteps)
        labels = {"class_labels": label.expand(len(timesteps))}
        output = functional_call(self.unet, parameters, (noisy, timesteps), labels).sample
        if self.target == "zero":
            target = torch.zeros_like(noise)
        else:
            target = denoiser_target(self.scheduler, image.expand_as(noise), noise, timesteps)
        loss: Tensor = (output - target).square().mean()
        return loss

    def _noise(self, timestep: int, images: Tensor) -> Tensor:
        """Draw (channel, height, width)."""
        generator = seeded_generator(self.seed, Stream.GRADIENT, timestep)
        noise: Tensor = randn_tensor(images.shape[1:], generator=generator, device=images.device, dtype=images.dtype)
        return noise


class GradientStore:
    """float32 rows of features, of which the first `done` are there.

    A folder with `features.npy` and `state.json`; the state also says what the features are of, so that a store of
    another network or of other settings is started again and never mixed with this one.
    """

    def __init__(self, folder: Path, *, shape: tuple[int, int], fingerprint: Mapping[str, str | int]) -> None:
        """Open the store of features (train, feature), or start a new one; `fingerprint` is all that they depend on."""
        self.folder, self.shape = folder, shape
        self.fingerprint = {"schema_version": 1, "shape": list(shape), **fingerprint}
        self.done, self.seconds_before = self._read_state()
        folder.mkdir(parents=True, exist_ok=True)
        if not self.done:
            # First, or a kill before the first batch would leave the state of other features beside empty rows.
            self._write_state(0, 0.0)
        path, mode = folder / "features.npy", "r+" if self.done else "w+"
        self._rows: NDArray[np.float32] = np.lib.format.open_memmap(path, mode=mode, dtype=np.float32, shape=shape)

    def fill(self, make_rows: Callable[[int, int], Tensor], *, batch_size: int) -> None:
        """Make what is missing: `make_rows(start, stop)` gives the features (stop - start, feature)."""
        begun = time.perf_counter()
        for start in range(self.done, self.shape[0], batch_size):
            stop = min(start + batch_size, self.shape[0])
            self._rows[start:stop] = make_rows(start, stop).cpu().numpy()
            self._rows.flush()  # type: ignore[attr-defined]  # a memory map
            self._write_state(stop, self.seconds_before + time.perf_counter() - begun)

    def rows(self, start: int, stop: int) -> Tensor:
        """Read features into memory, (stop - start, feature) or up to the last one."""
        return torch.from_numpy(np.array(self._rows[start:stop]))

    def products(self, features: Tensor, *, rows_at_once: int = 256) -> Tensor:
        """Give inner products in float64 of features (query, feature) with all rows: (query, train)."""
        starts = range(0, self.shape[0], rows_at_once)
        return torch.cat([features.double() @ self.rows(n, n + rows_at_once).double().T for n in starts], dim=1)

    def gram(self, *, rows_at_once: int = 256) -> Tensor:
        """Give the inner products of all rows with one another, float64 (train, train)."""
        starts = range(0, self.shape[0], rows_at_once)
        return torch.cat([self.products(self.rows(n, n + rows_at_once)) for n in starts])

    def num_bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def _read_state(self) -> tuple[int, float]:
        """Read how many rows are there, and the seconds that were spent on them."""
        try:
            state = read_json(self.folder / "state.json", "")
        except InputError:
            return 0, 0.0  # it is made again
        wanted = {"fingerprint": self.fingerprint, "done": state.get("done"), "seconds": state.get("seconds")}
        is_ours = state == wanted and type(state["done"]) is int and (self.folder / "features.npy").is_file()
        return (state["done"], float(state["seconds"])) if is_ours else (0, 0.0)

    def _write_state(self, done: int, seconds: float) -> None:
        with atomic_path(self.folder / "state.json") as partial:
            state = {"fingerprint": self.fingerprint, "done": done, "seconds": seconds}
            partial.write_text(json.dumps(state) + "\n", encoding="utf-8")
        self.done = done


class GradientFeatures:
    """Projected loss gradients of training images, kept on disk, and of queries.

    A generated image is treated like any other: noised again.
    """

    def __init__(self, gradients: LossGradients, folder: Path, *, proj_dim: int | None) -> None:
        """Keep features in `folder`; a random projection to `proj_dim` of None keeps gradients exact and large."""
        self.gradients, self.folder = gradients, folder
        self.width = proj_dim or gradients.size
        self.projection = None
        if proj_dim is not None:
            size, device = gradients.size, gradients.device
            self.projection = RandomProjection(size, proj_dim, seed=PROJECTION_SEED, device=device)

    def fit(self, train: ImageSet) -> None:
        """Make, or finish, the features of the training images."""

        def make_rows(start: int, stop: int) -> Tensor:
            rows = slice(start, stop)
            return self.project(to_unit_range(train.images[rows]), train.labels[rows])

        self.store = GradientStore(self.folder, shape=(len(train), self.width), fingerprint=self._fingerprint(train))
        self.store.fill(make_rows, batch_size=IMAGES_AT_ONCE)

    def products(self, queries: Queries) -> Tensor:
        """Give inner products of queries and training images, float64 (query, train)."""
        batches = zip(queries.images.split(IMAGES_AT_ONCE), queries.class_labels.split(IMAGES_AT_ONCE), strict=True)
        return torch.cat([self.store.products(self.project(*batch)) for batch in batches])

    def kept(self) -> Cache:
        """The store."""
        return Cache(num_bytes=self.store.num_bytes(), seconds=self.store.seconds_before)

    def project(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give the features (query, feature) of images in [-1, 1] with labels (query,), on the CPU."""
        device = self.gradients.device
        gradients = self.gradients(images.to(device), labels.to(device))
        return (gradients if self.projection is None else self.projection(gradients)).cpu()

    def _fingerprint(self, train: ImageSet) -> dict[str, str | int]:
        images = hashlib.sha256()
        for tensor in (train.images, train.labels):
            images.update(tensor.cpu().numpy().tobytes())
        fingerprint = self.gradients.fingerprint()
        return fingerprint | {"images": images.hexdigest(), "projection_seed": PROJECTION_SEED}


class GradientMethod:
    """A method on gradients that are kept."""

    def __init__(self, features: GradientFeatures) -> None:
        self.features = features

    def fit(self, train: ImageSet) -> None:
        """Make the features."""
        self.features.fit(train)

    def kept(self) -> Cache:
        """Gradients."""
        return self.features.kept()


class GradientDot(GradientMethod, UntunedScores):
    """Inner products of gradients (TracIn with one checkpoint, Pruthi et al. 2020, arXiv 2002.08484)."""

    def scores(self, queries: Queries) -> Tensor:
        """Multiply."""
        return self.features.products(queries)


@dataclass(frozen=True)
class Ridge:
    """The ridge of a kernel matrix."""

    share: float
    """In units of the mean diagonal: the published values depend on the projection's scale."""

    def __str__(self) -> str:
        return f"lambda={self.share:g}"


RIDGES = tuple(map(Ridge, (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)))


class Trak(GradientMethod):
    """tau(q, i) = phi_q (Phi^T Phi + lambda I)^-1 phi_i (Park et al. 2023, arXiv 2303.14186), lambda tuned.

    TRAK or D-TRAK by the gradients it is given. The dual form phi_q Phi^T (Phi Phi^T + lambda I)^-1 is the same
    number from a (train, train) matrix, in float64: in float32 the primal form loses small lambdas.
    """

    settings = RIDGES

    def fit(self, train: ImageSet) -> None:
        """Make the features, and diagonalise their kernel matrix once for every lambda."""
        super().fit(train)
        self.values, self.vectors = torch.linalg.eigh(self.features.store.gram())

    def attribute(self, queries: Queries, only: Ridge | None = None) -> AttributionScores[Ridge]:  # noqa: ARG002 - all settings take no longer
        """Solve for every lambda."""
        turned = self.features.products(queries) @ self.vectors
        shares = torch.tensor([ridge.share for ridge in RIDGES])
        inverses = 1 / (self.values + shares[:, None] * self.values.mean())
        return AttributionScores.in_a_row([self._scores(turned, inverse) for inverse in inverses], RIDGES)

    def _scores(self, turned: Tensor, inverse: Tensor) -> Tensor:
        """Give (query, train) from products with eigenvectors (query, eigenvector) and inverse eigenvalues."""
        scores: Tensor = (turned * inverse) @ self.vectors.T
        return scores


class DasWithoutResidual(Trak):
    """DAS (Lin et al., ICLR 2025, arXiv 2410.18639) without its residual; on TRAK's gradients it is TRAK squared.

    It is what the variance of a linear model in the gradients grows by at the query without example i: with
    alpha = phi_q Phi^T B of TRAK and B = (Phi Phi^T + lambda I)^-1 that is alpha_i^2 / B_ii.
    """

    def _scores(self, turned: Tensor, inverse: Tensor) -> Tensor:
        scores: Tensor = super()._scores(turned, inverse).square() / (self.vectors.square() @ inverse)
        return scores
