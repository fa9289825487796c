"""A sweep as a table and a picture: which settings are best, and how sure that is."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
from etils import epath

from arcond_jax import atomic
from arcond_jax.analysis import figures
from arcond_jax.evaluation import jackknife
from arcond_jax.run import sweep

NOTE = (
    "± is one standard error of the sampled images, by a jackknife of {groups} groups (Efron and "
    "Tibshirani, 1993); that of a difference is paired, since image i has the same noise in all "
    "rows. The reference and the weights are taken as they are."
)
OF_FEWER = " Rows of fewer images compare among each other alone: fewer images, higher distance."


def write(folder: epath.PathLike, found: sweep.Found) -> None:
    """Writes sweep.md and sweep.png, each whole or not at all; raises OSError in one line."""
    folder = epath.Path(folder)
    atomic.write_text(folder / "sweep.md", markdown(found))
    with atomic.file(folder / "sweep.png") as file:
        file.write(figures.figure_png(picture(found)))


def table(found: sweep.Found) -> tuple[list[str], list[list[str]]]:
    """Header and rows, the best first; with an asterisk the best."""
    best = found.best
    header = [*map(_short, found.over), "images", found.score, "above the best", "inception score"]
    order = sorted(found.rows, key=lambda row: (-row.num_images, row.frechet_distance))
    return header, [
        [
            *(f"{row.settings[name]}" for name in found.over),
            f"{row.num_images}",
            _with_error(row.frechet_distance, row.error) + (" *" if row is best else ""),
            _above(found, row),
            f"{row.inception_score:.4g}",
        ]
        for row in order
    ]


def markdown(found: sweep.Found) -> str:
    """The table with what belongs to all rows."""
    header, rows = table(found)
    best = ", ".join(f"{_short(name)} {x}" for name, x in found.best.settings.items())
    lines = [f"# {found.score} over {', '.join(map(_short, found.over))}", ""]
    lines += [f"Best (*): {best}.", ""]
    lines += [_line(header), _line(["---"] * len(header)), *map(_line, rows), ""]
    lines += [_note(found), ""]
    lines += [f"- {name}: {x}" for name, x in found.made.items() if "." not in name]
    return "\n".join(lines) + "\n"


def _note(found: sweep.Found) -> str:
    several = len({row.num_images for row in found.rows}) > 1
    return NOTE.format(groups=jackknife.NUM_GROUPS) + (OF_FEWER if several else "")


@matplotlib.rc_context(figures.STYLE)
def picture(found: sweep.Found) -> matplotlib.figure.Figure:
    """The score against the first setting, a curve for each value of the others."""
    figure = matplotlib.figure.Figure(figsize=(figures.TEXT_WIDTH * 0.85, 3.3))
    axis = figure.subplots()
    first, *others = found.over
    place = _places(found.over[first])
    for index, (name, rows) in enumerate(_curves(found, others).items()):
        rows = sorted(rows, key=lambda row: place[row.settings[first]])
        errors = [row.error for row in rows if row.error is not None]
        axis.errorbar(
            [place[row.settings[first]] for row in rows],
            [row.frechet_distance for row in rows],
            errors if len(errors) == len(rows) else None,
            label=name or None,
            marker=figures.MARKERS[index % len(figures.MARKERS)],
            color=figures.COLOURS[index % len(figures.COLOURS)],
            elinewidth=0.8,
            capsize=2,
        )
    best = found.best
    at = place[best.settings[first]], best.frechet_distance
    axis.plot(*at, "o", markersize=11, fillstyle="none", color="#444444", label="best")
    if not all(isinstance(x, int | float) for x in found.over[first]):
        axis.set_xticks(list(place.values()), [f"{x}" for x in place])
    axis.set_xlabel(first)
    axis.set_ylabel(found.score)
    axis.legend()
    return figure


def _curves(found: sweep.Found, others: Sequence[str]) -> dict[str, list[sweep.Row]]:
    """Rows by what they share: their other settings and their number of images."""
    several = len({row.num_images for row in found.rows}) > 1
    curves: dict[str, list[sweep.Row]] = {}
    for row in found.rows:
        words = [f"{_short(name)} {row.settings[name]}" for name in others]
        words += [f"{row.num_images} images"] if several else []
        curves.setdefault(", ".join(words), []).append(row)
    return curves


def _places(values: Sequence[Any]) -> Mapping[Any, float]:
    """Where values stand on an axis: numbers where they are, words one after another."""
    if all(isinstance(x, int | float) for x in values):
        return {x: float(x) for x in values}
    return {x: float(i) for i, x in enumerate(values)}


def _above(found: sweep.Found, row: sweep.Row) -> str:
    above = found.above_best(row)
    if above is None or row is found.best:
        return ""
    return _with_error(*above)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _short(name: str) -> str:
    return name.partition(".")[2]
