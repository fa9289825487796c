"""`arcond convert`: official PyTorch weights in, a folder that can be sampled from out."""

import argparse
import pathlib

from arcond_jax import build
from arcond_jax.cli import paths
from arcond_jax.run import converting, extractor, restoring

EPILOG = r"""examples:
  arcond convert --family kl16 --source kl16.ckpt --out weights/kl16
  arcond convert --family mar --source mar.pth --tokenizer weights/kl16 --out weights/mar
  arcond convert --family vq --source vq_ds16_c2i.pt --out weights/vq16
  arcond convert --family llamagen --source c2i_L_384.pt --tokenizer weights/vq16 --out weights/l
  arcond sample --checkpoint weights/mar --label 207 --num_images 4 --out dogs.npz
  arcond convert --family inception --source pt_inception-2015-12-05-6726825d.pth \
      --out weights/inception

The size is recognised by its shapes, and the official sampling preset becomes the default of
`arcond sample`. Files are told by their content and read without running anything in them;
shards are given by their index file or their folder. PyTorch's own formats need `pip install
'arcond_jax[convert]'`; safetensors needs nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--family", required=True, choices=sorted([*converting.formats(), extractor.NAME])
    )
    parser.add_argument(
        "--source",
        required=True,
        type=paths.folder,
        help="file, index or folder of weights; a file may lie in a bucket",
    )
    parser.add_argument("--out", required=True, type=paths.folder, help="folder to write")
    parser.add_argument("--tokenizer", type=paths.folder, help="folder of the converted tokenizer")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema")
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="default: found by the shapes")


def main(args: argparse.Namespace) -> None:
    with paths.local(args.source) as source:
        _convert(source, args)


def _convert(source: pathlib.Path, args: argparse.Namespace) -> None:
    if args.family == extractor.NAME:
        of_models = (args.tokenizer, args.config, *args.overrides)
        if any(of_models) or args.weights != "ema":
            raise build.ConfigError(
                f"--family {extractor.NAME} takes --source and --out alone: it is no model"
            )
        print(f"{args.out}: {extractor.convert(source, args.out)}")
        return
    if args.tokenizer is not None and not restoring.is_converted(args.tokenizer):
        raise build.ConfigError(f"{args.tokenizer} holds no converted tokenizer: convert it first")
    config = build.load_config(args.config, args.overrides) if args.config else None
    if config is None and args.overrides:
        raise build.ConfigError("--config.section.key=value needs --config: say which to change")
    config = converting.convert(
        args.family,
        source,
        args.out,
        config=config,
        weights=args.weights,
        tokenizer=args.tokenizer,
    )
    print(f"{config.name}, {args.weights} weights: {args.out}")
