"""How far a Frechet distance is off for few images, and that a kernel distance is not: a picture.

    python benchmarks/fid_bias.py docs/fid_bias.png

Rows are Gaussian in 256 dimensions, with variances that fall as those of image features do, so that
the true distances are known: 0 where both sets have one law, and that of a shifted mean.
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from arcond_jax.evaluation import frechet, kernel_distance, moments

WIDTH, COUNTS, NUM_SEEDS = 256, (300, 500, 1000, 2500, 5000, 10_000, 25_000, 50_000), 5
DEVIATIONS = 2.0 * np.arange(1, WIDTH + 1) ** -0.5
SHIFTS = {"one law": 0.0, "means 1 apart": 1.0}


def main(path: str) -> None:
    """Measures, prints the means and draws them."""
    law = moments.Statistics(np.zeros(WIDTH), np.diag(DEVIATIONS**2), None)
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), constrained_layout=True)
    for color, (name, shift) in zip(("C0", "C1"), SHIFTS.items(), strict=True):
        distances = np.zeros((2, NUM_SEEDS, len(COUNTS)))
        for seed in range(NUM_SEEDS):
            rng = np.random.default_rng(seed)
            real = rng.standard_normal((2000, WIDTH)) * DEVIATIONS
            for at, count in enumerate(COUNTS):
                rows = rng.standard_normal((count, WIDTH)) * DEVIATIONS
                rows[:, 0] += shift
                found = moments.statistics(rows)
                distances[0, seed, at] = frechet.frechet_distance(found, law)
                kernel = kernel_distance.kernel_distance(rows[:5000], real, num_subsets=10)
                distances[1, seed, at] = kernel.mean
        for axis, each in zip(axes, distances, strict=True):
            mean, error = each.mean(axis=0), each.std(axis=0, ddof=1)
            axis.errorbar(COUNTS, mean, error, color=color, marker="o", ms=3, label=name)
        axes[0].axhline(shift**2, color=color, ls=":", lw=1)
        means = zip(COUNTS, distances[0].mean(axis=0), strict=True)
        print(name, *(f"{count}: {x:.3f}" for count, x in means))
    axes[1].axhline(0.0, color="C0", ls=":", lw=1)
    axes[0].set_title("Fréchet distance; dotted: the true one")
    axes[1].set_title("kernel distance")
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlabel("images")
        axis.legend()
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(sys.argv[1])
