"""The bias of a Frechet distance at few images, drawn as docs/fid_bias.png.

Features are Gaussian, so the distance that N images should give is known in closed form. Their
variances fall as 1 / rank, as those of image features roughly do. Each point is a mean
of several draws against the exact reference, with its standard deviation.

  python benchmarks/fid_bias.py --out docs/fid_bias.png
"""

import argparse
import pathlib

import numpy as np
from matplotlib import figure

from arcond_jax.evaluation import frechet, moments

WIDTH = 64  # features
COUNTS = (100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000)
GAPS = {"as good as real": 0.0, "distance 1": 1.0, "distance 5": 5.0}
NUM_DRAWS = 5


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/fid_bias.png"))
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    spread = np.sqrt(10.0 / np.arange(1, WIDTH + 1))
    exact = moments.Statistics(np.zeros(WIDTH), np.diag(spread**2), count=2)
    picture = figure.Figure(figsize=(6, 3.5), layout="constrained")
    axes = picture.subplots()
    for name, distance in GAPS.items():
        # A shift of the mean alone: the squared length of it is the distance.
        shift = np.full(WIDTH, np.sqrt(distance / WIDTH))
        found = np.array(
            [
                [
                    frechet.frechet_distance(
                        moments.statistics(shift + spread * rng.standard_normal((n, WIDTH))), exact
                    )
                    for n in COUNTS
                ]
                for _ in range(NUM_DRAWS)
            ]
        )
        line = axes.errorbar(COUNTS, found.mean(0), found.std(0), label=name, capsize=2)
        axes.axhline(distance, color=line[0].get_color(), linestyle=":", linewidth=1)
        print(name, dict(zip(COUNTS, found.mean(0).round(3).tolist(), strict=True)))
    axes.set(xscale="log", xlabel="images", ylabel="Frechet distance", title="Few images: too far")
    axes.legend()
    picture.savefig(args.out, dpi=110)


if __name__ == "__main__":
    main()
