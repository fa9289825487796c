"""`arcond export`: the averaged weights of a run as an official PyTorch state dict."""

import argparse
import pathlib

from arcond_jax import build, port, run

EPILOG = """examples:
  arcond export --checkpoint runs/mar --out mar.safetensors
  arcond export --checkpoint runs/mar --out mar.pth"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=pathlib.Path, help="a workdir")
    parser.add_argument("--out", required=True, type=pathlib.Path, help=".safetensors or .pth")


def main(args: argparse.Namespace) -> None:
    config = run.config_for(args.checkpoint, None, args.overrides)
    family = port.family_of(config)
    params = run.params_of(args.checkpoint, config, build.mesh(config))
    port.export(family, params, config, args.out)
    print(f"{family}: {args.out}")
