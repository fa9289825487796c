"""`arcond sample`: class labels in, a file of images out."""

import argparse
import dataclasses
import pathlib

import numpy as np

from arcond_jax import build, run
from arcond_jax.analysis import figures
from arcond_jax.data import images
from arcond_jax.evaluation import samples

EPILOG = """examples:
  arcond sample --checkpoint runs/digits --num_images 1000 --out samples.npz
  arcond sample --checkpoint runs/digits --label 3 --num_images 16 --out threes.npz --png threes.png
  arcond sample --checkpoint runs/digits --config.transport.kind=none --out plain.npz
  arcond sample --checkpoint weights/mar --inpaint dog.png --mask mask.png --out dogs.npz

Refinement is on if the config's transport.kind is not "none"; it needs `arcond calibrate` first.
Without --label the classes take turns. --inpaint keeps the tokens of an image whose pixels are all
black in --mask and draws the others (models with backbone mar)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=pathlib.Path, help="a workdir")
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="default: the checkpoint's own")
    parser.add_argument("--num_images", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=1000)
    parser.add_argument("--label", type=int, help="one class for all images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=pathlib.Path, help=".npz to write")
    parser.add_argument("--inpaint", type=pathlib.Path, help="image to keep a part of")
    parser.add_argument("--mask", type=pathlib.Path, help="its mask: white is drawn anew")
    parser.add_argument("--png", type=pathlib.Path, help="also write a sheet of the images")


def main(args: argparse.Namespace) -> None:
    if args.num_images < 1 or args.batch_size < 1:
        raise build.ConfigError("--num_images and --batch_size must be at least 1")
    for path in (args.out, args.png):
        if path is not None and not path.absolute().parent.is_dir():
            raise build.ConfigError(f"the folder of {path} does not exist: create it first")
    if (args.inpaint is None) != (args.mask is None):
        raise build.ConfigError("--inpaint and --mask go together: give both or none")
    config = run.config_for(args.checkpoint, args.config, args.overrides)
    count = run.num_classes(config)
    label = np.arange(args.num_images) % count
    if args.label is not None:
        label = np.full(args.num_images, args.label)
    run.check_labels(label, count)

    trained = run.restore(args.checkpoint, config=config)
    refiner = run.load_refiner(trained, args.checkpoint, config)
    known = None
    if args.inpaint is not None:
        image = images.read_image(args.inpaint, num_channels=config.data.num_channels)
        mask = images.read_image(args.mask, num_channels=1)
        known = run.known_tokens(trained, image, mask[..., 0] < 0.0)
    num_known = 0 if known is None else int(known.given.sum())
    image_uint8 = run.Drawer(trained, num_known=num_known).images(
        refiner,
        label,
        seed=args.seed,
        batch_size=min(args.batch_size, args.num_images),
        known=known,
    )
    samples.write_samples(
        args.out,
        image_uint8,
        label.astype(np.int32),
        num_classes=count,
        **dataclasses.asdict(run.provenance(trained, config, seed=args.seed)),
    )
    if args.png is not None:
        columns = min(10, len(label))
        sheet = figures.image_grid(image_uint8, rows=-(-len(label) // columns), columns=columns)
        figures.write_png(args.png, sheet)
    print(f"{len(label)} images: {args.out}")
