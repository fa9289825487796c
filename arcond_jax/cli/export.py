"""`arcond export`: averaged weights as an official PyTorch state dict, a sampler as StableHLO."""

import argparse
import dataclasses

from arcond_jax import build
from arcond_jax.build import tokens
from arcond_jax.cli import paths
from arcond_jax.convert import files
from arcond_jax.run import converting, exporting, refinement, restoring

EPILOG = """examples:
  arcond export --checkpoint runs/mar --out mar.safetensors
  arcond export --checkpoint runs/mar --out mar/checkpoint-last.pth
  arcond export --checkpoint runs/digits --stablehlo --out sampler
  arcond export --checkpoint weights/mar --stablehlo --out mar --config.sampling.num_ar_steps=64
  python sampler/load.py --label 3 --num_images 16 --out images.npy

PyTorch's files (.pth .pt .ckpt .bin) hold the averaged weights under the entries that the official
code reads (MAR's --resume: model and model_ema); .safetensors holds them bare.

--stablehlo writes a folder: the sampler with its refiner and the tokenizer's decoder as one program
for CPU, TPU and GPU and for any number of images, its weights, and load.py, which draws with jax,
numpy and flatbuffers alone. Refinement is on as in `arcond sample`. The program computes as the
config says (training.dtype), also where `arcond sample` on a CPU computes converted weights in
float32; --dtype float32 does that here. With transport.kind=in_batch it needs --batch_size, and
takes batches of that size alone, class by class."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=paths.folder, help="a workdir")
    parser.add_argument(
        "--out",
        required=True,
        type=paths.file,
        help=".safetensors, or .pth .pt .ckpt .bin; with --stablehlo a new folder",
    )
    parser.add_argument("--stablehlo", action="store_true", help="the sampler, for jax alone")
    parser.add_argument("--batch_size", type=int, help="of the sampler; default: any")
    parser.add_argument("--dtype", choices=tuple(tokens.DTYPES), help="default: the config's")


def main(args: argparse.Namespace) -> None:
    if args.stablehlo:
        _sampler(args)
        return
    if args.batch_size is not None or args.dtype is not None:
        raise build.ConfigError("--batch_size and --dtype are of a sampler: add --stablehlo")
    files.check_target(args.out)
    config = restoring.config_for(args.checkpoint, None, args.overrides)
    name = converting.format_of(config)
    params = restoring.params_of(args.checkpoint, config, build.mesh(config))
    converting.export(name, params, config, args.out)
    print(f"{name}: {args.out}")


def _sampler(args: argparse.Namespace) -> None:
    if args.batch_size is not None and args.batch_size < 1:
        raise build.ConfigError("--batch_size must be at least 1")
    exporting.check_target(args.out)
    config = restoring.config_for(args.checkpoint, None, args.overrides)
    trained = restoring.restore(args.checkpoint, config=config, suited=False)
    refiner = refinement.load_refiner(trained, args.checkpoint, trained.config)
    names = restoring.class_names_of(args.checkpoint)
    trained = dataclasses.replace(trained, class_names=names)
    if args.dtype is not None:
        trained = exporting.in_dtype(trained, args.dtype)
    exporting.write(trained, refiner, args.out, batch_size=args.batch_size)
    print(f"{trained.config.name}: {args.out}")
