"""Samples and traces through files and back; nothing of an earlier call is left."""

import json
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from provgen.data.manifest import Manifest
from provgen.run import RunFolder
from provgen.tracing import records
from provgen.tracing.attribution import Attribution, Explained
from provgen.tracing.records import SampleWriter, staging, staging_folder, start_staging


def explained_of(rows) -> Explained:
    """Shares of every kind in turn: a copy, a mixture, no sources, unknown."""
    turn = rows % 4
    known = Explained(
        share=torch.tensor([1.0, 0.75, 0.125, 0.5])[turn],
        by_nearest=torch.tensor([0.96875, 0.5, 0.0625, 0.25])[turn],
        by_class_mean=torch.tensor([0.375, 0.25, 0.03125, 0.25])[turn],
        nearest=rows % 12,
        least=torch.full((len(rows),), 0.25),
        copy=torch.full((len(rows),), 0.95),
    )
    unknown = Explained.unknown(len(rows))
    names = [name for name in vars(known) if name != "nearest"]
    shares = {name: torch.where(turn == 3, getattr(unknown, name), getattr(known, name)) for name in names}
    return replace(known, **shares)


def attribution_of(count, *, first=0, k=3) -> Attribution:
    """Sources that say which query they belong to."""
    rows = torch.arange(first, first + count)
    posterior = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:k].expand(count, k)
    return Attribution(
        example_index=(rows[:, None] + torch.arange(k)) % 12,
        posterior=posterior,
        weight=posterior / 2,
        mass_not_shown=1 - posterior.sum(1),
        mass_unreachable=rows / (10 * k),
        entropy=rows / 10,
        commitment_step=torch.where(rows % 2 == 0, rows, -1),
        step_entropy=rows[:, None] + torch.tensor([2.0, 1.0]),
        alpha_bar=torch.tensor([0.25, 0.75]),
        explained=explained_of(rows),
    )


@pytest.fixture
def manifest(random_images):
    """Twelve training images, of which the index head covers all but number 4."""
    images = random_images(14)
    whole = Manifest.of(images.select(torch.arange(12)), images.select(torch.arange(12, 14)))
    return whole.with_reachable(torch.tensor([i for i in range(12) if i != 4]))


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "run")


@pytest.fixture
def generate(folder, manifest):
    """Write samples as so many processes would, two at a time, and publish them."""

    def call(num_images, num_processes, *, has_closed_form=False):
        asked = {"num_images": num_images, "closed_form": has_closed_form}
        with staging(folder, writes=True):
            for process in range(num_processes):
                writer = SampleWriter(folder, manifest, process, asked)
                for sample in range(process, num_images, num_processes):
                    writer.add(
                        torch.full((1, 1, 8, 8), sample, dtype=torch.uint8),
                        attribution_of(1, first=sample),
                        attribution_of(1, first=sample, k=2) if has_closed_form else None,
                        samples=[sample],
                        seeds=[100 + sample],
                        class_labels=[sample % 3 if sample else None],
                        resamplings=[sample % 2],
                    )
                writer.close()
            writer.publish()

    return call


def test_traces_come_back_as_they_were_written_by_sample_and_rank(generate, folder):
    generate(11, 3)
    rows = records.read_parts(folder.traces, ["sample", "rank"])
    assert [(row["sample"], row["rank"]) for row in rows] == [(s, r) for s in range(11) for r in range(3)]
    for row in rows:
        posterior = [0.5, 0.25, 0.125][row["rank"]]
        index = (row["sample"] + row["rank"]) % 12
        expected = {"posterior": posterior, "weight": posterior / 2, "reachable": index != 4}
        assert row == {**row, **expected, "example_index": index}


def test_traces_by_the_closed_form_tell_what_the_network_cannot_name(generate, folder):
    generate(5, 1, has_closed_form=True)
    rows = records.read_parts(folder.closed_form_traces, ["sample", "rank"])
    unreachable = [(row["sample"], row["rank"]) for row in rows if not row["reachable"]]
    assert unreachable == [(3, 1), (4, 0)]


def test_samples_come_back_with_their_evidence(generate, folder):
    generate(5, 2, has_closed_form=True)
    rows = records.read_parts(folder.samples, ["sample"])
    assert rows[0]["class_label"] is None
    assert rows[3] == {
        "sample": 3,
        "seed": 103,
        "class_label": 0,
        "entropy": pytest.approx(0.3),
        "commitment_step": None,
        "path": "samples/00003.png",
        "mass_not_shown": 0.125,
        "step_alpha_bar": [0.25, 0.75],
        "step_entropy": [5.0, 4.0],
        "closed_form_entropy": pytest.approx(0.3),
        "closed_form_commitment_step": None,
        "closed_form_step_entropy": [5.0, 4.0],
        "closed_form_mass_unreachable": pytest.approx(0.15),
        "resamplings": 1,
        "support": "unknown",
        "explained": None,
        "explained_by_nearest": None,
        "explained_by_class_mean": None,
    }
    names = ("support", "explained", "explained_by_nearest", "explained_by_class_mean")
    assert [tuple(row[name] for name in names) for row in rows[:3]] == [
        ("copy", 1, 0.96875, 0.375),
        ("mixture", 0.75, 0.5, 0.25),
        ("no sources", 0.125, 0.0625, 0.03125),
    ]
    assert rows[4]["commitment_step"] == rows[4]["closed_form_commitment_step"] == 4
    assert len(records.read_parts(folder.closed_form_traces, ["sample"])) == 10


def test_without_a_closed_form_its_columns_are_null_and_its_folder_is_not_there(generate, folder):
    generate(3, 1)
    for row in records.read_parts(folder.samples, ["sample"]):
        assert row["closed_form_entropy"] is row["closed_form_commitment_step"] is None
        assert row["closed_form_step_entropy"] is row["closed_form_mass_unreachable"] is None
    assert not folder.closed_form_traces.exists()


@pytest.mark.parametrize(("kind", "schema"), [("traces", records.TRACE_SCHEMA), ("samples", records.SAMPLE_SCHEMA)])
def test_files_have_the_schema_and_its_version_even_without_rows(kind, schema, generate, folder):
    generate(1, 3)
    parts = sorted(getattr(folder, kind).glob("part-*.parquet"))
    assert [path.name for path in parts] == [f"part-{process}.parquet" for process in range(3)]
    for part in parts:
        stored = pq.ParquetFile(part).schema_arrow
        assert stored.equals(schema)
        assert stored.metadata[b"schema_version"] == b"5"
    assert (
        schema.names[:5]
        == {
            "traces": ["sample", "rank", "example_index", "posterior", "weight"],
            "samples": ["sample", "seed", "class_label", "entropy", "commitment_step"],
        }[kind]
    )


def test_an_earlier_call_with_more_processes_and_images_leaves_nothing(generate, folder):
    generate(9, 3, has_closed_form=True)
    (folder.samples / "grid.png").write_bytes(b"old")
    generate(4, 1)
    assert [path.name for path in folder.traces.iterdir()] == ["part-0.parquet"]
    assert {path.name for path in folder.samples.iterdir()} == {
        "generation.json", "sha256.json", "part-0.parquet", "traces", *[f"{sample:05d}.png" for sample in range(4)]
    }  # fmt: skip
    assert not folder.closed_form_traces.exists()
    assert not staging_folder(folder).root.exists()


def test_every_part_knows_its_generation_and_those_of_another_are_refused(generate, folder, message_of, tmp_path):
    generate(4, 2)
    first = records.open_generation(folder)
    shutil.copy(folder.traces / "part-1.parquet", tmp_path)
    assert Image.open(folder.samples / "00002.png").text["provgen:generation"] == first
    generate(5, 2)
    second = records.open_generation(folder)
    assert first != second
    assert len(records.read_parts(folder.traces, ["sample", "rank"], second)) == 15
    assert first in message_of(records.read_parts, folder.traces, ["sample", "rank"], first)
    shutil.copy(tmp_path / "part-1.parquet", folder.traces)
    assert "another generation" in message_of(records.read_parts, folder.traces, ["sample", "rank"])
    assert "part-1.parquet is not what was saved" in message_of(records.open_generation, folder)


def test_the_same_question_gives_the_same_generation_whatever_the_number_of_processes(generate, folder):
    ids = []
    for processes in (1, 3):
        generate(4, processes)
        ids.append(records.open_generation(folder))
    assert ids[0] == ids[1]


def test_a_killed_call_leaves_the_samples_of_the_one_before(generate, folder, manifest):
    generate(2, 1)
    before = records.read_parts(folder.samples, ["sample"])
    start_staging(folder)
    writer = SampleWriter(folder, manifest, 0, {})
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    writer.add(image, attribution_of(1), None, samples=[7], seeds=[7], class_labels=[None], resamplings=[0])
    writer.close()
    assert records.read_parts(folder.samples, ["sample"]) == before
    assert not (folder.samples / "00007.png").exists()
    generate(2, 1)
    assert not (folder.samples / "00007.png").exists(), "what the kill left is not published later"


def test_pngs_hold_their_pixels_and_name_their_sources(generate, folder, manifest):
    generate(4, 2)
    with Image.open(folder.samples / "00003.png") as image:
        assert image.getextrema() == (3, 3)
        text = image.text
    assert text["digitalSourceType"] == "trainedAlgorithmicMedia"
    assert text["provgen:seed"] == "103"
    assert text["provgen:data_fingerprint"] == manifest.fingerprint
    sources = json.loads(text["provgen:sources"])
    assert [source["example_index"] for source in sources] == [3, 4, 5]
    assert [source["path"] for source in sources] == ["003.png", "004.png", "005.png"]
    assert [source["posterior"] for source in sources] == [0.5, 0.25, 0.125]
    assert [source["weight"] for source in sources] == [0.25, 0.125, 0.0625]
    assert [source["reachable"] for source in sources] == [True, False, True]
    assert sources[0]["class_name"] == "a"
    assert text["provgen:schema_version"] == "5"
    described = []
    for sample in range(4):
        with Image.open(folder.samples / f"{sample:05d}.png") as image:
            described.append(image.text["provgen:support"])
    assert described == [
        "a copy: 97% explained by one training image alone",
        "75% explained by training images",
        "no sources: 12% explained by training images",
        "unknown",
    ]


def test_reading_what_is_not_there_says_what_to_run(folder, message_of):
    assert "provgen generate" in message_of(records.read_parts, folder.traces, ["sample"])


def test_mass_out_of_reach_is_joined_query_by_query_and_cannot_be_forgotten():
    joined = Attribution.concatenate([attribution_of(2), attribution_of(1, first=7)])
    assert joined.mass_unreachable.tolist() == pytest.approx([0, 1 / 30, 7 / 30])
    fields = {name: value for name, value in vars(joined).items() if name != "mass_unreachable"}
    with pytest.raises(TypeError, match="mass_unreachable"):
        Attribution(**fields)


def test_traces_are_grouped_by_sample_in_their_order(manifest):
    rows = records.trace_rows(attribution_of(3, first=4), [4, 5, 6], manifest)
    groups = records.group_traces(rows)
    assert list(groups) == [4, 5, 6]
    assert [row["rank"] for row in groups[5]] == [0, 1, 2]
    assert [row["example_index"] for row in groups[5]] == [5, 6, 7]


def test_what_is_impossible_is_no_source(manifest):
    posterior = torch.tensor([[0.75, 0.25, 0.0], [1.0, 0.0, 0.0]])
    attribution = replace(attribution_of(2), posterior=posterior, weight=posterior)
    rows = records.trace_rows(attribution, [7, 8], manifest)
    assert [(row["sample"], row["rank"], row["posterior"]) for row in rows] == [
        (7, 0, 0.75),
        (7, 1, 0.25),
        (8, 0, 1.0),
    ]
    assert [len(records.source_records(attribution, query, manifest)) for query in (0, 1)] == [2, 1]
