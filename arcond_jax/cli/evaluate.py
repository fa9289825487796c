"""`arcond evaluate`: the evaluation card of a file of samples."""

import argparse
import pathlib

from arcond_jax import build, run
from arcond_jax.data import images
from arcond_jax.evaluation import card, samples

EPILOG = """examples:
  arcond evaluate --samples samples.npz --checkpoint runs/digits

Features come from a small classifier kept in the workdir (trained there the first time). The card
is printed, and written as JSON beside the samples."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", required=True, type=pathlib.Path, help="from arcond sample")
    parser.add_argument("--checkpoint", required=True, type=pathlib.Path, help="a workdir")


def main(args: argparse.Namespace) -> None:
    drawn = samples.read_samples(args.samples)
    config = run.config_for(args.checkpoint, None, args.overrides)
    try:
        settings = card.Settings(**drawn.metadata)
    except TypeError:
        raise build.ConfigError(f"{args.samples} does not say how it was sampled") from None
    result = card.evaluate(
        images.uint8_to_image(drawn.image_uint8),
        drawn.label,
        reference=run.reference(config, args.checkpoint),
        settings=settings,
    )
    path = args.samples.with_suffix(".card.json")
    path.write_text(result.as_json() + "\n")
    print(result.as_text())
    print(f"written: {path}")
