"""`arcond captions`: texts in, a file of encoded captions for `arcond sample` out."""

import argparse

import numpy as np

from arcond_jax import atomic
from arcond_jax.cli import paths
from arcond_jax.convert import captions
from arcond_jax.evaluation import npz

EPILOG = """examples:
  arcond captions --text "a dog" --text "two cats" --out captions.npz
  arcond captions --text "a dog" --model folders/flan-t5-xl --out captions.npz
  arcond sample --checkpoint weights/t2i --captions captions.npz --out drawn.npz

Needs `pip install 'arcond_jax[captions]'`. Any program may write such a file: `embedding` [n, 120,
2048], float, and `valid` [n, 120], bool, False at the padding in front of each caption."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", required=True, action="append", help="repeat for more")
    parser.add_argument("--out", required=True, type=paths.file, help=".npz to write")
    parser.add_argument(
        "--model", default=captions.MODEL, help=f"folder or name of the encoder; {captions.MODEL}"
    )


def main(args: argparse.Namespace) -> None:
    atomic.check(args.out)
    embedding, valid = captions.encode(args.text, model=args.model)
    npz.write(args.out, {"embedding": embedding, "valid": valid, "text": np.array(args.text)})
    print(f"{len(args.text)} captions: {args.out}")
