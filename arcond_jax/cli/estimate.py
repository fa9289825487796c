"""`arcond estimate`: images in, the scale of their latents and what codes say of them out."""

import argparse

from arcond_jax import build
from arcond_jax.cli import prepare
from arcond_jax.run import caching, measuring

EPILOG = """examples:
  arcond estimate --config ar_xl_imagenet256 --config.tokenizer.path=weights/kl16 --source imagenet
  arcond estimate --config joint_xl_imagenet256 --config.tokenizer.kl_path=weights/kl16 \\
      --config.tokenizer.vq_path=weights/vq16 --source imagenet

Printed are the latent scale, 1 over the standard deviation of the latents, to be set as
tokenizer.latent_scale (kl_latent_scale of a pair); and, where there are codes as well, the share of
the latents' variance that they leave, var(x | y) / var(x), on which sampling in a few steps
depends. A source is one of `arcond encode`, which prints the same of all images at its end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_encoded_arguments(parser)
    parser.add_argument(
        "--num_images",
        type=prepare.count,
        default=measuring.MEASURED,
        help=f"spread over the training split; default: {measuring.MEASURED}",
    )


def main(args: argparse.Namespace) -> None:
    config = build.load_config(args.config, args.overrides)
    show(
        caching.estimate(
            config, args.source, num_images=args.num_images, num_threads=args.num_threads
        )
    )


def show(found: dict[str, float]) -> None:
    """Prints figures, a line each."""
    for name, value in found.items():
        print(f"{name}: {value:.5g}")
