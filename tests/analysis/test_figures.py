"""Sizes and contents of the pictures."""

import io
import resource
import signal

import numpy as np
import PIL.Image
import pytest

from arcond_jax.analysis import figures

IMAGE = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 1), dtype=np.uint8)


def size_of(figure):
    return PIL.Image.open(io.BytesIO(figures.figure_png(figure))).size


def test_image_grid_has_the_stated_size_and_places_images_by_row():
    grid = figures.image_grid(IMAGE, rows=2, columns=4, upscale=3, gap=2)
    assert grid.shape == (2 * 12 + 2, 4 * 15 + 3 * 2, 4)
    second_row_first = grid[14:26, 0:15]
    np.testing.assert_array_equal(second_row_first[::3, ::3, 0], IMAGE[4, ..., 0])
    np.testing.assert_array_equal(second_row_first[2::3, 2::3, 2], IMAGE[4, ..., 0])
    assert (grid[12:14] == 255).all()  # a gap
    assert (grid[14:, 3 * 17 :] == 255).all()  # the eighth cell has no image


def test_image_grid_keeps_colours_and_refuses_other_channels():
    colour = np.concatenate([IMAGE, 255 - IMAGE, IMAGE // 2], axis=-1)
    grid = figures.image_grid(colour, rows=1, columns=1, upscale=1)
    np.testing.assert_array_equal(grid[..., :3], colour[0])
    with pytest.raises(ValueError, match="got 2"):
        figures.image_grid(colour[..., :2], rows=1, columns=1)


def test_class_grid_has_one_row_per_class():
    label = np.array([2, 0, 2, 0, 2, 0, 0])
    grid = figures.class_grid(IMAGE, label, num_classes=3, per_class=3, upscale=1, gap=1)
    assert grid.shape == (3 * 4 + 2, 3 * 5 + 2, 4)
    np.testing.assert_array_equal(grid[0:4, 0:5, 0], IMAGE[1, ..., 0])
    assert (grid[5:9] == 255).all()  # class 1 has no images
    np.testing.assert_array_equal(grid[10:14, 12:17, 0], IMAGE[4, ..., 0])


def test_png_round_trip(tmp_path):
    grid = figures.image_grid(IMAGE, rows=2, columns=2, upscale=2)
    figures.write_png(tmp_path / "grid", grid)
    np.testing.assert_array_equal(np.asarray(PIL.Image.open(tmp_path / "grid")), grid)
    assert figures.png_bytes(grid) == figures.png_bytes(grid)


def test_half_a_png_never_stands_under_its_name(tmp_path):
    """A limit on the size of files stands for a full disk."""
    grid = np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match=r"s.png cannot be written: File too large"):
            figures.write_png(tmp_path / "s.png", grid)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_refinement_strip_runs_from_first_draft_to_final(channels):
    drafts = np.zeros((2, 3, 4, 4, channels), np.uint8)
    drafts[:, 0] = 200
    figure = figures.refinement_strip(drafts)
    titles = [axis.get_title("center") for axis in figure.axes]
    assert titles == ["2 ahead", "1 ahead", "final", "", "", ""]
    assert [axis.images[0].get_array().max() for axis in figure.axes] == [0, 0, 200] * 2
    assert size_of(figure) == (600, 470)


def test_training_curves_draw_what_is_there():
    rows = [
        {"step": 1, "loss": 2.0, "cross_entropy": 3.0},
        {"step": 2, "validation/loss": 2.5},
        {"step": 3, "loss": 1.0, "cross_entropy": 2.0, "cross_entropy/draft_1": 2.2},
        {"loss": 7.0},
        {"step": 4, "loss": float("nan"), "images_per_second": 12.0},
    ]
    figure = figures.training_curves(rows)
    assert [axis.get_title("left") for axis in figure.axes] == ["Loss", "Cross-entropy (nats)"]
    curves = {line.get_label(): line for axis in figure.axes for line in axis.lines}
    assert set(curves) == {"loss", "validation/loss", "code", "draft_1"}
    np.testing.assert_array_equal(curves["loss"].get_xdata(), [1, 3, 4])
    assert size_of(figure) == (1300, 460)
    with pytest.raises(ValueError, match="No loss to draw: 1 rows"):
        figures.training_curves([{"step": 1, "accuracy": 0.5}])


def test_drift_plot_with_and_without_error_bars():
    before, after = np.array([0.1, 0.2, 0.4]), np.array([0.05, 0.1, 0.1])
    plain = figures.drift_plot(before, after)
    assert [text.get_text() for text in plain.axes[0].get_legend().get_texts()] == [
        "not refined",
        "refined",
    ]
    barred = figures.drift_plot(before, after, before_error=before / 9, after_error=after / 9)
    assert len(barred.axes[0].collections) == 2
    assert not plain.axes[0].collections
    assert size_of(barred) == size_of(plain) == (975, 520)


@pytest.mark.parametrize("lowest", [0, 0.3])
def test_quality_against_cost_joins_points_of_one_name(lowest):
    rows = [
        {"name": "joint", "frechet_distance": 0.2, "num_head_evaluations": 5},
        {"name": "joint", "frechet_distance": 0.3, "num_head_evaluations": 1},
        {
            "name": "codes",
            "frechet_distance": 0.25,
            "num_head_evaluations": lowest,
            "standard_error": 0.01,
        },
    ]
    figure = figures.quality_against_cost(rows, frechet_distance_real=0.1)
    axis = figure.axes[0]
    np.testing.assert_array_equal(axis.lines[0].get_xdata(), [1, 5])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["joint", "codes", "real training images"]
    ticks = [tick.get_text() for tick in axis.get_xticklabels()]
    assert ticks == (["0", "1", "2", "5"] if lowest == 0 else ["0.5", "1", "2", "5"])
    assert size_of(figure) == (1105, 660)


def test_quality_against_cost_needs_its_entries():
    with pytest.raises(ValueError, match="no rows"):
        figures.quality_against_cost([])
    with pytest.raises(ValueError, match=r"Row 0 .* lacks \['milliseconds'\]"):
        figures.quality_against_cost(
            [{"name": "joint", "frechet_distance": 0.2}], cost="milliseconds"
        )
