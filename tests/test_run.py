"""Files and folders of a run get there whole, whoever else writes them."""

import os
import subprocess
import sys

import pyarrow as pa
import pytest

from provgen.run import atomic_path, claim_folder, read_parquet, write_parquet

WRITE = """
import sys
from pathlib import Path
from provgen.run import atomic_path

kind, text, root = sys.argv[1], sys.argv[2], Path(sys.argv[3])
for _ in range(200):
    with atomic_path(root / "shared") as partial:
        if kind == "folder":
            partial.mkdir()
            (partial / "first").write_text(text)
            (partial / "second").write_text(text)
        else:
            partial.write_text(text * 1000)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_two_processes_write_one_path_two_hundred_times_each(kind, repository, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    calls = [
        subprocess.Popen([sys.executable, "-c", WRITE, kind, text, str(tmp_path)], env=environment)
        for text in ("abc", "xyz")
    ]
    assert [call.wait() for call in calls] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]
    files = [tmp_path / "shared"] if kind == "file" else sorted((tmp_path / "shared").iterdir())
    texts = [path.read_text() for path in files]
    repeats = 1000 if kind == "file" else 1
    assert texts in ([text * repeats] * len(files) for text in ("abc", "xyz")), "of one process, and whole"


def test_an_error_leaves_what_was_there_and_no_temporary(tmp_path):
    (tmp_path / "note").write_text("old")

    def write_half():
        with atomic_path(tmp_path / "note") as partial:
            partial.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_leftovers_of_killed_calls_go_when_they_are_old(tmp_path):
    names = (".note.1-aa.partial", ".note.2-bb.partial", ".note.3-cc.old", ".other.4-dd.partial", ".note.txt")
    for name in names:
        (tmp_path / name).touch()
        if "2-bb" not in name:
            os.utime(tmp_path / name, (0, 0))
    with atomic_path(tmp_path / "note") as partial:
        partial.write_text("new")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"note", ".note.2-bb.partial", ".other.4-dd.partial", ".note.txt"}, "one may still be written"


def test_a_folder_belongs_to_the_settings_it_was_started_with(tmp_path, message_of):
    claim_folder(tmp_path, {"seed": 1})
    claim_folder(tmp_path, {"seed": 1})
    assert "remove the folder" in message_of(claim_folder, tmp_path, {"seed": 2})


def test_a_setting_that_is_newer_than_a_folder_had_its_default(tmp_path, message_of):
    claim_folder(tmp_path, {"training.seed": 1})
    claim_folder(tmp_path, {"training.seed": 1, "generator.prediction": "epsilon"})
    for newer in ({"generator.prediction": "v_prediction"}, {"invented": 1}):
        assert "remove the folder" in message_of(claim_folder, tmp_path, {"training.seed": 1, **newer})
    assert "remove the folder" in message_of(claim_folder, tmp_path, {"generator.prediction": "epsilon"})


def test_tables_come_back_with_their_types_and_know_their_version(tmp_path, message_of):
    columns = {"name": ["a", None], "value": [0.1, 2.0], "numbers": [[1, 2], []], "is_kept": [True, None]}
    table = pa.table(columns).replace_schema_metadata({"about": "this"})
    path = tmp_path / "table.parquet"
    write_parquet(path, table, version=3)
    found = read_parquet(path, version=3)
    assert found.to_pydict() == columns
    assert found.schema.equals(table.schema)
    assert found.schema.metadata[b"about"] == b"this"
    assert read_parquet(path, version=3, columns=["value"]).column_names == ["value"]

    def read(version):
        return read_parquet(path, version=version)

    assert "has schema version 3, this provgen reads 4" in message_of(read, 4)
    path.write_bytes(path.read_bytes()[:100])
    assert "not a whole Parquet file" in message_of(read, 3)
