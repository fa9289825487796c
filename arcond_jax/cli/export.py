"""`arcond export`: the averaged weights of a run as an official PyTorch state dict."""

import argparse

from arcond_jax import build
from arcond_jax.cli import paths
from arcond_jax.convert import files
from arcond_jax.run import converting, restoring

EPILOG = """examples:
  arcond export --checkpoint runs/mar --out mar.safetensors
  arcond export --checkpoint runs/mar --out mar/checkpoint-last.pth

PyTorch's files (.pth .pt .ckpt .bin) hold the averaged weights under the entries that the official
code reads (MAR's --resume: model and model_ema); .safetensors holds them bare."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=paths.folder, help="a workdir")
    parser.add_argument(
        "--out", required=True, type=paths.file, help=".safetensors, or .pth .pt .ckpt .bin"
    )


def main(args: argparse.Namespace) -> None:
    files.check_target(args.out)
    config = restoring.config_for(args.checkpoint, None, args.overrides)
    name = converting.format_of(config)
    params = restoring.params_of(args.checkpoint, config, build.mesh(config))
    converting.export(name, params, config, args.out)
    print(f"{name}: {args.out}")
