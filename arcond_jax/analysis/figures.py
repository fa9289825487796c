"""Pictures of samples and figures of runs: arrays in, uint8 pictures or matplotlib figures out.

No figure touches pyplot, so drawing has no state and needs no screen.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from jaxtyping import Float, Int, UInt8

from arcond_jax import atomic

TEXT_WIDTH = 6.5  # inches: the text column of the report and of most papers
TEXT_SIZE, TEXT_CELL = 12, 96  # pixels: height of a class name on a sheet, width of its cell
RESOLUTION = 200  # pixels per inch of a saved figure

# Okabe and Ito (2008): told apart by colour-blind readers. Their yellow is left out, too pale here.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#444444")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#444444",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "figure.constrained_layout.use": True,
}


def image_grid(
    image_uint8: UInt8[np.ndarray, "n height width channels"],
    *,
    rows: int,
    columns: int,
    upscale: int = 1,
    gap: int = 2,
) -> UInt8[np.ndarray, "grid_height grid_width 4"]:
    """Lays images out row by row; the rest of the cells and the gaps are white.

    Args:
      image_uint8: Grey (1 channel) or RGB (3 channels); the first `rows * columns` are shown.
      rows: Rows of the grid.
      columns: Columns of the grid.
      upscale: Each pixel becomes a square of this many pixels a side.
      gap: Pixels between neighbours, after upscaling.

    Returns:
      RGBA picture, `rows * height * upscale + (rows - 1) * gap` high and likewise wide.

    Raises:
      ValueError: Images with neither 1 nor 3 channels.
    """
    _, height, width, channels = image_uint8.shape
    if channels not in (1, 3):
        raise ValueError(f"Pictures need 1 (grey) or 3 (RGB) channels, got {channels}.")
    cell_height, cell_width = height * upscale, width * upscale
    shape = (rows * (cell_height + gap) - gap, columns * (cell_width + gap) - gap, 4)
    grid = np.full(shape, 255, np.uint8)
    for index, image in enumerate(image_uint8[: rows * columns]):
        top = index // columns * (cell_height + gap)
        left = index % columns * (cell_width + gap)
        cell = grid[top : top + cell_height, left : left + cell_width]
        cell[..., :3] = image.repeat(upscale, axis=0).repeat(upscale, axis=1)
    return grid


def class_grid(
    image_uint8: UInt8[np.ndarray, "n height width channels"],
    label: Int[np.ndarray, " n"],
    *,
    num_classes: int,
    per_class: int,
    upscale: int = 1,
    gap: int = 2,
    names: Sequence[str] | None = None,
) -> UInt8[np.ndarray, "grid_height grid_width 4"]:
    """One row per class: its first `per_class` images, in the order given.

    A class with fewer images leaves white cells. With `names` of the classes, each row begins
    with its own, cut to what fits. See `image_grid` for the rest.
    """
    rows = [
        image_grid(image_uint8[label == row], rows=1, columns=per_class, upscale=upscale, gap=gap)
        for row in range(num_classes)
    ]
    if names is not None:
        rows = [
            np.concatenate([_written(name, len(row)), row], axis=1)
            for name, row in zip(names, rows, strict=False)
        ]
    spacer = np.full((gap, rows[0].shape[1], 4), 255, np.uint8)
    return np.concatenate([part for row in rows for part in (row, spacer)][:-1])


def _written(text: str, height: int) -> UInt8[np.ndarray, "height width 4"]:
    """A word on white ground, in a size that fits the height."""
    size = min(height, TEXT_SIZE)
    picture = PIL.Image.new("RGBA", (TEXT_CELL, height), "white")
    font = PIL.ImageFont.load_default(size)
    PIL.ImageDraw.Draw(picture).text((0, (height - size) // 2), text, (64, 64, 64, 255), font)
    return np.array(picture)


def png_bytes(picture: UInt8[np.ndarray, "height width channels"]) -> bytes:
    """Encodes RGB or RGBA as PNG, without time stamps: equal pictures give equal bytes."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


def write_png(path: str | os.PathLike, picture: UInt8[np.ndarray, "height width channels"]) -> None:
    """Writes an RGB or RGBA picture, whole or not at all; the name need not end in .png."""
    with atomic.file(path) as file:
        file.write(png_bytes(picture))


@matplotlib.rc_context(STYLE)
def figure_png(figure: matplotlib.figure.Figure) -> bytes:
    """Encodes a figure as PNG on a transparent ground, at `RESOLUTION` pixels per inch."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=RESOLUTION, transparent=True)
    return buffer.getvalue()


@matplotlib.rc_context(STYLE)
def refinement_strip(
    drafts: UInt8[np.ndarray, "n entries height width channels"],
) -> matplotlib.figure.Figure:
    """Shows each image as every entry of the window would have it, first draft to final.

    Args:
      drafts: `drafts[:, j]` is decoded from what entry j was at every position, so entry 0 is
        the final image and the last one the draft made longest ahead. One row per image.
    """
    num_images, num_entries, height, width, _ = drafts.shape
    # An inch per image keeps 256 pixels readable, and a strip of few entries small.
    cell = min(1.0, TEXT_WIDTH / num_entries)
    figure, axes = _subplots(
        num_images,
        num_entries,
        size=(cell * num_entries, cell * height / width * num_images + 0.35),
    )
    for (row, column), axis in np.ndenumerate(axes):
        entry = num_entries - 1 - column
        shown = drafts[row, entry]
        axis.imshow(shown[..., 0] if shown.shape[-1] == 1 else shown, cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
        if row == 0:
            ahead = "final" if entry == 0 else f"{entry} ahead"
            # Mid grey reads on light and on dark pages; a figure with images is never inverted.
            axis.set_title(ahead, loc="center", color="#808080")
    return figure


@matplotlib.rc_context(STYLE)
def training_curves(rows: Sequence[Mapping[str, Any]]) -> matplotlib.figure.Figure:
    """Draws the losses of a run: total, diffusion loss and cross-entropy of codes and drafts.

    Args:
      rows: One mapping per log line, as read from a JSON-lines file, each with "step". Drawn are
        numbers named "loss", after any prefix such as "validation/", and those whose name contains
        "diffusion" or "cross_entropy". A row may lack any of them.

    Raises:
      ValueError: No row holds a loss beside its step.
    """
    names = sorted({name for row in rows if "step" in row for name in row})
    panels = {
        "Loss": [name for name in names if name.split("/")[-1] == "loss"],
        "Diffusion loss": [name for name in names if "diffusion" in name],
        "Cross-entropy (nats)": [name for name in names if "cross_entropy" in name],
    }
    panels = {title: members for title, members in panels.items() if members}
    if not panels:
        raise ValueError(f"No loss to draw: {len(rows)} rows with the entries {names}.")

    figure, axes = _subplots(1, len(panels), size=(TEXT_WIDTH, 2.3))
    for axis, (title, members) in zip(axes[0], panels.items(), strict=True):
        for index, name in enumerate(members):
            curve = [(row["step"], row[name]) for row in rows if "step" in row and name in row]
            # The panel's title already says cross-entropy: the rest fits beside the curves.
            label = name.replace("cross_entropy/", "").replace("cross_entropy", "code")
            axis.plot(*zip(*curve, strict=True), color=COLOURS[index % len(COLOURS)], label=label)
        axis.set_title(title)
        axis.set_xlabel("training step")
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4, integer=True))
        if len(members) > 1:
            axis.legend(handlelength=1.2)
    return figure


@matplotlib.rc_context(STYLE)
def drift_plot(
    before: Float[np.ndarray, " slots"],
    after: Float[np.ndarray, " slots"],
    *,
    before_error: Float[np.ndarray, " slots"] | None = None,
    after_error: Float[np.ndarray, " slots"] | None = None,
    distance: str = "energy distance to ideal conditions",
) -> matplotlib.figure.Figure:
    """Draws how far the conditions of each slot have drifted, without and with refinement.

    Args:
      before: Distance to the ideal law per slot, without refinement.
      after: The same with refinement.
      before_error: Standard error of `before`; None draws no bars.
      after_error: Standard error of `after`; None draws no bars.
      distance: What is measured, for the axis.
    """
    figure, axes = _subplots(1, 1, size=(TEXT_WIDTH * 0.75, 2.6))
    axis = axes[0, 0]
    slots = np.arange(len(before))
    series = (
        ("not refined", before, before_error, "o", COLOURS[1]),
        ("refined", after, after_error, "s", COLOURS[0]),
    )
    for name, values, error, marker, colour in series:
        axis.errorbar(
            slots, values, error, label=name, marker=marker, color=colour, elinewidth=0.8, capsize=2
        )
    axis.axhline(0.0, color="#999999", linewidth=0.6, zorder=0)
    axis.set_xlabel("slot, in decoding order")
    axis.set_ylabel(distance)
    axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axis.legend()
    return figure


@matplotlib.rc_context(STYLE)
def quality_against_cost(
    rows: Sequence[Mapping[str, Any]],
    *,
    cost: str = "num_head_evaluations",
    cost_label: str = "head evaluations per token",
    frechet_distance_real: float | None = None,
) -> matplotlib.figure.Figure:
    """Draws Frechet distance against sampling cost; points of one name form one curve.

    Args:
      rows: Each with "name", "frechet_distance", the entry named by `cost` (at least 0) and, for
        an error bar, "standard_error".
      cost: Entry on the horizontal axis, drawn logarithmically above 1.
      cost_label: That entry in words.
      frechet_distance_real: Level of real training images, drawn as a dashed line; None draws none.

    Raises:
      ValueError: No rows, or a row without one of the three entries.
    """
    if not rows:
        raise ValueError("Quality against cost has no rows to draw.")
    for index, row in enumerate(rows):
        missing = {"name", "frechet_distance", cost} - row.keys()
        if missing:
            raise ValueError(f"Row {index} of quality against cost lacks {sorted(missing)}.")

    figure, axes = _subplots(1, 1, size=(TEXT_WIDTH * 0.85, 3.3))
    axis = axes[0, 0]
    handles = []
    for index, name in enumerate(dict.fromkeys(row["name"] for row in rows)):
        curve = sorted((row for row in rows if row["name"] == name), key=lambda row: row[cost])
        handle = axis.errorbar(
            [row[cost] for row in curve],
            [row["frechet_distance"] for row in curve],
            [row.get("standard_error", 0.0) for row in curve],
            label=name,
            marker=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            elinewidth=0.8,
            capsize=2,
        )
        handles.append(handle)
    if frechet_distance_real is not None:
        level = axis.axhline(
            frechet_distance_real,
            label="real training images",
            color="#777777",
            linewidth=0.8,
            linestyle=(0, (4, 3)),
        )
        handles.append(level)
    _scale_costs(axis, [row[cost] for row in rows])
    axis.set_xlabel(cost_label)
    axis.set_ylabel("Fréchet distance")
    figure.legend(handles=handles, loc="outside lower left", ncols=3)
    return figure


def _scale_costs(axis: Any, costs: Sequence[float | int]) -> None:
    """A logarithmic axis with round ticks, on which a cost of 0 has a place too."""
    if min(costs) > 0:
        axis.set_xscale("log")
    else:
        # Linear below 1, so that samplers without a head (cost 0) have their place.
        axis.set_xscale("symlog", linthresh=1.0, linscale=0.3)
        axis.set_xlim(left=-0.3)
    decades = range(math.floor(math.log10(min(c for c in [*costs, 1.0] if c > 0))), 7)
    series = [0.0, *(digit * 10.0**decade for decade in decades for digit in (1, 2, 5))]
    ticks = [tick for tick in series if min(costs) <= tick <= max(costs)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())


def _subplots(
    rows: int, columns: int, *, size: tuple[float, float]
) -> tuple[matplotlib.figure.Figure, np.ndarray]:
    figure = matplotlib.figure.Figure(figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=False)
