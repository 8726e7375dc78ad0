"""Drawings of a small package of our own: colours where they are drawn, designers and classes in the folder."""

import json

import pytest
from PIL import Image

from provgen.data.folder import load_image_folder

RED = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"><rect width="36" height="72" fill="#ff0000"/></svg>'
EMPTY = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72"></svg>'


def entry(code, group, author, **changed):
    return {
        "hexcode": code, "group": group, "openmoji_author": author, "skintone": "", "skintone_combination": "",
    } | changed  # fmt: skip


@pytest.fixture
def package(tmp_path):
    root = tmp_path / "package"
    (root / "color" / "svg").mkdir(parents=True)
    (root / "data").mkdir()
    entries = [
        entry("1F600", "smileys", "Ada"),
        entry("1F601", "flags", "Bob, Jr."),
        entry("1F602", "smileys", "Ada", skintone="1"),
        entry("1F603", "smileys", "Ada", skintone_combination="single"),
        entry("1F3FB", "component", "Ada"),
    ]
    (root / "data" / "openmoji.json").write_text(json.dumps(entries))
    (root / "color" / "svg" / "1F600.svg").write_text(RED)
    (root / "color" / "svg" / "1F601.svg").write_text(EMPTY)
    return root


def test_base_drawings_become_an_image_folder(package, tmp_path, run_recipe, capsys):
    output = tmp_path / "images"
    assert run_recipe("data/openmoji", package, output, "--size", 16) == 0
    assert "2 drawings by 2 designers" in capsys.readouterr().out
    with Image.open(output / "smileys" / "1F600.png") as image:
        pixels = image.convert("RGB")
        assert pixels.size == (16, 16)
        assert pixels.getpixel((3, 8)) == (255, 0, 0)
        assert pixels.getpixel((12, 8)) == (255, 255, 255)
    images = load_image_folder(output, 16)
    assert images.class_names == ("flags", "smileys")
    assert images.contributors == ("Bob, Jr.", "Ada")
    assert images.licenses == ("CC BY-SA 4.0",) * 2


def test_mistakes_end_in_one_line_and_leave_nothing(package, tmp_path, run_recipe, capsys):
    assert run_recipe("data/openmoji", tmp_path, tmp_path / "images") == 2
    assert "npm package" in capsys.readouterr().err
    (package / "color" / "svg" / "1F601.svg").write_text("no drawing")
    assert run_recipe("data/openmoji", package, tmp_path / "images") == 2
    error = capsys.readouterr().err
    assert "1F601.svg" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "images").exists()
    assert run_recipe("data/openmoji", package, package) == 2
    assert "exists" in capsys.readouterr().err
