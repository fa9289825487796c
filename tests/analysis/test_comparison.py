"""Tables of systems side by side, from their cards."""

import json

import numpy as np

from arcond_jax.analysis import comparison, report
from arcond_jax.evaluation import card


def measured(distance, *, left_out=()):
    settings = card.Settings(sampling={}, refinement={}, seed=0, checkpoint_step=1)
    found = {name: distance for name in comparison.METRICS if name not in left_out}
    return comparison.Measured(
        cards=[card.EvaluationCard(settings, {}, found), card.EvaluationCard(settings, {}, found)],
        milliseconds=[1.0, 2.0],
        drift=[np.zeros(3), np.zeros(3)],
        drift_drawn=[np.zeros(3), np.zeros(3)],
        refinement_share=0.0,
        image_uint8=np.zeros((1, 2, 2, 1), np.uint8),
    )


def test_what_the_cards_lack_is_left_out_of_the_table():
    """Large images have no Frechet distance of pixels."""
    lacking = ("frechet_distance_pixels", "nearest_neighbour_ratio")
    systems = {"plain": measured(0.5), "large": measured(0.25, left_out=lacking)}
    header, rows = comparison.table(systems, baseline="plain")
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    assert cells[0]["FD pixels"] == 0.5 and cells[0]["NN"] == "0.50"
    assert cells[1]["FD pixels"] is None and cells[1]["NN"] is None
    assert cells[1]["FD - baseline"] == "-0.250 ± 0.000"
    assert "large" in report.table_text(header, rows)
    written = json.loads(json.dumps(comparison.as_json(systems)))
    assert set(written["plain"]["metrics"]) - set(written["large"]["metrics"]) == set(lacking)
