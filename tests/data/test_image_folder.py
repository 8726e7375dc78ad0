import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from provgen.data.folder import load_image_folder


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
