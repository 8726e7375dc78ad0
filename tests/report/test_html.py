"""The page stands alone, escapes every text, and describes every picture."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from provgen.report.html import Section, Table, picture_of_figure, picture_of_image, render_report

ATTACK = "<script>alert('x')</script> & \"><img src=x onerror=alert(1)>"
VOID = {"meta", "img", "br", "link"}


class Page(HTMLParser):
    """Elements of a page as (tag, attributes) and its text; complains about unclosed elements."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.open = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def image():
    pixels = np.random.default_rng(0).integers(0, 256, size=(6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def html(image):
    figure = Figure(figsize=(3, 2))
    figure.add_subplot().plot([1, 2])
    pictures = [
        picture_of_figure(figure, alt=f"a line {ATTACK}", caption=f"Upwards. {ATTACK}"),
        picture_of_image(image, alt="noise", caption="Nothing to see."),
    ]
    rows = [[ATTACK, 0.123456, 12, "0.31 [0.28, 0.34]", None], ["b", float("nan"), 3, "97 %", "text"]]
    table = Table([f"file {ATTACK}", "share", "n", "ratio", "remark"], rows, f"Note {ATTACK}")
    sections = [Section(f"First {ATTACK}", f"One {ATTACK}.\n\nTwo.", pictures, table), Section("Second", "")]
    return render_report(title=f"Run {ATTACK}", facts={f"name {ATTACK}": f"value {ATTACK}"}, sections=sections)


def test_page_is_well_formed_and_declares_itself(html):
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert page.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in page.all("meta")
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))


def test_nothing_is_fetched_from_elsewhere(html):
    page = Page(html)
    assert "http" not in re.sub(r"http-equiv", "", html)
    assert not re.search(r"url\(|@import", html)
    assert all(image["src"].startswith("data:image/") for image in page.all("img"))
    assert all(link["href"].startswith("#") for link in page.all("a"))
    assert not [tag for tag, _ in page.elements if tag in {"script", "link", "iframe", "object", "form"}]


def test_names_are_escaped_wherever_they_stand(html):
    page = Page(html)
    assert len(page.all("img")) == 2
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "<script" not in html
    # Title twice, fact name and value, section title twice, paragraph, caption, header, cell and note.
    assert "".join(page.text).count(ATTACK) == 11


def test_every_picture_has_an_alternative_text(html):
    assert [image["alt"] for image in Page(html).all("img")] == [f"a line {ATTACK}", "noise"]


def test_section_links_lead_to_sections(html):
    page = Page(html)
    assert [link["href"] for link in page.all("a")] == [f"#{section['id']}" for section in page.all("section")]


def test_numeric_columns_alone_are_marked(html):
    page = Page(html)
    scopes = [cell for cell in page.all("th") if cell["scope"] == "col"]
    assert [cell.get("class") for cell in scopes] == [None, "number", "number", "number", None]
    assert [cell.get("class") for cell in page.all("td")] == ["number", "number", "number", None] * 2
    assert {"0.123", "12", "\N{EN DASH}", "97 %"} <= {text.strip() for text in page.text}


def test_embedded_image_is_the_image(image):
    picture = picture_of_image(image, alt="noise", caption="")
    png = base64.b64decode(picture.data_uri.removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(image))
    assert picture.width == 9


def test_embedded_figure_is_twice_as_sharp_as_its_width():
    picture = picture_of_figure(Figure(figsize=(3, 2)), alt="empty", caption="")
    png = base64.b64decode(picture.data_uri.removeprefix("data:image/png;base64,"))
    assert picture.width == 288
    assert Image.open(io.BytesIO(png)).size == (576, 384)


def test_figures_come_before_the_table(html):
    assert html.index("<figure") < html.index("<table")


def test_the_same_report_gives_the_same_page():
    section = Section("A", "B", table=Table(["n"], [[1]]))
    pages = {render_report(title="T", facts={}, sections=[section]) for _ in range(2)}
    assert len(pages) == 1


def test_a_table_without_rows_and_a_page_without_sections_are_pages():
    Page(render_report(title="T", facts={}, sections=[]))
    Page(render_report(title="T", facts={}, sections=[Section("A", "B", table=Table(["n"], []))]))
