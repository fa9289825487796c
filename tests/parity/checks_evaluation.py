"""Metrics of ADM's evaluator."""

import golden as golden_lib
import numpy as np

from arcond_jax.evaluation import frechet, moments, neighbours, precision_recall, scores

METRIC = 1e-6  # relative: the evaluator has float32 means and scores, ours are float64
HALF = 0.02  # of the radii in float16, which depend on the order of the sums
FEW = 5  # samples inside or outside by that


def check(golden: golden_lib.Golden) -> None:
    given, expected = golden.inputs, golden.outputs
    names = ("ref", "sample", "ref_spatial", "sample_spatial")
    found = {name: moments.statistics(given[name]) for name in names}
    for name in ("ref", "sample"):
        sigma = expected[f"{name}_sigma"]
        close = np.abs(sigma).max() * 1e-12
        np.testing.assert_allclose(found[name].covariance, sigma, rtol=0, atol=close)
        mu = expected[f"{name}_mu"]
        np.testing.assert_allclose(found[name].mean, mu, rtol=0, atol=1e-6 * np.abs(mu).max())
    split_size = golden.config["split_size"]
    log_p = np.log(np.maximum(given["probs"], np.finfo(np.float32).tiny))
    ours = {
        "fid": frechet.frechet_distance(found["sample"], found["ref"]),
        "sfid": frechet.frechet_distance(found["sample_spatial"], found["ref_spatial"]),
        "is_probs": scores.inception_score(log_p),
        "is_probs_split": scores.inception_score(log_p, split_size=split_size),
        "is_features": scores.inception_score(given["sample"] @ given["softmax_w"]),
    }
    for name, value in ours.items():
        np.testing.assert_allclose(value, expected[name], rtol=METRIC, err_msg=name)
    few = FEW / min(len(given["ref"]), len(given["sample"]))
    check_manifolds(golden, "pr_fp16", 1.0, "float16", radii=HALF, shares=few)
    scale = golden.config["overflow_scale"]  # beyond float16, as real features of that size are not
    for dtype in ("float16", "float32", "float64"):
        check_manifolds(golden, "pr_fp32", scale, dtype, radii=1e-5, shares=0.0)


def check_manifolds(
    golden: golden_lib.Golden,
    name: str,
    scale: float,
    dtype: neighbours.Dtype,
    *,
    radii: float,
    shares: float,
) -> None:
    features = {x: golden.inputs[x] * np.float32(scale) for x in ("ref", "sample")}
    expected = golden.outputs
    for which, rows in features.items():
        found = neighbours.neighbour_radius(rows, num_neighbours=3, dtype=dtype)
        wanted = expected[f"{name}/radii_{which}"][:, 0]
        np.testing.assert_allclose(found, wanted, rtol=radii, err_msg=f"{name} {which}")
    precision, recall = precision_recall.precision_recall(
        features["sample"], features["ref"], dtype=dtype
    )
    assert abs(precision - expected[f"{name}/precision"]) <= shares
    assert abs(recall - expected[f"{name}/recall"]) <= shares


CHECKS = {"adm_metrics": check}
