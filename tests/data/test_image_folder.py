import hashlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from provgen.data.dataset import require_different
from provgen.data.folder import load_image_folder
from provgen.data.images import readable_suffixes


def write(path, value=0, mode="L", size=(6, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path):
    for i, name in enumerate(["dogs/b.png", "cats/z.png", "dogs/a.png", "birds/m.PNG"]):
        write(tmp_path / name, 10 * i)
    images = load_image_folder(tmp_path, 4)
    assert images.paths == ("birds/m.PNG", "cats/z.png", "dogs/a.png", "dogs/b.png")
    assert images.class_names == ("birds", "cats", "dogs")
    assert images.labels.tolist() == [0, 1, 2, 2]
    assert images.images[:, 0, 0, 0].tolist() == [30, 10, 20, 0]
    assert images.sha256[1] == hashlib.sha256((tmp_path / "cats/z.png").read_bytes()).hexdigest()


def test_paths_are_sorted_as_strings(tmp_path):
    for name in ["a/1.png", "a b/1.png", "a/10.png", "a/2.png", "B/1.png"]:
        write(tmp_path / name)
    images = load_image_folder(tmp_path, 4)
    assert images.paths == ("B/1.png", "a b/1.png", "a/1.png", "a/10.png", "a/2.png")
    assert images.class_names == ("B", "a", "a b")
    assert images.labels.tolist() == [0, 2, 1, 1, 1]


def test_a_flat_folder_has_no_classes(tmp_path):
    for name in ["b.png", "a.jpg", "c.gif"]:
        write(tmp_path / name, 200)
    images = load_image_folder(tmp_path, 4)
    assert images.paths == ("a.jpg", "b.png", "c.gif")
    assert images.class_names == ()
    assert images.labels.tolist() == [0, 0, 0]
    assert images.contributors == (None, None, None)


def test_the_order_of_the_listing_does_not_matter(tmp_path, monkeypatch):
    for i, name in enumerate(["b/2.png", "a/1.png", "b/1.png", "a/2.png"]):
        write(tmp_path / name, 50 * i)
    listed = [
        _load_with_listing(tmp_path, monkeypatch, lambda found, backwards=backwards: sorted(found, reverse=backwards))
        for backwards in (False, True)
    ]
    assert listed[0].paths == listed[1].paths == ("a/1.png", "a/2.png", "b/1.png", "b/2.png")
    assert torch.equal(listed[0].images, listed[1].images)


def _load_with_listing(root, monkeypatch, order):
    iterdir = Path.iterdir
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda folder: iter(order(iterdir(folder))))
        return load_image_folder(root, 4)


def test_hidden_files_and_other_files_are_ignored(tmp_path):
    write(tmp_path / "cats" / "a.png")
    write(tmp_path / "cats" / ".hidden.png")
    write(tmp_path / ".cache" / "x.png")
    (tmp_path / "README.txt").write_text("about")
    (tmp_path / "cats" / "notes.txt").write_text("about")
    assert load_image_folder(tmp_path, 4).paths == ("cats/a.png",)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "bmp", "gif", "webp", "tif", "tiff"])
def test_every_listed_format_is_read(tmp_path, suffix):
    write(tmp_path / f"a.{suffix}", (250, 250, 250), mode="RGB")
    assert (load_image_folder(tmp_path, 4).images.int() - 250).abs().max() <= 2


def test_a_set_is_grey_only_if_every_image_is(tmp_path):
    write(tmp_path / "a.png", 7)
    write(tmp_path / "b.png", 1, mode="1")
    Image.fromarray(np.full((5, 5), 257 * 9, np.uint16)).save(tmp_path / "c.png")
    grey = load_image_folder(tmp_path, 4).images
    assert grey.shape == (3, 1, 4, 4)
    assert grey[:, 0, 0, 0].tolist() == [7, 255, 9]
    write(tmp_path / "d.png", (1, 2, 3), mode="RGB")
    colour = load_image_folder(tmp_path, 4).images
    assert colour[:3].equal(grey.expand(-1, 3, -1, -1))
    assert colour[3, :, 0, 0].tolist() == [1, 2, 3]


def test_images_of_different_sizes_are_brought_to_one(tmp_path):
    write(tmp_path / "a.png", 50, size=(3, 90))
    write(tmp_path / "b.png", 60, size=(1, 1))
    assert load_image_folder(tmp_path, 5).images[:, 0].float().mean((1, 2)).tolist() == [50, 60]


def test_metadata_gives_classes_to_a_flat_folder_and_null_to_the_rest(tmp_path):
    for name in ["a.png", "b.png", "c.png"]:
        write(tmp_path / name)
    (tmp_path / "metadata.csv").write_text(
        'file_name,label,contributor,license\nc.png,cat,"Doe, Ann",CC0\na.png,ape,,\n'
    )
    images = load_image_folder(tmp_path, 4)
    assert images.class_names == ("ape", "cat")
    assert images.labels.tolist() == [0, 2, 1]
    assert images.contributors == (None, None, "Doe, Ann")
    assert images.licenses == (None, None, "CC0")


def test_labels_in_metadata_override_folder_names(tmp_path):
    for name in ["cats/1.png", "cats/2.png", "dogs/1.png"]:
        write(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,label,license\ncats/2.png,dogs,\ndogs/1.png,,MIT\n")
    images = load_image_folder(tmp_path, 4)
    assert images.class_names == ("cats", "dogs")
    assert images.labels.tolist() == [0, 1, 1]
    assert images.licenses == (None, None, "MIT")


def test_metadata_without_labels_leaves_the_set_without_classes(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,contributor\na.png,Ann\n")
    images = load_image_folder(tmp_path, 4)
    assert (images.class_names, images.labels.tolist()) == ((), [0])
    assert images.contributors == ("Ann",)


def test_a_missing_or_empty_folder_is_named(tmp_path, message_of):
    assert "nowhere" in message_of(load_image_folder, tmp_path / "nowhere", 4)
    assert str(tmp_path) in message_of(load_image_folder, tmp_path, 4)
    (tmp_path / "cats").mkdir()
    assert "no images" in message_of(load_image_folder, tmp_path, 4)


def test_an_empty_class_folder_is_named(tmp_path, message_of):
    write(tmp_path / "cats" / "1.png")
    (tmp_path / "dogs").mkdir()
    assert str(tmp_path / "dogs") in message_of(load_image_folder, tmp_path, 4)


def test_images_beside_class_folders_are_refused(tmp_path, message_of):
    write(tmp_path / "cats" / "1.png")
    write(tmp_path / "stray.png")
    message = message_of(load_image_folder, tmp_path, 4)
    assert "stray.png" in message
    assert "cats" in message


def test_images_two_levels_down_are_refused_rather_than_mislabelled(tmp_path, message_of):
    write(tmp_path / "train" / "cats" / "1.png")
    write(tmp_path / "test" / "cats" / "1.png")
    assert f"set data.path to {tmp_path / 'test'}" in message_of(load_image_folder, tmp_path, 4)


def test_a_broken_image_is_named(tmp_path, message_of):
    write(tmp_path / "cats" / "1.png")
    (tmp_path / "cats" / "2.png").write_bytes((tmp_path / "cats" / "1.png").read_bytes()[:45])
    assert str(tmp_path / "cats" / "2.png") in message_of(load_image_folder, tmp_path, 4)


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path, message_of):
    write(tmp_path / "a.png")
    try:
        (tmp_path / "a.png").rename(tmp_path / os.fsdecode(b"\xff.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    message = message_of(load_image_folder, tmp_path, 4)
    assert "UTF-8" in message
    assert message.encode()


def test_many_images_leave_no_progress_bar_in_a_log(tmp_path, capfd):
    write(tmp_path / "000.png", 3, size=(4, 4))
    data = (tmp_path / "000.png").read_bytes()
    for i in range(1, 600):
        (tmp_path / f"{i:03d}.png").write_bytes(data)
    assert len(load_image_folder(tmp_path, 4)) == 600
    assert capfd.readouterr() == ("", "")


# Formats that PIL reads and writes; the others of its registry are only read.
WRITTEN = [
    "avif", "bmp", "dib", "gif", "ico", "icns", "jfif", "jp2", "jpe", "jpeg", "jpg", "mpo", "pbm", "pcx", "pgm", "png",
    "apng", "pnm", "ppm", "qoi", "sgi", "tga", "tif", "tiff", "webp", "dds", "bw", "j2k", "xbm", "msp", "blp",
]  # fmt: skip


@pytest.mark.parametrize("suffix", WRITTEN)
def test_every_format_that_pil_writes_and_reads_is_read(tmp_path, suffix):
    mode = {"xbm": "1", "msp": "1", "pbm": "1", "bw": "L", "pgm": "L", "blp": "P"}.get(suffix, "RGB")
    image = Image.new(mode, (16, 16), 1 if mode in "1P" else "white")
    if mode == "P":
        image.putpalette([0, 0, 0, 255, 255, 255] * 128)
    image.save(tmp_path / f"a.{suffix.upper()}", format={"jfif": "JPEG"}.get(suffix))
    images = load_image_folder(tmp_path, 4)
    assert images.paths == (f"a.{suffix.upper()}",)
    assert images.images.min() >= 250


def test_what_pil_only_knows_by_name_or_cannot_show_is_no_image():
    assert {".eps", ".ps", ".pdf", ".wmf", ".emf", ".mpg", ".h5", ".hdf", ".grib", ".bufr", ".fits"}.isdisjoint(
        readable_suffixes()
    )


def test_what_is_left_out_is_said_once_and_by_the_main_process_only(tmp_path, capfd, monkeypatch):
    write(tmp_path / "cats" / "a.png")
    for name in ("b.txt", "cats/c.TXT", "cats/d.json", "LICENSE", ".hidden", "cats/.DS_Store", "e.\x1b[31m"):
        (tmp_path / name).write_text("x")
    (tmp_path / "metadata.csv").write_text("file_name\ncats/a.png\n")
    for _ in range(2):
        load_image_folder(tmp_path, 4)
    expected = f"left out what is no image in {tmp_path}: .txt (2), no suffix (1), .json (1), .\\x1b[31m (1)\n"
    assert capfd.readouterr().err == expected
    (tmp_path / "f.doc").write_text("x")
    monkeypatch.setenv("RANK", "1")
    load_image_folder(tmp_path, 4)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("link", ["a/lost.png", "a/lost.txt", "c", "a/deep", "metadata.csv"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, link, message_of):
    write(tmp_path / "a" / "1.png")
    (tmp_path / link).symlink_to("/nowhere/at/all")
    assert message_of(load_image_folder, tmp_path, 4).startswith(f"{tmp_path / link} is a link that leads nowhere")


def test_links_that_lead_to_images_and_folders_are_followed(tmp_path):
    write(tmp_path / "elsewhere" / "x.png", 7)
    root = tmp_path / "root"
    write(root / "a" / "1.png")
    (root / "a" / "2.png").symlink_to(tmp_path / "elsewhere" / "x.png")
    (root / "b").symlink_to(tmp_path / "elsewhere")
    assert load_image_folder(root, 4).paths == ("a/1.png", "a/2.png", "b/x.png")


def test_a_link_that_leads_back_up_ends(tmp_path):
    write(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    assert load_image_folder(tmp_path, 4).paths == ("a/1.png",)


def test_a_pipe_is_named(tmp_path, message_of):
    write(tmp_path / "a" / "1.png")
    os.mkfifo(tmp_path / "a" / "2.png")
    assert message_of(load_image_folder, tmp_path, 4).startswith(f"{tmp_path / 'a' / '2.png'} is neither a file")


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_images_at_any_depth_are_refused(tmp_path, depth, message_of):
    write(tmp_path / "a" / "1.png")
    deep = tmp_path.joinpath("a", *map(str, range(depth - 1)))
    write(deep / "2.png")
    message = message_of(load_image_folder, tmp_path, 4)
    assert message.startswith(f"{deep} holds images {depth} levels down")
    assert f"set data.path to {deep.parent}" in message


@pytest.mark.parametrize(
    "name",
    ["metadata.jsonl", "Metadata.csv", "metadata.CSV", "metadata.tsv", "metadata.json", "metadata.parquet",
     "a/metadata.csv", "a/b/metadata.jsonl"],
)  # fmt: skip
def test_metadata_in_another_place_or_format_is_refused(tmp_path, name, message_of):
    write(tmp_path / "a" / "1.png")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("file_name,contributor\na/1.png,Ann\n")
    message = message_of(load_image_folder, tmp_path, 4)
    assert message.startswith(f"{tmp_path / name} would not be read; write {tmp_path / 'metadata.csv'}")
    assert "file_name" in message


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(("on_disk", "in_file"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_row_finds_a_file_in_another_normal_form(tmp_path, on_disk, in_file):
    write(tmp_path / f"{on_disk}.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,contributor\n{in_file}.png,Ann\n", encoding="utf-8")
    images = load_image_folder(tmp_path, 4)
    assert images.contributors == ("Ann",)
    assert images.paths == (f"{on_disk}.png",)


def test_files_that_differ_by_normal_form_only_keep_their_own_rows(tmp_path):
    for name in (COMPOSED, DECOMPOSED):
        write(tmp_path / f"{name}.png")
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system takes both names for one")
    rows = f"file_name,contributor\n{DECOMPOSED}.png,Ann\n{COMPOSED}.png,Bob\n"
    (tmp_path / "metadata.csv").write_text(rows, encoding="utf-8")
    images = load_image_folder(tmp_path, 4)
    assert dict(zip(images.paths, images.contributors, strict=True)) == {
        f"{DECOMPOSED}.png": "Ann",
        f"{COMPOSED}.png": "Bob",
    }


def test_classes_that_differ_by_normal_form_only_are_one(tmp_path):
    for name in (f"{COMPOSED}/1.png", f"{DECOMPOSED}/2.png", "tea/3.png"):
        write(tmp_path / name)
    (tmp_path / "metadata.csv").write_text(f"file_name,label\ntea/3.png,{DECOMPOSED}\n", encoding="utf-8")
    images = load_image_folder(tmp_path, 4)
    assert images.class_names == (COMPOSED,)
    assert images.labels.tolist() == [0, 0, 0]
    assert images.class_index(COMPOSED) == images.class_index(DECOMPOSED) == 0
    assert replace(images, class_names=(DECOMPOSED,)).class_index(COMPOSED) == 0


def test_files_that_are_not_wanted_may_be_broken_or_lost(tmp_path, message_of):
    for i, name in enumerate(["a/1.png", "a/2.png", "b/3.png"]):
        write(tmp_path / name, i)
    whole = load_image_folder(tmp_path, 4)
    (tmp_path / "b" / "4.png").write_bytes(b"half an image")
    (tmp_path / "b" / "5.png").symlink_to("/nowhere/5.png")
    write(tmp_path / "b" / "6.png", (255, 0, 0), mode="RGB")
    assert "5.png" in message_of(load_image_folder, tmp_path, 4)
    wanted = load_image_folder(tmp_path, 4, wanted=set(whole.sha256[1:]))
    assert wanted.paths == ("a/2.png", "b/3.png")
    assert torch.equal(wanted.images, whole.images[1:])
    assert (wanted.class_names, wanted.labels.tolist()) == (("a", "b"), [0, 1])
    nothing = load_image_folder(tmp_path, 4, wanted=())
    assert (len(nothing), nothing.images.shape) == (0, (0, 1, 4, 4))


def test_a_set_that_memory_cannot_hold_is_refused_before_it_is_read(tmp_path, message_of):
    write(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"half an image")
    assert "lower data.image_size" in message_of(load_image_folder, tmp_path, 10**8)


def test_an_image_of_a_folder_is_bounded(tmp_path, message_of):
    write(tmp_path / "1.png", size=(30, 30))
    message = message_of(load_image_folder, tmp_path, 4, max_bytes=3000)
    assert "1.png" in message
    assert "data.max_bytes=3000" in message
    assert len(load_image_folder(tmp_path, 4, max_bytes=3600)) == 1


def test_images_that_are_all_alike_are_refused_and_one_other_is_enough(tmp_path, message_of):
    for i in range(20):
        write(tmp_path / f"{i:02d}.png", 90)
    message = message_of(require_different, load_image_folder(tmp_path, 4))
    assert message.startswith("all 20 training images are alike")
    write(tmp_path / "07.png", 91)
    require_different(load_image_folder(tmp_path, 4))
