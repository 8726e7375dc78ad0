"""Writing samples and traces: staged until all of them are there, then put in place at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from provgen.attribution.scores import Attribution
from provgen.data.images import save_png
from provgen.data.manifest import Manifest
from provgen.report import exports
from provgen.run_folder import RunFolder, replace_path


class SampleWriter:
    """One process's share of the samples of a run."""

    def __init__(self, folder: RunFolder, manifest: Manifest, process: int) -> None:
        """Write into the staging folder of `folder` as process number `process`."""
        self.folder = folder
        self.staged = staging_folder(folder)
        self.manifest = manifest
        self.process = process
        self._samples: list[dict[str, Any]] = []
        self._traces: list[dict[str, Any]] = []
        self._closed_form_traces: list[dict[str, Any]] = []

    def add(
        self,
        images: Tensor,
        attribution: Attribution,
        closed_form: Attribution | None,
        *,
        samples: Sequence[int],
        seeds: Sequence[int],
        class_labels: Sequence[int | None],
        redraws: Sequence[int],
    ) -> None:
        """Write the PNGs of one batch and keep its rows.

        Args:
            images: uint8 (query, channel, height, width).
            attribution: Of these images by the network.
            closed_form: Of the same trajectories by the closed form, if asked for.
            samples: Their numbers in the whole run.
            seeds: Their seeds.
            class_labels: Their classes; None for no class.
            redraws: How often each was drawn again.
        """
        paths = [f"samples/{sample:05d}.png" for sample in samples]
        for query, path in enumerate(paths):
            text = self._png_text(attribution, query, seeds[query])
            save_png(images[query], self.staged.root / path, text)
        self._samples += exports.sample_rows(
            attribution,
            closed_form,
            samples=samples,
            seeds=seeds,
            class_labels=class_labels,
            redraws=redraws,
            paths=paths,
        )
        self._traces += exports.trace_rows(attribution, samples, self.manifest)
        if closed_form is not None:
            self._closed_form_traces += exports.trace_rows(closed_form, samples, self.manifest)

    def close(self) -> None:
        """Write this process's Parquet parts."""
        exports.write_part(self.staged.samples, self.process, self._samples, exports.SAMPLE_SCHEMA)
        exports.write_part(self.staged.traces, self.process, self._traces, exports.TRACE_SCHEMA)
        if self._closed_form_traces:
            folder = self.staged.closed_form_traces
            exports.write_part(folder, self.process, self._closed_form_traces, exports.TRACE_SCHEMA)

    def _png_text(self, attribution: Attribution, query: int, seed: int) -> dict[str, str]:
        sources = exports.source_records(attribution, query, self.manifest)
        return {
            "digitalSourceType": "trainedAlgorithmicMedia",
            "provgen:schema_version": exports.SCHEMA_VERSION,
            "provgen:seed": str(seed),
            "provgen:data_fingerprint": self.manifest.fingerprint,
            "provgen:sources": json.dumps(sources, ensure_ascii=False),
        }


def staging_folder(folder: RunFolder) -> RunFolder:
    """Where samples lie until all of them are written."""
    return RunFolder(folder.root / ".generating")


def start_staging(folder: RunFolder) -> None:
    """Make an empty staging folder; what a killed call left in it goes."""
    staged = staging_folder(folder)
    shutil.rmtree(staged.root, ignore_errors=True)
    staged.samples.mkdir(parents=True)


def publish(folder: RunFolder) -> None:
    """Put the staged samples and traces in the place of those of an earlier call, stale parts and all."""
    staged = staging_folder(folder)
    for new, old in (
        (staged.samples, folder.samples),
        (staged.traces, folder.traces),
        (staged.closed_form_traces, folder.closed_form_traces),
    ):
        if new.is_dir():
            replace_path(new, old)
        else:
            shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(staged.root)
