"""`arcond train`: train a config in a working directory, or go on where it stopped."""

import argparse

import numpy as np
from jaxtyping import UInt8

from arcond_jax import build
from arcond_jax.analysis import figures
from arcond_jax.cli import paths
from arcond_jax.run import training

EPILOG = """examples:
  arcond train --config configs/digits.py:joint --workdir runs/digits
  arcond train --config digits:ar --workdir runs/ar --config.training.learning_rate=1e-3

  arcond train --config mar_base_imagenet256 --init weights/mar --workdir runs/tuned

Run the same command again to resume. SIGTERM saves and exits 0."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config file")
    parser.add_argument("--workdir", required=True, type=paths.folder, help="checkpoints and logs")
    parser.add_argument("--init", type=paths.folder, help="a workdir whose weights to start from")


def main(args: argparse.Namespace) -> None:
    config = build.load_config(args.config, args.overrides)
    workdir = args.workdir

    def show(
        step: int, image_uint8: UInt8[np.ndarray, "n height width channels"], label: np.ndarray
    ) -> None:
        (workdir / "samples").mkdir(exist_ok=True)
        sheet = figures.class_grid(
            image_uint8, label, num_classes=config.data.num_classes, per_class=10
        )
        figures.write_png(workdir / "samples" / f"step_{step:08d}.png", sheet)

    complete = training.train(config, workdir, show=show, init_from=args.init)
    print(f"{'complete' if complete else 'stopped and saved'}: {workdir}")
