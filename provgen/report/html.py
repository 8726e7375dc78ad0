"""The report as one self-contained page: no script, no font and no image from elsewhere.

Texts are plain: whatever a file or a contributor is called, it is escaped.
"""

from __future__ import annotations

import io
import math
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

TableCell = str | int | float | None
"""Numbers get three significant digits; None and NaN become a dash."""

# Image pixels per CSS pixel of a figure: sharp on phones and in print.
_SHARPNESS = 2
_CSS_PIXELS_PER_INCH = 96
_MISSING = "\N{EN DASH}"
# A number, perhaps with unit or interval: "12", "-0.3", "97 %", "0.31 [0.28, 0.34]".
_NUMERIC = re.compile(rf"[-+]?[\d.,]+([eE][-+]?\d+)?( ?%)?( ?[\[(].*[\])])?|{_MISSING}")


@dataclass(frozen=True)
class Picture:
    """An embedded picture; `picture_of_figure` and `picture_of_image` make one."""

    data_uri: str
    """`data:image/...`."""
    alt: str
    """What the picture shows, for those who do not see it."""
    caption: str
    """How to read it, in a sentence."""
    width: int
    """Natural width in CSS pixels; shown smaller where the page is narrower."""

    def __post_init__(self) -> None:
        assert self.data_uri.startswith("data:image/")
        assert self.alt


@dataclass(frozen=True)
class Table:
    """Rows under a header; a column of numbers is right-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[TableCell]]
    note: str = ""
    """How to read it, in a sentence."""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows)


@dataclass(frozen=True)
class Section:
    """One question and its answer: text, then figures, then the table."""

    title: str
    text: str
    """Plain text; an empty line starts a new paragraph."""
    figures: Sequence[Picture] = ()
    table: Table | None = None


def render_report(*, title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> str:
    """Render the page; `facts` (name to value, such as the data set) stand below the title."""
    environment = Environment(
        loader=PackageLoader("provgen.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"cell": _text_of, "paragraphs": _paragraphs}
    environment.globals["is_numeric"] = _is_numeric
    return environment.get_template("report.html").render(title=title, facts=facts, sections=sections)


def picture_of_figure(figure: Figure, *, alt: str, caption: str) -> Picture:
    """Embed a matplotlib figure as PNG."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_SHARPNESS * _CSS_PIXELS_PER_INCH)
    return Picture(_png_uri(file), alt, caption, round(figure.get_figwidth() * _CSS_PIXELS_PER_INCH))


def picture_of_image(image: Image.Image, *, alt: str, caption: str) -> Picture:
    """Embed a PIL image as PNG, one pixel to a CSS pixel."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return Picture(_png_uri(file), alt, caption, image.width)


def _png_uri(file: io.BytesIO) -> str:
    return f"data:image/png;base64,{b64encode(file.getvalue()).decode('ascii')}"


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _text_of(cell: TableCell) -> str:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return _MISSING
    if isinstance(cell, float) and abs(cell) < 1000:
        return f"{cell:#.3g}".removesuffix(".")
    return f"{cell:.0f}" if isinstance(cell, float) else str(cell)


def _is_numeric(table: Table, column: int) -> bool:
    return all(_NUMERIC.fullmatch(_text_of(row[column])) for row in table.rows)
