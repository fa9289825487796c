"""`arcond evaluate`: the evaluation card of a file of samples."""

import argparse

from arcond_jax.cli import paths
from arcond_jax.data import images
from arcond_jax.evaluation import card, samples
from arcond_jax.run import evaluating, restoring

EPILOG = """examples:
  arcond evaluate --samples samples.npz --checkpoint runs/digits

Features come from a small classifier kept in the workdir (trained there the first time). The card
is printed, and written as JSON beside the samples."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", required=True, type=paths.file, help="from arcond sample")
    parser.add_argument("--checkpoint", required=True, type=paths.folder, help="a workdir")


def main(args: argparse.Namespace) -> None:
    drawn = samples.read_samples(args.samples)
    config = restoring.config_for(args.checkpoint, None, args.overrides)
    result = card.evaluate(
        images.uint8_to_image(drawn.image_uint8),
        drawn.label,
        reference=evaluating.reference(config, args.checkpoint),
        settings=card.settings_of(drawn.metadata),
    )
    path = args.samples.with_suffix(".card.json")
    path.write_text(result.as_json() + "\n")
    print(result.as_text())
    print(f"written: {path}")
