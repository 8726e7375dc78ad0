"""Samples and traces as files: schemas, rows, PNGs that carry their sources, put in place at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from provgen.data.images import save_png
from provgen.data.manifest import Manifest
from provgen.errors import InputError
from provgen.run import RunFolder, read_parquet, replace_path, write_parquet, writing
from provgen.tracing.attribution import Attribution, Explained, Support

SCHEMA_VERSION = 4

TRACE_SCHEMA = pa.schema([
    ("sample", pa.int64()),
    ("rank", pa.int64()),
    ("example_index", pa.int64()),
    ("posterior", pa.float64()),
    ("weight", pa.float64()),
    ("reachable", pa.bool_()),
])  # fmt: skip
"""`rank` counts from 0; `example_index` refers to the train rows of the manifest, `reachable` is theirs: whether the
network can name the example. The closed form names any."""

SAMPLE_SCHEMA = pa.schema([
    ("sample", pa.int64()),
    ("seed", pa.int64()),
    ("class_label", pa.int64()),
    ("entropy", pa.float64()),
    ("commitment_step", pa.int64()),
    ("path", pa.string()),
    ("mass_not_shown", pa.float64()),
    ("step_alpha_bar", pa.list_(pa.float64())),
    ("step_entropy", pa.list_(pa.float64())),
    ("closed_form_entropy", pa.float64()),
    ("closed_form_commitment_step", pa.int64()),
    ("closed_form_step_entropy", pa.list_(pa.float64())),
    ("closed_form_mass_unreachable", pa.float64()),
    ("resamplings", pa.int64()),
    ("support", pa.string()),
    ("explained", pa.float64()),
    ("explained_by_nearest", pa.float64()),
    ("explained_by_class_mean", pa.float64()),
])  # fmt: skip
"""Entropies in nats; null for no class, for no commitment, and for a closed form that was not asked for.
`resamplings`: how often the sample was drawn again from its seed. `closed_form_mass_unreachable`: posterior that the
closed form gives to examples the network cannot name. `support`: copy, mixture, no sources or unknown. `explained`:
share of the sample that training images explain, by their best mixture, by the nearest alone, or by a class mean."""


def trace_rows(attribution: Attribution, samples: Sequence[int], manifest: Manifest) -> list[dict[str, Any]]:
    """Flatten an attribution into rows of TRACE_SCHEMA; `samples` numbers its queries.

    Fewer than k examples may be possible: those of another class, not covered, or not looked at may have no weight, and
    are no sources.
    """
    reachable = manifest.reachable[attribution.example_index]
    rows = []
    for query, sample in enumerate(samples):
        columns = {
            "example_index": attribution.example_index,
            "posterior": attribution.posterior,
            "weight": attribution.weight,
            "reachable": reachable,
        }
        values = zip(*(column[query].tolist() for column in columns.values()), strict=True)
        rows += [
            {"sample": sample, "rank": rank, **dict(zip(columns, row, strict=True))}
            for rank, row in enumerate(values)
            if attribution.weight[query, rank] > 0
        ]
    return rows


def sample_rows(
    attribution: Attribution,
    closed_form: Attribution | None,
    *,
    samples: Sequence[int],
    seeds: Sequence[int],
    class_labels: Sequence[int | None],
    resamplings: Sequence[int],
    paths: Sequence[str],
) -> list[dict[str, Any]]:
    """Make rows of SAMPLE_SCHEMA, one per query."""
    rows = []
    for query, (sample, seed, label, again, path) in enumerate(
        zip(samples, seeds, class_labels, resamplings, paths, strict=True)
    ):
        row = {
            "sample": sample,
            "seed": seed,
            "class_label": label,
            "resamplings": again,
            "path": path,
            **_evidence(attribution, query),
        }
        row["mass_not_shown"] = float(attribution.mass_not_shown[query])
        row["step_alpha_bar"] = attribution.alpha_bar.tolist()
        row |= explained_record(attribution.explained, query)
        if closed_form is not None:
            row |= {f"closed_form_{name}": value for name, value in _evidence(closed_form, query).items()}
            row["closed_form_mass_unreachable"] = float(closed_form.mass_unreachable[query])
        rows.append(row)
    return rows


def write_part(folder: Path, process: int, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    """Write `folder/part-PROCESS.parquet`."""
    table = pa.Table.from_pylist(rows, schema=schema)
    write_parquet(folder / f"part-{process}.parquet", table, version=SCHEMA_VERSION)


def read_parts(folder: Path, sort_by: Sequence[str]) -> list[dict[str, Any]]:
    """Read all parts of a folder as rows in order.

    Raises:
        InputError: There are none, or they were written by another version of provgen.
    """
    parts = sorted(folder.glob("part-*.parquet"))
    if not parts:
        raise InputError(f"nothing in {folder}; run `provgen generate --run {folder.parent}` first")
    table = pa.concat_tables([read_parquet(part, version=SCHEMA_VERSION) for part in parts])
    rows: list[dict[str, Any]] = table.sort_by([(name, "ascending") for name in sort_by]).to_pylist()
    return rows


def source_records(attribution: Attribution, query: int, manifest: Manifest) -> list[dict[str, Any]]:
    """Describe the sources of one query: what the manifest knows of each, with posterior and weight."""
    sources = manifest.sources(attribution.example_index[query])
    pairs = zip(attribution.posterior[query].tolist(), attribution.weight[query].tolist(), strict=True)
    return [
        {**asdict(source), "posterior": round(posterior, 6), "weight": round(weight, 6)}
        for source, (posterior, weight) in zip(sources, pairs, strict=True)
        if weight > 0
    ]


def explained_record(explained: Explained, query: int) -> dict[str, Any]:
    """Give how much of one image is explained, by column."""
    support = explained.support(query)
    shares = {
        "explained": explained.share,
        "explained_by_nearest": explained.by_nearest,
        "explained_by_class_mean": explained.by_class_mean,
    }
    known = {name: None if support is Support.UNKNOWN else float(share[query]) for name, share in shares.items()}
    return {"support": str(support), **known}


def group_traces(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    """Collect TRACE_SCHEMA rows, sorted by sample and rank, under their sample."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["sample"], []).append(row)
    return groups


def _evidence(attribution: Attribution, query: int) -> dict[str, Any]:
    step = int(attribution.commitment_step[query])
    return {
        "entropy": float(attribution.entropy[query]),
        "commitment_step": step if step >= 0 else None,
        "step_entropy": attribution.step_entropy[query].double().tolist(),
    }


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
        resamplings: Sequence[int],
    ) -> None:
        """Write the PNGs of one batch and keep its rows.

        Args:
            images: uint8 (query, channel, height, width).
            attribution: Sources of these images by the network.
            closed_form: Sources by the closed form along the same trajectories, if asked for.
            samples: Their numbers in the whole run.
            seeds: Their seeds.
            class_labels: Their classes; None for no class.
            resamplings: How often each was resampled.
        """
        paths = [f"samples/{sample:05d}.png" for sample in samples]
        for query, path in enumerate(paths):
            text = self._png_text(attribution, query, seeds[query])
            with writing(self.staged.root / path):
                save_png(images[query], self.staged.root / path, text)
        self._samples += sample_rows(
            attribution,
            closed_form,
            samples=samples,
            seeds=seeds,
            class_labels=class_labels,
            resamplings=resamplings,
            paths=paths,
        )
        self._traces += trace_rows(attribution, samples, self.manifest)
        if closed_form is not None:
            self._closed_form_traces += trace_rows(closed_form, samples, self.manifest)

    def close(self) -> None:
        """Write this process's Parquet parts."""
        write_part(self.staged.samples, self.process, self._samples, SAMPLE_SCHEMA)
        write_part(self.staged.traces, self.process, self._traces, TRACE_SCHEMA)
        if self._closed_form_traces:
            folder = self.staged.closed_form_traces
            write_part(folder, self.process, self._closed_form_traces, TRACE_SCHEMA)

    def _png_text(self, attribution: Attribution, query: int, seed: int) -> dict[str, str]:
        sources = source_records(attribution, query, self.manifest)
        return {
            "digitalSourceType": "trainedAlgorithmicMedia",
            "provgen:schema_version": str(SCHEMA_VERSION),
            "provgen:seed": str(seed),
            "provgen:support": attribution.explained.describe(query) or str(Support.UNKNOWN),
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
            with writing(old):
                replace_path(new, old)
        else:
            shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(staged.root)
