"""One picture of samples with their sources: what a trace looks like at a glance."""

from __future__ import annotations

import struct
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate, chain
from math import ceil
from pathlib import Path
from typing import Any

import torch
from fontTools.ttLib import TTCollection, TTFont, TTLibError
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import read_image, to_pil
from provgen.data.manifest import Manifest
from provgen.errors import InputError, notice, printable
from provgen.run import RunFolder
from provgen.tracing.records import group_traces

# Lengths in pixels.
_LEAST_TILE = 56
_FONT_SIZE = 13
_LINE = 16
_LINE_STEP = 14
_SPACE = 8
_MARGIN = 16
_INK, _FAINT, _OUTLINE = "#222222", "#666666", "#cccccc"

# More samples than this take two columns.
_ONE_COLUMN = 16

# The font of the figures; it comes with matplotlib.
_OWN_FONT = Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
# Words in the file names of fonts that are taken after all others: no plain ones, and none of letters alone.
_LAST = ("bold", "italic", "oblique", "light", "thin", "black", "mono", "serif", "lastresort")


def sample_grid(
    samples: Sequence[Image.Image],
    sources: Sequence[Sequence[Image.Image]],
    captions: Sequence[Sequence[str]],
    sample_captions: Sequence[str],
) -> Image.Image:
    """Draw one row per sample: the sample, a gap, then its sources; more than 16 rows take two columns.

    Small images are enlarged by a whole factor without smoothing, so that their pixels stay what they are. Sources
    come strongest first, and rows may differ in length. A newline breaks a caption. Letters that no font on this
    system has are drawn as boxes, and named on stderr.

    Raises:
        InputError: There are no samples.
    """
    if not samples:
        raise InputError("cannot draw a grid of 0 samples; generate at least 1")
    _say_missing(chain(*captions, sample_captions))
    tiles = [_enlarged(image) for image in samples]
    source_tiles = [[_enlarged(image) for image in images] for images in sources]
    sample_cell = _fitting_cell(tiles, sample_captions)
    source_cell = _fitting_cell(list(chain(tiles, *source_tiles)), list(chain(*captions)))
    rows = []
    for tile, title, images, texts in zip(tiles, sample_captions, source_tiles, captions, strict=True):
        cells = [_captioned(source_cell, *source) for source in zip(images, texts, strict=True)]
        rows.append(_beside([_captioned(sample_cell, tile, title), _beside(cells, gap=_SPACE)], gap=_MARGIN))
    per_column = len(rows) if len(rows) <= _ONE_COLUMN else ceil(len(rows) / 2)
    columns = [
        _below([_headings(sample_cell), *rows[start : start + per_column]]) for start in range(0, len(rows), per_column)
    ]
    return ImageOps.expand(_beside(columns, gap=3 * _MARGIN), border=_MARGIN, fill="white")


@dataclass(frozen=True)
class _Cell:
    """Common size of the cells of the samples, or of those of the sources; lengths in pixels."""

    width: int
    tile_height: int
    caption_height: int


def _fitting_cell(tiles: Sequence[Image.Image], texts: Sequence[str]) -> _Cell:
    """Fit the cell to the largest tile and the longest caption, but no wider than twice the tile."""
    tile_width = max(tile.width for tile in tiles) + 2
    text_width = max((_length(line) for text in texts for line in text.split("\n")), default=0)
    return _Cell(
        width=max(tile_width, min(text_width, 2 * tile_width)),
        tile_height=max(tile.height for tile in tiles) + 2,
        caption_height=_LINE * max((len(text.split("\n")) for text in texts), default=0) + _SPACE,
    )


@dataclass(frozen=True)
class Face:
    """A font that can draw captions."""

    path: Path
    number: int
    """Place in its file, which may be a collection."""
    letters: str
    """What it has pictures of; a string, as sets of the letters of all fonts would fill the memory."""

    @cached_property
    def font(self) -> ImageFont.FreeTypeFont:
        """The font in the size of captions."""
        return ImageFont.truetype(self.path, _FONT_SIZE, index=self.number)

    def lacks(self, line: str) -> set[str]:
        """Give the visible letters of a line that would be drawn as boxes."""
        return {letter for letter in line if letter not in self.letters and _is_visible(letter)}


def _is_visible(letter: str) -> bool:
    """Whether a letter has a picture of its own; spaces, joiners and selectors of variants have none."""
    return unicodedata.category(letter) not in ("Cc", "Cf", "Zs") and not "\ufe00" <= letter <= "\ufe0f"


@cache
def faces_of(path: Path) -> tuple[Face, ...]:
    """Read the fonts of a file; none of a file that cannot be read, or that has no pictures in the size of captions."""
    is_collection = path.suffix.lower() == ".ttc"
    try:
        with TTCollection(path, lazy=True) if is_collection else TTFont(path, lazy=True) as opened:
            letters = ["".join(map(chr, font.getBestCmap() or ())) for font in (opened if is_collection else [opened])]
        faces = [Face(path, number, having) for number, having in enumerate(letters)]
        return tuple(face for face in faces if face.font is not None)
    except (OSError, TTLibError, AssertionError, KeyError, struct.error):
        return ()


def choose_face(line: str, paths: Sequence[Path]) -> Face:
    """Choose the font that lacks the fewest letters of a line: matplotlib's own, or the first of some files."""
    best = faces_of(_OWN_FONT)[0]
    for path in paths if best.lacks(line) else ():
        best = min(best, *faces_of(path), key=lambda face: len(face.lacks(line)))
        if not best.lacks(line):
            break
    return best


@cache
def _system_fonts() -> tuple[Path, ...]:
    """List the font files of this system, plain ones first."""
    # Imported when a name needs it: it lists all fonts once more, which takes seconds the first time.
    from matplotlib.font_manager import findSystemFonts

    paths = sorted(map(Path, findSystemFonts()))
    return tuple(sorted(paths, key=lambda path: any(word in path.name.lower() for word in _LAST)))


@cache
def _face(line: str) -> Face:
    own = choose_face(line, ())
    return choose_face(line, _system_fonts()) if own.lacks(line) else own


def _length(line: str) -> int:
    """Give the width of a line in pixels."""
    return ceil(_face(line).font.getlength(line))


def _say_missing(texts: Iterable[str]) -> None:
    """Name the letters that no font has."""
    missing = {letter for text in texts for line in text.split("\n") for letter in _face(line).lacks(line)}
    if missing:
        named = " ".join([*sorted(missing)[:8], *["…"] * (len(missing) > 8)])
        notice(
            f"no font on this system has {named}; such letters are drawn as boxes; "
            "install one that has them, such as a Noto font"
        )


def _enlarged(image: Image.Image) -> Image.Image:
    """Enlarge by a whole factor until the shorter side has the least tile's length."""
    factor = ceil(_LEAST_TILE / min(image.size))
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def _captioned(cell: _Cell, tile: Image.Image, text: str) -> Image.Image:
    """Draw a tile with a thin outline and its caption below, both centred in a cell."""
    picture = Image.new("RGB", (cell.width, cell.tile_height + cell.caption_height), "white")
    draw = ImageDraw.Draw(picture)
    left = (cell.width - tile.width) // 2
    draw.rectangle((left - 1, 0, left + tile.width, tile.height + 1), outline=_OUTLINE)
    picture.paste(tile, (left, 1))
    first = tile.height + 4 + faces_of(_OWN_FONT)[0].font.getmetrics()[0]
    for number, line in enumerate(text.split("\n")):
        shown = _shortened(line, cell)
        # On one baseline, whatever the font.
        draw.text((cell.width / 2, first + number * _LINE_STEP), shown, _INK, _face(line).font, anchor="ms")
    return picture


def _shortened(line: str, cell: _Cell) -> str:
    """Cut a line that is wider than its cell, and say so with an ellipsis."""
    font = _face(line).font
    if font.getlength(line) <= cell.width:
        return line
    ends = range(len(line))
    fitting = bisect_right(ends, cell.width, key=lambda end: ceil(font.getlength(f"{line[:end]}…")))
    return f"{line[: max(0, fitting - 1)]}…"


def _headings(cell: _Cell) -> Image.Image:
    sources = "sources, strongest first"
    left, font = cell.width + _MARGIN, _face(sources).font
    picture = Image.new("RGB", (left + _length(sources), _LINE + _SPACE // 2), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((0, 0), _shortened("sample", cell), _FAINT, font)
    draw.text((left, 0), sources, _FAINT, font)
    return picture


def _beside(pictures: Sequence[Image.Image], *, gap: int) -> Image.Image:
    """Join pictures from left to right, aligned at their tops; none make an empty one."""
    lefts = [0, *accumulate(picture.width + gap for picture in pictures)]
    height = max((picture.height for picture in pictures), default=0)
    return _pasted((max(0, lefts[-1] - gap), height), pictures, [(left, 0) for left in lefts[:-1]])


def _below(pictures: Sequence[Image.Image]) -> Image.Image:
    """Join pictures from top to bottom, aligned at their left edges."""
    tops = [0, *accumulate(picture.height for picture in pictures)]
    width = max(picture.width for picture in pictures)
    return _pasted((width, tops[-1]), pictures, [(0, top) for top in tops[:-1]])


def _pasted(size: tuple[int, int], pictures: Sequence[Image.Image], corners: Sequence[tuple[int, int]]) -> Image.Image:
    page = Image.new("RGB", size, "white")
    for picture, corner in zip(pictures, corners, strict=True):
        page.paste(picture, corner)
    return page


def draw_samples(
    folder: RunFolder,
    samples: Sequence[Mapping[str, Any]],
    traces: Sequence[Mapping[str, Any]],
    train: ImageSet,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Draw samples with their sources, each source with its class and weight.

    Samples and traces are rows of `samples/` and `traces/`, the latter sorted by sample and rank. Without captions,
    each sample's class stands under it, and how much of it is explained.
    """
    groups = group_traces(traces)
    rows = [groups[sample["sample"]] for sample in samples]
    return sample_grid(
        [Image.open(folder.root / sample["path"]) for sample in samples],
        [[to_pil(train.images[source["example_index"]]) for source in row] for row in rows],
        [[_source_caption(source, train) for source in row] for row in rows],
        captions or [_sample_caption(sample, train) for sample in samples],
    )


def load_pixels(folder: RunFolder, samples: Sequence[Mapping[str, Any]], manifest: Manifest) -> Tensor:
    """Read the PNGs of samples as uint8 (sample, channel, height, width)."""
    kind = {"image_size": manifest.image_size, "channels": manifest.channels}
    return torch.stack([read_image(folder.root / sample["path"], **kind) for sample in samples])


def _sample_caption(sample: Mapping[str, Any], train: ImageSet) -> str:
    shares = {"copy": "copy, {:.0%}", "mixture": "{:.0%} explained", "no sources": "no sources, {:.0%}", "unknown": ""}
    share = sample["explained_by_nearest"] if sample["support"] == "copy" else sample["explained"]
    explained = shares[sample["support"]].format(share or 0.0)
    return "\n".join(text for text in (_class_name(sample["class_label"], train), explained) if text)


def _source_caption(source: Mapping[str, Any], train: ImageSet) -> str:
    name = _class_name(int(train.labels[source["example_index"]]), train)
    percent = f"{100 * source['weight']:.0f} %"
    return f"{name}\n{percent}" if name else percent


def _class_name(label: int | None, train: ImageSet) -> str:
    return "" if label is None or label >= train.num_classes else printable(train.class_names[label])
