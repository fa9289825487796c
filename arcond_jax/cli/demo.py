"""`arcond demo`: train, refine, sample and score handwritten digits on two CPU cores."""

import argparse
import time

from arcond_jax.analysis import demo
from arcond_jax.cli import failing, paths

EPILOG = """examples:
  arcond demo
  arcond demo --workdir runs/quick --num_seeds 2 --config.training.num_train_steps=200

Started again after a stop (exit code 75), it goes on where it was."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=paths.folder, default=paths.folder("runs/demo"))
    parser.add_argument("--num_seeds", type=int, default=10, help="sampling seeds to compare over")


def main(args: argparse.Namespace) -> int:
    print("Trains three small models and compares eleven samplers: 5 to 13 minutes on 2 CPU cores.")
    start = time.perf_counter()
    if demo.main(args.workdir, num_seeds=args.num_seeds, overrides=args.overrides):
        print(f"done in {(time.perf_counter() - start) / 60:.1f} minutes")
        return 0
    print(f"stopped and saved: run the same command again to go on ({args.workdir})")
    return failing.STOPPED
