"""A store of results: rows come back as they were saved, before and after they are compacted, by one or by several."""

import threading

import numpy as np
import pytest

from provgen.studies import jobs
from provgen.studies.jobs import ResultStore


@pytest.fixture
def store(tmp_path):
    return ResultStore(tmp_path / "results", ("method", "seed"))


def row_of(method, seed, **more):
    return {"method": method, "seed": seed, "loss": 1 / (seed + 3), **more}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, np.ndarray):
            assert found[name].dtype == value.dtype
            assert np.array_equal(found[name], value)
        else:
            assert found[name] == value


def test_rows_come_back_bit_for_bit_with_axes_and_types(store, generator):
    assert store.rows() == {}
    assert store.saved_keys() == set()
    arrays = {
        "single": np.random.default_rng(0).normal(size=7).astype(np.float32),
        "double": np.random.default_rng(1).normal(size=(3, 5)),
        "image": np.arange(24, dtype=np.uint8).reshape(2, 3, 2, 2),
        "steps": np.array([-1, 70_000]),
        "mask": np.array([True, False]),
        "nothing": np.empty(0, np.uint32),
    }
    rows = [row_of("D-TRAK, 10", 1, **arrays), row_of("D-TRAK, 10", 0, single=np.ones(2, np.float32)), row_of("a", 2)]
    for row in rows:
        store.save(row)
    for _ in range(2):
        found = store.rows()
        assert list(found) == [("D-TRAK, 10", 0), ("D-TRAK, 10", 1), ("a", 2)]
        assert store.saved_keys() == set(found)
        for row in rows:
            assert_same(found[row["method"], row["seed"]], row)
        store.compact()
    assert len(list(store.folder.iterdir())) == 1


def test_a_row_that_is_saved_again_replaces_the_earlier_one(store):
    for loss in (1.0, 2.0, 3.0):
        store.save(row_of("a", 0) | {"loss": loss})
        assert store.rows()["a", 0]["loss"] == loss
        store.compact()
        assert store.rows()["a", 0]["loss"] == loss


def test_files_stay_small(store, monkeypatch):
    monkeypatch.setattr(jobs, "BYTES_PER_FILE", 20_000)
    for seed in range(9):
        store.save(row_of("a", seed, noise=np.random.default_rng(seed).normal(size=1000)))
    store.compact()
    files = list(store.folder.iterdir())
    assert len(files) == 5
    assert max(path.stat().st_size for path in files) < 20_000
    assert list(store.rows()) == [("a", seed) for seed in range(9)]


def test_rows_are_saved_read_and_compacted_at_once(store):
    seen = []

    def save(first):
        for seed in range(first, 40, 2):
            store.save(row_of("a", seed))
            store.compact()
            seen.append(store.rows().keys() >= {("a", n) for n in range(first, seed + 1, 2)})

    threads = [threading.Thread(target=save, args=(first,)) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 40
    assert all(seen), "no row is ever missing"
    assert {key: row["loss"] for key, row in store.rows().items()} == {("a", n): 1 / (n + 3) for n in range(40)}


def test_old_files_are_refused(tmp_path, message_of):
    jobs.require_no_npz(tmp_path)
    (tmp_path / "subset-0000-seed-0.npz").touch()
    assert "provgen 0.1" in message_of(jobs.require_no_npz, tmp_path)
