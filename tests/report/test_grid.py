"""The tiles of the grid hold the very pixels of the images, in reading order."""

from dataclasses import replace

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib import TTCollection, TTFont
from PIL import Image, ImageDraw

from provgen.errors import InputError
from provgen.report.grid import _sample_caption, _system_fonts, choose_face, faces_of, sample_grid


def flat(color, size=8):
    return Image.new("RGB", (size, size), color)


def place(page, color):
    """Left, top, width and height of the rectangle that holds every pixel of this colour and no other."""
    rows, columns = np.nonzero((np.asarray(page) == color).all(axis=2))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert len(rows) == width * height
    return columns.min(), rows.min(), width, height


def colors(sample):
    return [(10 + sample, 200 - source, 60 * source) for source in range(4)]


def grid(count, size=8):
    images = [[flat(color, size) for color in colors(sample)] for sample in range(count)]
    captions = [["0.50", "0.25", "0.12"]] * count
    titles = [f"class {sample}" for sample in range(count)]
    return sample_grid([row[0] for row in images], [row[1:] for row in images], captions, titles)


@pytest.mark.parametrize(("size", "tile"), [(8, 56), (14, 56), (28, 56), (32, 64), (64, 64)])
def test_tiles_are_enlarged_by_a_whole_factor_to_at_least_56_pixels(size, tile):
    assert place(grid(1, size), colors(0)[2])[2:] == (tile, tile)


def test_tile_pixels_equal_the_source_pixels():
    pixels = np.random.default_rng(0).integers(1, 255, size=(8, 8, 3), dtype=np.uint8)
    page = sample_grid([flat("red")], [[Image.fromarray(pixels)]], [["1.00"]], ["sample"])
    left, top, _, _ = place(page, (255, 0, 0))
    source_left = next(x for x in range(left + 57, page.width) if tuple(page.getpixel((x, top))) == tuple(pixels[0, 0]))
    tile = np.asarray(page)[top : top + 56, source_left : source_left + 56]
    np.testing.assert_array_equal(tile, pixels.repeat(7, axis=0).repeat(7, axis=1))


def test_a_row_reads_sample_gap_sources_and_rows_follow_each_other():
    page = grid(3)
    for sample in range(3):
        corners = [place(page, color)[:2] for color in colors(sample)]
        lefts = [left for left, _ in corners]
        assert len({top for _, top in corners}) == 1
        assert lefts == sorted(lefts)
        assert lefts[1] - lefts[0] > lefts[2] - lefts[1] == lefts[3] - lefts[2]
    tops = [place(page, colors(sample)[0])[1] for sample in range(3)]
    assert tops == sorted(tops)
    assert tops[1] - tops[0] > 56 + 10


def test_more_than_sixteen_samples_take_two_columns():
    one, two = grid(16), grid(17)
    assert len({place(one, colors(sample)[0])[0] for sample in range(16)}) == 1
    assert len({place(two, colors(sample)[0])[0] for sample in range(17)}) == 2
    assert place(two, colors(8)[0])[0] < place(two, colors(9)[0])[0]
    assert place(two, colors(9)[0])[1] == place(two, colors(0)[0])[1]
    assert two.height < one.height


def test_captions_are_drawn_below_and_change_nothing_in_the_tiles():
    images = [flat(color) for color in colors(0)]
    blank = sample_grid(images[:1], [images[1:]], [[" "] * 3], [" "])
    written = sample_grid(images[:1], [images[1:]], [["0.50"] * 3], ["class 1"])
    left, top, width, height = place(written, colors(0)[1])
    below = (left, top + height + 2, left + width, top + height + 20)
    assert np.asarray(written.crop(below)).min() < 100
    assert np.asarray(blank.crop(below)).min() == 255


def test_a_long_name_is_cut_and_does_not_widen_the_grid_without_end():
    names = ["x" * 30, "x" * 3000]
    pages = [sample_grid([flat("red")], [[flat("blue")]], [["1"]], [name]) for name in names]
    assert pages[0].size == pages[1].size


def test_grayscale_images_fewer_sources_and_no_sources_are_drawn():
    gray = Image.new("L", (8, 8), 77)
    page = sample_grid([flat("red"), flat("blue")], [[gray], []], [["1.00"], []], ["a", "b"])
    assert place(page, (77, 77, 77))[2:] == (56, 56)
    assert place(page, (0, 0, 255))[1] > place(page, (255, 0, 0))[1]


@pytest.mark.parametrize(
    ("support", "explained", "by_nearest", "expected"),
    [
        ("copy", 0.998, 0.967, "copy, 97%"),
        ("mixture", 0.625, 0.5, "62% explained"),
        ("no sources", 0.0312, 0.0, "no sources, 3%"),
        ("unknown", None, None, ""),
    ],
)
def test_captions_say_the_class_and_how_much_is_explained(support, explained, by_nearest, expected, random_images):
    """Of a copy, how much the nearest alone explains."""
    sample = {"class_label": 1, "support": support, "explained": explained, "explained_by_nearest": by_nearest}
    assert _sample_caption(sample, random_images(4)) == (f"b\n{expected}" if expected else "b")
    assert _sample_caption(sample | {"class_label": None}, random_images(4)) == expected


def test_an_empty_grid_is_refused():
    with pytest.raises(InputError, match="0 samples"):
        sample_grid([], [], [], [])


BOX, SQUARE = 300, 900
"""Width of the picture of a letter that a font lacks, and of one that it has, in thousandths of its size."""


def write_font(path, letters):
    """Write a font in which all of some letters are one square, and all others a narrow box."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap(dict.fromkeys(map(ord, letters), "square"))
    builder.setupGlyf({".notdef": rectangle(BOX), "square": rectangle(SQUARE)})
    builder.setupHorizontalMetrics({".notdef": (BOX, 0), "square": (SQUARE, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return path


def rectangle(width):
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 700), (width, 700), (width, 0)):
        pen.lineTo(corner)
    pen.closePath()
    return pen.glyph()


def collection(path, *parts):
    together = TTCollection()
    together.fonts = [TTFont(part) for part in parts]
    together.save(path)
    return path


def ink(face, line):
    """Draw a line; give its pixels."""
    page = Image.new("L", (200, 40))
    ImageDraw.Draw(page).text((10, 10), line, 255, face.font)
    return np.asarray(page)


def test_a_line_is_drawn_in_the_first_font_that_has_its_letters(tmp_path):
    kana = write_font(tmp_path / "kana.ttf", "\U000f0001\U000f0002")
    more = write_font(tmp_path / "more.ttf", "\U000f0001\U000f0003a")
    chosen = {
        line: choose_face(line, [kana, more]).path.stem
        for line in ("plain", "\U000f0001", "\U000f0002", "\U000f0003a", "\U000f0001 \U000f0003", "\U000f0004")
    }
    assert list(chosen.values()) == ["DejaVuSans", "kana", "kana", "more", "more", "DejaVuSans"]
    assert choose_face("\U000f0004", [kana, more]).lacks("\U000f0004 a") == {"\U000f0004"}
    face = choose_face("\U000f0002", [kana, more])
    assert face.font.getlength("\U000f0002") == pytest.approx(13 * SQUARE / 1000, abs=0.5)


def test_fonts_are_found_inside_of_collections(tmp_path):
    parts = [write_font(tmp_path / f"{number}.ttf", letter) for number, letter in enumerate("\U000f0001\U000f0002")]
    both = collection(tmp_path / "both.ttc", *parts)
    assert [face.letters for face in faces_of(both)] == ["\U000f0001", "\U000f0002"]
    face = choose_face("\U000f0002", [both])
    assert (face.path, face.number) == (both, 1)
    assert face.font.getlength("\U000f0002") == pytest.approx(13 * SQUARE / 1000, abs=0.5)
    other = replace(face, number=0)
    assert other.font.getlength("\U000f0002") == pytest.approx(13 * BOX / 1000, abs=0.5)


@pytest.mark.parametrize("content", [b"", b"no font", b"ttcf" + bytes(30), b"\0\1\0\0" + bytes(8)])
@pytest.mark.parametrize("ending", ["ttf", "ttc", "otf"])
def test_damaged_fonts_are_passed_over(content, ending, tmp_path):
    path = tmp_path / f"damaged.{ending}"
    path.write_bytes(content)
    assert faces_of(path) == ()


@pytest.mark.parametrize("line", ["日本語", "한국어", "हिन्दी", "\U000f1234", "\U000f2234 \u0378"])
def test_letters_are_drawn_or_named_as_missing(line, capsys):
    """Whatever fonts this system has: letters are told from the picture of one that no font has, or stderr says so."""
    face = choose_face(line, _system_fonts())
    captions = [[line.replace(" ", "\n")]]
    for _ in range(2):
        sample_grid([flat("red")], [[flat("blue")]], captions, [line])
    said = capsys.readouterr().err
    lacking = face.lacks(line)
    for letter in set(line) - {" "}:
        is_box = np.array_equal(ink(face, letter), ink(face, "\U0010ffff"))
        assert is_box <= (letter in lacking)
    if lacking:
        assert said.count("no font on this system has") == said.count("\n") == 1
        assert "install one that has them, such as a Noto font" in said
        assert all(letter in said for letter in lacking)
    else:
        assert said == ""


def test_a_name_that_needs_no_other_font_is_said_nothing_about(capsys):
    sample_grid([flat("red")], [[flat("blue")]], [["žluť 😀‍\n12 %"]], ["Ελλάδα, привет\n62% explained…"])
    assert capsys.readouterr().err == ""


def test_control_characters_of_names_are_drawn_as_their_escapes(random_images):
    images = replace(random_images(4), class_names=("a", "\x1b[31mb\u202e", "c"))
    sample = {"class_label": 1, "support": "unknown", "explained": None, "explained_by_nearest": None}
    assert _sample_caption(sample, images) == r"\x1b[31mb\u202e"
