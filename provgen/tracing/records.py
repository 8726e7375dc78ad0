"""Samples and traces as files: schemas, rows, PNGs that carry their sources, put in place at once."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from provgen.data.images import save_png
from provgen.data.manifest import Manifest
from provgen.errors import InputError
from provgen.run import RunFolder, check_seal, read_json, read_parquet, replace_path, seal, write_parquet, writing
from provgen.tracing.attribution import Attribution, Explained, Support

SCHEMA_VERSION = 5
"""Version 4 had traces beside the samples, and no part knew its generation."""

AGAIN = "run `provgen generate` again"
"""What to do about samples that are damaged or do not belong together."""

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


def write_part(folder: Path, process: int, rows: list[dict[str, Any]], schema: pa.Schema, generation: str) -> None:
    """Write `folder/part-PROCESS.parquet`, which carries the id of its generation."""
    table = pa.Table.from_pylist(rows, schema=schema.with_metadata({"generation": generation}))
    write_parquet(folder / f"part-{process}.parquet", table, version=SCHEMA_VERSION)


def read_parts(folder: Path, sort_by: Sequence[str], generation: str | None = None) -> list[dict[str, Any]]:
    """Read all parts of a folder as rows in order.

    Args:
        folder: Folder of samples or traces.
        sort_by: Columns that rows are sorted by.
        generation: Id that every part must have; None for one that all parts share.

    Raises:
        InputError: There are none, they are damaged, of another version of provgen or of several generations.
    """
    parts = sorted(folder.glob("part-*.parquet"))
    if not parts:
        raise InputError(f"nothing in {folder}; {AGAIN}")
    tables = [read_parquet(part, version=SCHEMA_VERSION) for part in parts]
    wanted = generation
    for part, table in zip(parts, tables, strict=True):
        if not (table.schema.equals(SAMPLE_SCHEMA) or table.schema.equals(TRACE_SCHEMA)):
            raise InputError(f"{part} has not the columns of samples or traces; {AGAIN}")
        found = table.schema.metadata.get(b"generation", b"none").decode()
        wanted = wanted or found
        if found != wanted:
            raise InputError(f"{part} is of another generation of samples ({found}, not {wanted}); {AGAIN}")
    rows: list[dict[str, Any]] = pa.concat_tables(tables).sort_by([(name, "ascending") for name in sort_by]).to_pylist()
    return rows


def generation_id(asked: Mapping[str, Any]) -> str:
    """Name a generation by what was asked for: seed, options, fingerprint of the data, weights."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def open_generation(folder: RunFolder) -> str:
    """Check that the samples of a run are whole, and give the id of their generation.

    Raises:
        InputError: There are none, or they are damaged.
    """
    if not folder.samples.is_dir():
        raise InputError(f"no samples in {folder.root}; run `provgen generate --run {folder.root}` first")
    asked = read_json(folder.generation, AGAIN)
    check_seal(folder.samples, AGAIN)
    return str(asked.get("id"))


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

    def __init__(self, folder: RunFolder, manifest: Manifest, process: int, asked: Mapping[str, Any]) -> None:
        """Write into the staging folder of `folder`.

        Args:
            folder: The run.
            manifest: Its training set.
            process: Number of this process.
            asked: What every process was asked for; the generation is named by it.
        """
        self.folder = folder
        self.staged = staging_folder(folder)
        self.manifest = manifest
        self.process = process
        self.asked, self.generation = dict(asked), generation_id(asked)
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
        staged = self.staged
        write_part(staged.samples, self.process, self._samples, SAMPLE_SCHEMA, self.generation)
        write_part(staged.traces, self.process, self._traces, TRACE_SCHEMA, self.generation)
        if self._closed_form_traces:
            traces = self._closed_form_traces
            write_part(staged.closed_form_traces, self.process, traces, TRACE_SCHEMA, self.generation)

    def publish(self) -> None:
        """Put what all processes have staged in the place of an earlier generation, stale parts and all, at once."""
        about = {"schema_version": SCHEMA_VERSION, "id": self.generation, **self.asked}
        with writing(self.folder.samples):
            self.staged.generation.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
            seal(self.staged.samples)
            replace_path(self.staged.samples, self.folder.samples)

    def _png_text(self, attribution: Attribution, query: int, seed: int) -> dict[str, str]:
        sources = source_records(attribution, query, self.manifest)
        return {
            "digitalSourceType": "trainedAlgorithmicMedia",
            "provgen:schema_version": str(SCHEMA_VERSION),
            "provgen:generation": self.generation,
            "provgen:seed": str(seed),
            "provgen:support": attribution.explained.describe(query) or str(Support.UNKNOWN),
            "provgen:data_fingerprint": self.manifest.fingerprint,
            "provgen:sources": json.dumps(sources, ensure_ascii=False),
        }


def staging_folder(folder: RunFolder) -> RunFolder:
    """Where samples lie until all of them are written."""
    return RunFolder(folder.root / ".generating")


@contextmanager
def staging(folder: RunFolder, *, writes: bool) -> Iterator[None]:
    """Have a staging folder while the block runs; `writes` says whether this process makes it."""
    if writes:
        start_staging(folder)
    try:
        yield
    finally:
        if writes:
            shutil.rmtree(staging_folder(folder).root, ignore_errors=True)


def start_staging(folder: RunFolder) -> None:
    """Make an empty staging folder; what a killed call left in it goes."""
    staged = staging_folder(folder)
    with writing(staged.root):
        if staged.root.is_symlink():
            staged.root.unlink()
        shutil.rmtree(staged.root, ignore_errors=True)
        staged.samples.mkdir(parents=True)
