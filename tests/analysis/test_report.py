"""The report: whole in one file, escaped, and aligned."""

import base64
import html.parser
import io
import re

import numpy as np
import PIL.Image
import pytest

from arcond_jax.analysis import figures, report

GRID = figures.image_grid(np.full((4, 3, 3, 1), 90, np.uint8), rows=2, columns=2, upscale=5)
DRIFT = figures.drift_plot(np.array([0.1, 0.2]), np.array([0.1, 0.1]))
HEADER = ["sampler", "FD", "difference"]
ROWS = [["plain", 0.25, None], ["refined & <b>warm</b>", 0.2, "-0.05 ± 0.01"]]


class Reader(html.parser.HTMLParser):
    """Collects tags with their attributes, and checks that they nest."""

    def __init__(self):
        super().__init__()
        self.tags = []
        self.open = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write_report(
        path,
        title="Digits <1>",
        sections=[
            report.Text("One & two.\n\nThree <script>alert(1)</script>.", heading="Start > end"),
            report.Table("Scores.", HEADER, ROWS, note='A "note".'),
            report.Picture(GRID, 'Samples "as drawn".'),
            report.Picture(DRIFT, "Drift.", alternative="Two curves."),
        ],
    )
    return path.read_text(encoding="utf-8")


def test_tags_nest_and_nothing_runs_or_loads(page):
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "a", "base"}
    for _, attributes in reader.tags:
        assert not any(name.startswith("on") or name == "href" for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
    outside_pictures = re.sub(r"base64,[^\"]*", "", page)
    assert not re.search(r"https?:|//|url\(|@import", outside_pictures)


def test_pictures_are_inside_in_order(page):
    pictures = re.findall(r'<img class="(\w+)" width="(\d+)"[^>]*base64,([^"]*)"', page)
    assert [kind for kind, _, _ in pictures] == ["pixels", "plot"]
    decoded = [PIL.Image.open(io.BytesIO(base64.b64decode(data))) for _, _, data in pictures]
    np.testing.assert_array_equal(np.asarray(decoded[0]), GRID)
    assert [int(width) for _, width, _ in pictures] == [32, 468]
    assert decoded[1].width == 975
    assert "<b>Figure 1.</b> Samples" in page
    assert "<b>Figure 2.</b> Drift." in page


def test_a_figure_of_images_is_not_inverted_on_dark_pages(tmp_path):
    strip = figures.refinement_strip(np.zeros((1, 2, 4, 4, 1), np.uint8))
    report.write_report(tmp_path / "r", title="T", sections=[report.Picture(strip, "Drafts.")])
    assert '<img class="images"' in (tmp_path / "r").read_text(encoding="utf-8")


def test_text_is_escaped_and_split_into_paragraphs(page):
    assert "<title>Digits &lt;1&gt;</title>" in page
    assert "<h2>Start &gt; end</h2>\n<p>One &amp; two.</p>\n<p>Three &lt;script&gt;" in page
    assert "<td>refined &amp; &lt;b&gt;warm&lt;/b&gt;</td>" in page
    assert 'alt="Samples &quot;as drawn&quot;."' in page
    assert '<p class="note">A &quot;note&quot;.</p>' in page


def test_numbers_stand_right_with_a_true_minus(page):
    assert '<th>sampler</th><th class="number">FD</th>' in page
    assert '<td class="number">0.250</td><td class="number">–</td>' in page
    assert '<td class="number">\u22120.05 ± 0.01</td>' in page


def test_table_text_is_aligned():
    assert report.table_text(HEADER, ROWS).splitlines() == [
        "sampler                   FD    difference",
        "---------------------  -----  ------------",
        "plain                  0.250             –",
        "refined & <b>warm</b>  0.200  -0.05 ± 0.01",
    ]


def test_rows_must_fit_the_header():
    with pytest.raises(ValueError, match="Row 1 of the table has 2 cells, its header has 3"):
        report.table_text(HEADER, [ROWS[0], ["plain", 1]])
