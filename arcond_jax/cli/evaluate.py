"""`arcond evaluate`: the evaluation card of a file of samples."""

import argparse
import logging

from arcond_jax import atomic
from arcond_jax.cli import paths
from arcond_jax.data import images
from arcond_jax.evaluation import card, samples
from arcond_jax.run import evaluating, restoring

EPILOG = """examples:
  arcond evaluate --samples samples.npz --checkpoint runs/digits

Features come from a small classifier kept in the workdir (trained there the first time). The card
is printed, and written as JSON beside the samples or to --out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", required=True, type=paths.place, help="from arcond sample")
    parser.add_argument("--checkpoint", required=True, type=paths.folder, help="a workdir")
    parser.add_argument("--out", type=paths.place, help="default: .card.json beside the samples")


def main(args: argparse.Namespace) -> None:
    paths.check_apart(samples=args.samples, out=args.out)
    drawn = samples.read_samples(args.samples)
    settings = card.settings_of(drawn.metadata)
    config = restoring.config_for(args.checkpoint, None, args.overrides)
    evaluating.check_samples(drawn, config)
    path = args.out or args.samples.with_suffix(".card.json")
    try:
        atomic.check(path)
    except OSError as error:
        logging.warning("%s; the card will only be printed", error)
    result = card.evaluate(
        images.Scaled(drawn.image_uint8),
        drawn.label,
        reference=evaluating.reference(config, args.checkpoint),
        settings=settings,
    )
    print(result.as_text(), flush=True)
    atomic.write_text(path, result.as_json() + "\n")
    print(f"written: {path}")
