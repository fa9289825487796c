"""What the report of windows refuses, and its page for speculative sampling."""

import numpy as np
import pytest

from arcond_jax import build
from arcond_jax.analysis import report, window_report


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("digits:mar", [], "digits_mar has none"),
        ("digits:base", [], "digits_base has none"),
        ("digits:tensorar", ["tensorar.window=1"], "digits_tensorar has none"),
        ("digits:tensorar", ["sampling.stride=2"], r"stride 2 has no drafts to show: set it to 1"),
    ],
)
def test_without_drafts_there_is_no_report(name, overrides, message):
    config = build.load_config(name, overrides)
    with pytest.raises(build.ConfigError, match=message) as raised:
        window_report.with_drafts(config)
    assert "\n" not in str(raised.value)


def test_drafts_that_are_fed_back_stay_so():
    config = build.load_config("digits:tensorar", ["sampling.drafts=feed"])
    assert window_report.with_drafts(config) is config
    off = build.load_config("digits:tensorar")
    assert window_report.with_drafts(off).sampling.drafts == "draw"


def test_speculative_sampling_has_calls_and_no_drafts(tmp_path):
    config = build.load_config("digits:tensorar")
    emitted = np.array([[3, 1, 0, 1], [1, 1, 0, 1]])
    found = {
        "model": config.name,
        "checkpoint_step": 3,
        "num_images": 2,
        "seed": 0,
        "window": 4,
        "own_drafts": "off",
        "cost": {
            "parameters_base": 100,
            "parameters_windows": 25,
            "operations_per_position": {"base": 1e6, "drafts_off": 2e6, "as_drawn": None},
            "seconds_per_image": {"drafts_off": 0.5, "as_drawn": 0.25},
            "batch_size": 2,
        },
        **window_report.numbers(config, None, emitted, np.zeros(2, int)),
    }
    intro, calls, reading, cost = window_report.sections(found, None)
    assert isinstance(calls, report.Table) and isinstance(cost, report.Table)
    assert "drafts of this run" not in intro.body.lower() and "no quality" in reading.body
    assert calls.rows == [[1, 0.5], [2, 0.5], [3, 1.0]]
    assert "2.00 codes a call of the network, over 8 calls" in calls.note
    assert [row[1] for row in cost.rows] == ["1", "2", None]
    assert [row[-1] for row in cost.rows] == [1.0, 1.0, 2.0]
    assert "25.0% of the 100" in cost.note
    page = tmp_path / "page.html"
    report.write_report(page, title="t", sections=[intro, calls, reading, cost])
    assert page.exists()
