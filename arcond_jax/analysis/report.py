"""A report as one HTML file: text, tables and pictures in, nothing to load and nothing that runs.

Pictures are inlined, there is no script and no address of another file, so the file can be mailed,
printed or opened years later.
"""

import base64
import dataclasses
import html
import os
import re
from collections.abc import Sequence

import matplotlib.figure
import numpy as np
from jaxtyping import UInt8

from arcond_jax import atomic
from arcond_jax.analysis import figures

Cell = str | int | float | None

# A number, perhaps with its error or unit: "0.18", "-1.2e-3", "0.25 +- 0.01", "3.1 ms", "98 %".
NUMERIC = re.compile(r"[-+\u2212]?[\d.,]+(e[-+]?\d+)?(\s*(±|\+-)\s*[\d.,]+)?(\s*(%|x|×|ms|s))?")

STYLESHEET = """
:root { color-scheme: light dark;
  --paper: #fdfcfa; --ink: #1d1c1a; --soft: #66625c; --rule: #d5d1ca; --strong: #1d1c1a; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #17181a; --ink: #dedbd5; --soft: #98948c; --rule: #3a3b3d; --strong: #dedbd5; }
  img.plot { filter: invert(1) hue-rotate(180deg); } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font: 1.0625rem/1.55 Charter, "Bitstream Charter", "Iowan Old Style", "Palatino Linotype",
    Palatino, Georgia, serif; text-rendering: optimizeLegibility; }
main { max-width: 42rem; margin: 0 auto; padding: 3.5rem 1.25rem 5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 600; margin: 0 0 2.2rem;
  padding-bottom: 1.1rem; border-bottom: 1px solid var(--rule); text-wrap: balance; }
h2 { font-size: 1.25rem; line-height: 1.3; font-weight: 600; margin: 2.6rem 0 .6rem;
  break-after: avoid; }
p { margin: 0 0 .9rem; hyphens: auto; overflow-wrap: break-word; }
figure { margin: 2rem 0; break-inside: avoid; }
figcaption { font-size: .9rem; line-height: 1.45; color: var(--soft); }
figcaption b { color: var(--ink); font-weight: 600; }
.picture figcaption { margin-top: .7rem; }
.table figcaption { margin-bottom: .6rem; }
img { display: block; max-width: 100%; height: auto; }
img.pixels { image-rendering: pixelated; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; line-height: 1.35;
  border-top: 1.5px solid var(--strong); border-bottom: 1.5px solid var(--strong);
  font-variant-numeric: lining-nums tabular-nums; }
th, td { padding: .32rem 0 .32rem 1.1rem; text-align: left; vertical-align: baseline; }
th:first-child, td:first-child { padding-left: 0; }
th { font-weight: 600; vertical-align: bottom; border-bottom: .75px solid var(--strong); }
.number { text-align: right; }
td.number { white-space: nowrap; }
tbody tr:first-child td { padding-top: .5rem; }
tbody tr:last-child td { padding-bottom: .5rem; }
.note { font-size: .85rem; line-height: 1.45; color: var(--soft); margin: .5rem 0 0; }
@media (max-width: 34rem) { main { padding-top: 2rem; } body { font-size: 1rem; }
  h1 { font-size: 1.55rem; } td:first-child { min-width: 7.5rem; } }
@media print { @page { margin: 20mm 18mm; } body { font-size: 10.5pt; background: none; }
  main { max-width: none; padding: 0; } .scroll { overflow: visible; } }
"""


@dataclasses.dataclass(frozen=True)
class Text:
    """Paragraphs, parted by blank lines, under an optional heading."""

    body: str
    heading: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """A numbered table.

    Attributes:
      caption: What the table shows, printed above it.
      header: Column names.
      rows: Cells; floats are printed with three decimals, None as a dash. A column whose cells are
        all numbers (with error or unit, if any) is set flush right.
      note: Small print below the table.
    """

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Picture:
    """A numbered picture.

    Attributes:
      image: A figure, or an RGB or RGBA picture shown pixel by pixel.
      caption: What the picture shows, printed below it.
      alternative: Description for those who do not see the picture; the caption when empty.
    """

    image: matplotlib.figure.Figure | UInt8[np.ndarray, "height width channels"]
    caption: str
    alternative: str = ""


def write_report(
    path: str | os.PathLike, *, title: str, sections: Sequence[Text | Table | Picture]
) -> None:
    """Writes the sections, in order, as one HTML page. All text is escaped.

    Raises:
      ValueError: A table row with another number of cells than the header.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    num_tables = num_pictures = 0
    for section in sections:
        match section:
            case Text():
                body.append(_text_html(section))
            case Table():
                num_tables += 1
                body.append(_table_html(section, num_tables))
            case Picture():
                num_pictures += 1
                body.append(_picture_html(section, num_pictures))
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLESHEET}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )
    atomic.write_text(path, page)


def table_text(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """The table as aligned lines for a terminal, numbers flush right.

    Raises:
      ValueError: A row with another number of cells than the header.
    """
    cells, numeric = _format_cells(header, rows)
    lines = [list(header), *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if is_number else cell.ljust(width)
            for cell, width, is_number in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def _format_cells(
    header: Sequence[str], rows: Sequence[Sequence[Cell]]
) -> tuple[list[list[str]], list[bool]]:
    """Cells as text, and for each column whether it holds numbers only."""
    for index, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(
                f"Row {index} of the table has {len(row)} cells, its header has {len(header)}."
            )
    cells = [[_format_cell(cell) for cell in row] for row in rows]
    columns = list(zip(*cells, strict=True)) or [()] * len(header)
    numeric = [
        any(cell != "–" for cell in column)
        and all(cell == "–" or NUMERIC.fullmatch(cell) for cell in column)
        for column in columns
    ]
    return cells, numeric


def _format_cell(cell: Cell) -> str:
    if cell is None:
        return "–"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _text_html(text: Text) -> str:
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", text.body.strip())]
    heading = f"<h2>{html.escape(text.heading)}</h2>\n" if text.heading else ""
    return heading + "\n".join(f"<p>{html.escape(part)}</p>" for part in paragraphs if part)


def _table_html(table: Table, number: int) -> str:
    cells, numeric = _format_cells(table.header, table.rows)

    def line(tag: str, row: Sequence[str]) -> str:
        parts = (
            f'<{tag} class="number">{_minus(html.escape(cell))}</{tag}>'
            if is_number
            else f"<{tag}>{html.escape(cell)}</{tag}>"
            for cell, is_number in zip(row, numeric, strict=True)
        )
        return f"<tr>{''.join(parts)}</tr>"

    note = f'\n<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<figure class="table">\n<figcaption><b>Table {number}.</b> '
        f'{html.escape(table.caption)}</figcaption>\n<div class="scroll"><table>\n'
        f"<thead>{line('th', table.header)}</thead>\n<tbody>\n"
        + "\n".join(line("td", row) for row in cells)
        + f"\n</tbody>\n</table></div>{note}\n</figure>"
    )


def _minus(number: str) -> str:
    """Sets a leading hyphen as the minus sign, which is as wide as a plus."""
    return "\u2212" + number[1:] if number.startswith("-") else number


def _picture_html(picture: Picture, number: int) -> str:
    if isinstance(picture.image, matplotlib.figure.Figure):
        # A dark page shows plots inverted; a figure that holds images stays as it is.
        kind = "images" if any(axis.images for axis in picture.image.axes) else "plot"
        png = figures.figure_png(picture.image)
        width = round(picture.image.get_figwidth() * 96)  # a CSS inch has 96 pixels
    else:
        kind, png = "pixels", figures.png_bytes(picture.image)
        width = picture.image.shape[1]
    data = base64.b64encode(png).decode("ascii")
    alternative = html.escape(picture.alternative or picture.caption)
    # On a phone a wide plot scrolls rather than shrinking until its labels cannot be read.
    least = f' style="min-width: min({width}px, 26rem)"' if kind == "plot" else ""
    return (
        f'<figure class="picture">\n<div class="scroll"><img class="{kind}" width="{width}"{least} '
        f'alt="{alternative}" src="data:image/png;base64,{data}"></div>\n'
        f"<figcaption><b>Figure {number}.</b> {html.escape(picture.caption)}</figcaption>\n"
        "</figure>"
    )
