import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from provgen.data.dataset import ImageSet
from provgen.data.folder import load_image_folder
from provgen.data.manifest import Manifest, Source
from provgen.data.splits import stratified_split


def fill(root, names, mode="L"):
    """Write one image a name, each with bytes of its own."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (5, 5), 20 * i).save(root / name)


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    fill(folder, [f"{c}/{i}.png" for c in ("apes", "bees") for i in range(5)])
    (folder / "metadata.csv").write_text("file_name,contributor,license\nbees/0.png,Ann,CC0\n")
    return folder


def split(images: ImageSet) -> tuple[ImageSet, ImageSet]:
    train, holdout = stratified_split(images.labels, 0.4, seed=1)
    return images.select(train), images.select(holdout)


def load(root) -> ImageSet:
    return load_image_folder(root, 4)


def assert_same(left: ImageSet, right: ImageSet, *, paths=True):
    assert torch.equal(left.images, right.images)
    assert torch.equal(left.labels, right.labels)
    assert left.class_names == right.class_names
    assert left.sha256 == right.sha256
    assert left.paths == right.paths or not paths


def test_a_manifest_survives_saving(root, tmp_path):
    manifest = Manifest.of(*split(load(root)))
    manifest.save(tmp_path / "run" / "manifest.parquet")
    loaded = Manifest.load(tmp_path / "run" / "manifest.parquet")
    assert loaded.table.equals(manifest.table)
    assert (loaded.image_size, loaded.channels, loaded.class_names) == (4, 1, ("apes", "bees"))
    assert loaded.fingerprint == manifest.fingerprint
    assert loaded.num_train == manifest.num_train == 6


def test_columns_are_those_of_the_design(root):
    table = Manifest.of(*split(load(root))).table
    assert table["split"].to_pylist() == ["train"] * 6 + ["holdout"] * 4
    assert table["example_index"].to_pylist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    row = table.filter(pa.compute.equal(table["path"], "bees/0.png")).to_pylist()[0]
    assert (row["label"], row["class_name"], row["contributor"], row["license"]) == (1, "bees", "Ann", "CC0")


def test_an_empty_holdout_and_a_set_without_labels_are_kept(tmp_path):
    fill(tmp_path / "flat", ["a.png", "b.png"])
    images = load(tmp_path / "flat")
    manifest = Manifest.of(images, images.select(torch.arange(0)))
    manifest.save(tmp_path / "m.parquet")
    loaded = Manifest.load(tmp_path / "m.parquet")
    assert loaded.table["class_name"].to_pylist() == [None, None]
    train, holdout = loaded.align(load(tmp_path / "flat"))
    assert_same(train, images)
    assert len(holdout) == 0


def test_sources_are_named_in_the_order_asked(root):
    train, holdout = split(load(root))
    manifest, train_paths = Manifest.of(train, holdout), train.paths
    named = manifest.sources(torch.tensor([5, 0, 5]))
    assert [source.path for source in named] == [train_paths[5], train_paths[0], train_paths[5]]
    assert [source.example_index for source in named] == [5, 0, 5]
    everything = Manifest.of(load(root), holdout)
    assert everything.sources([5]) == [
        Source(
            example_index=5,
            path="bees/0.png",
            class_name="bees",
            contributor="Ann",
            license="CC0",
            reachable=True,
        )
    ]
    assert manifest.sources([]) == []


def test_covered_images_are_reachable_and_holdout_is_neither(root):
    manifest = Manifest.of(*split(load(root)))
    assert manifest.table["reachable"].to_pylist() == [True] * 6 + [None] * 4
    some = manifest.with_reachable(torch.tensor([1, 4]))
    assert some.table["reachable"].to_pylist() == [False, True, False, False, True, False] + [None] * 4
    assert some.reachable.tolist() == [False, True, False, False, True, False]
    assert [source.reachable for source in some.sources([4, 0, 1])] == [True, False, True]
    assert manifest.reachable.tolist() == [True] * 6, "the manifest it was made from is left alone"
    assert some.with_reachable(torch.arange(6)).table.equals(manifest.table)


def test_coverage_survives_saving_and_leaves_the_fingerprint_alone(root, tmp_path):
    train, holdout = split(load(root))
    everything = Manifest.of(train, holdout)
    some = everything.with_reachable(torch.tensor([0, 5]))
    some.save(tmp_path / "m.parquet")
    loaded = Manifest.load(tmp_path / "m.parquet")
    assert loaded.table.equals(some.table)
    assert loaded.reachable.tolist() == [True] + [False] * 4 + [True]
    assert loaded.fingerprint == everything.fingerprint
    assert_same(loaded.align(load(root))[0], train)


def test_a_manifest_of_version_1_is_read_as_all_reachable(root, tmp_path, message_of):
    path = tmp_path / "m.parquet"
    manifest = Manifest.of(*split(load(root)))
    about = {"schema_version": 1, "image_size": 4, "channels": 1, "class_names": ["apes", "bees"]}
    old = manifest.table.drop_columns(["reachable"]).replace_schema_metadata({"provgen": json.dumps(about)})
    pq.write_table(old, path)
    loaded = Manifest.load(path)
    assert loaded.table.equals(manifest.table)
    assert loaded.fingerprint == manifest.fingerprint
    for bad in (old.drop_columns(["split"]), old.drop_columns(["label"]), manifest.table):
        pq.write_table(bad.replace_schema_metadata(old.schema.metadata), path)
        assert "not a whole manifest" in message_of(Manifest.load, path)


def test_fingerprint_depends_on_train_pixels_labels_and_order_alone(root):
    train, holdout = split(load(root))
    fingerprint = Manifest.of(train, holdout).fingerprint
    assert len(fingerprint) == 64
    nobody = replace(train, contributors=(None,) * 6, paths=tuple("abcdef"))
    assert Manifest.of(nobody, holdout.select(torch.arange(2))).fingerprint == fingerprint
    different = [
        train.select(torch.tensor([1, 0, 2, 3, 4, 5])),
        train.select(torch.arange(5)),
        replace(train, labels=1 - train.labels),
        replace(train, images=train.images[..., :3, :3]),
        replace(train, images=train.images.expand(-1, 3, -1, -1)),
        replace(train, sha256=("0" * 64, *train.sha256[1:])),
    ]
    others = {Manifest.of(changed, holdout).fingerprint for changed in different}
    renamed = (replace(part, class_names=("apes", "wasps")) for part in (train, holdout))
    others.add(Manifest.of(*renamed).fingerprint)
    assert len(others - {fingerprint}) == 7


@pytest.mark.parametrize("seed", range(5))
def test_aligning_undoes_any_order_of_loading(root, seed):
    images = load(root)
    train, holdout = split(images)
    shuffled = images.select(torch.randperm(10, generator=torch.Generator().manual_seed(seed)))
    again = Manifest.of(train, holdout).align(shuffled)
    assert_same(again[0], train)
    assert_same(again[1], holdout)


def test_moved_and_added_files_leave_the_index_alone(root):
    train, holdout = split(load(root))
    manifest = Manifest.of(train, holdout)
    for path in sorted((root / "apes").iterdir()):
        path.rename(path.with_name(f"moved_{9 - int(path.stem)}.png"))
    fill(root, [f"aardvarks/{i}.png" for i in range(20, 23)], mode="RGB")
    again = manifest.align(load(root))
    assert_same(again[0], train, paths=False)
    assert_same(again[1], holdout, paths=False)
    assert any("moved_" in path for path in again[0].paths)


def test_a_lost_colour_image_leaves_the_channels_alone(root):
    fill(root, ["apes/colour.png"], mode="RGB")
    images = load(root)
    assert images.images.shape[1] == 3
    rows = [i for i, path in enumerate(images.paths) if "colour" not in path]
    train, holdout = split(images.select(torch.tensor(rows)))
    (root / "apes" / "colour.png").unlink()
    assert load(root).images.shape[1] == 1
    assert_same(Manifest.of(train, holdout).align(load(root))[0], train)


def test_each_duplicate_is_used_once(root):
    for name in ("apes/copy.png", "bees/copy.png", "bees/other.png"):
        (root / name).write_bytes((root / "apes/0.png").read_bytes())
    images = load(root)
    train, holdout = split(images)
    again = Manifest.of(train, holdout).align(images.select(torch.arange(len(images)).flip(0)))
    assert_same(again[0], train)
    assert_same(again[1], holdout)


def test_renamed_duplicates_of_two_classes_keep_their_classes(root):
    (root / "bees/copy.png").write_bytes((root / "apes/0.png").read_bytes())
    # bees come first in the manifest and last in the listing.
    images = load(root)
    train, holdout = (images.select((images.labels == label).nonzero().flatten()) for label in (1, 0))
    (root / "bees/copy.png").rename(root / "bees/renamed.png")
    (root / "apes/0.png").rename(root / "apes/zero.png")
    again = Manifest.of(train, holdout).align(load(root))
    assert_same(again[0], train, paths=False)
    assert_same(again[1], holdout, paths=False)


def test_a_lost_duplicate_is_missed(root, message_of):
    (root / "apes/copy.png").write_bytes((root / "apes/0.png").read_bytes())
    manifest = Manifest.of(*split(load(root)))
    (root / "apes/0.png").unlink()
    assert "1 of the 11 images" in message_of(manifest.align, load(root))


def test_missing_and_changed_files_are_counted_and_the_first_named(root, message_of):
    train, holdout = split(load(root))
    manifest = Manifest.of(train, holdout)
    (root / train.paths[2]).unlink()
    Image.new("L", (5, 5), 255).save(root / train.paths[4])
    message = message_of(manifest.align, load(root))
    assert "2 of the 10 images" in message
    assert train.paths[2] in message
    assert "output_dir" in message


def test_changed_labels_are_refused(root, message_of):
    manifest = Manifest.of(*split(load(root)))
    (root / "apes/3.png").rename(root / "bees/3_moved.png")
    message = message_of(manifest.align, load(root))
    assert "bees/3_moved.png: apes became bees" in message
    (root / "bees/3_moved.png").rename(root / "apes/3.png")
    (root / "metadata.csv").write_text("file_name,label\napes/3.png,wasps\n")
    assert "apes/3.png: apes became wasps" in message_of(manifest.align, load(root))


def test_another_image_size_is_refused(root, message_of):
    manifest = Manifest.of(*split(load(root)))
    message = message_of(manifest.align, load_image_folder(root, 5))
    assert "data.image_size=4" in message
    assert "5" in message


def test_a_missing_manifest_is_named(tmp_path, message_of):
    assert "manifest.parquet" in message_of(Manifest.load, tmp_path / "manifest.parquet")


def test_a_truncated_manifest_is_named(root, tmp_path, message_of):
    path = tmp_path / "manifest.parquet"
    Manifest.of(*split(load(root))).save(path)
    data = path.read_bytes()
    for keep in (0, 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        assert "manifest.parquet" in message_of(Manifest.load, path)


def test_parquet_that_is_no_manifest_is_refused(root, tmp_path, message_of):
    path = tmp_path / "other.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    assert "other.parquet" in message_of(Manifest.load, path)
    table = Manifest.of(*split(load(root))).table
    unknown, holdout_too = (
        table.set_column(8, table.schema.field(8), pa.array([value] * 10, pa.bool_())) for value in (None, True)
    )
    shuffled = table.take([9, *range(9)])
    for bad in (table.drop_columns(["label"]), table.slice(1), shuffled, unknown, holdout_too):
        manifest = Manifest(table=bad, image_size=4, channels=1, class_names=("apes", "bees"))
        manifest.save(path)
        assert "other.parquet" in message_of(Manifest.load, path)


def test_another_schema_version_is_named(root, tmp_path, message_of, monkeypatch):
    path = tmp_path / "manifest.parquet"
    monkeypatch.setattr("provgen.data.manifest.SCHEMA_VERSION", 99)
    Manifest.of(*split(load(root))).save(path)
    monkeypatch.undo()
    message = message_of(Manifest.load, path)
    assert "schema version 99" in message
    assert "1 to 2" in message


@pytest.mark.parametrize("index", [-1, 6, 9999])
def test_sources_that_are_no_training_images_are_refused(index, root, message_of):
    manifest = Manifest.of(*split(load(root)))
    message = message_of(manifest.sources, [0, index])
    assert f"the example index {index}" in message
    assert "0 to 5" in message


def test_a_run_whose_class_names_are_in_another_normal_form_finds_its_images(tmp_path):
    fill(tmp_path / "images", [f"{c}/{i}.png" for c in ("cafe\u0301", "tea") for i in range(5)])
    images = load(tmp_path / "images")
    assert images.class_names == ("caf\u00e9", "tea")
    before = replace(images, class_names=("cafe\u0301", "tea"))
    train, holdout = Manifest.of(*split(before)).align(images)
    assert_same(train, split(before)[0])
    assert_same(holdout, split(before)[1])
