"""`arcond reference`: real images in, what evaluations compare with out, with its card."""

import argparse

from arcond_jax import atomic, build
from arcond_jax.cli import evaluate, paths
from arcond_jax.data import images as images_lib
from arcond_jax.evaluation import image_sets
from arcond_jax.evaluation import reference as reference_lib
from arcond_jax.parallel import processes
from arcond_jax.run import evaluating

EPILOG = """examples:
  arcond reference --config mar_base_imagenet256 --config.data.directory=imagenet --split train \\
      --inception weights/inception --out imagenet256.npz
  arcond reference --images photographs --image_size 256 --inception weights/inception --out ref.npz
  arcond reference --npz VIRTUAL_imagenet256_labeled.npz --inception weights/inception --out adm.npz

Written are mean and covariance of the features of all images, and the features of some, evenly
spread, for precision, recall and KID. Of an --npz with statistics these are kept, and its images,
arr_0, are read once for all evaluations. The card, with the sha256 of images and weights, crop,
resize and preprocessing, is in the file and beside it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    of = parser.add_mutually_exclusive_group(required=True)
    of.add_argument("--config", metavar="FILE[:VARIANT]", help="whose data section is read")
    of.add_argument("--images", type=paths.file, help="folder of images, at any depth")
    of.add_argument("--npz", type=paths.place, help="file with images or statistics, as ADM's")
    parser.add_argument("--split", choices=("train", "held_out"), help="default: train")
    parser.add_argument("--image_size", type=int, help="crop and scale --images to it")
    parser.add_argument("--resize", choices=images_lib.RESIZES, help="how; default: adm")
    evaluate.add_network_arguments(parser)
    parser.add_argument(
        "--num_features",
        type=int,
        help=f"images whose features are kept; default: {reference_lib.KEPT}",
    )
    parser.add_argument("--out", required=True, type=paths.place, help=".npz to write")


def main(args: argparse.Namespace) -> None:
    _check(args)
    paths.check_apart(npz=args.npz, out=args.out)
    for path in (args.out, reference_lib.card_path(args.out)):
        atomic.check(path)
    read = evaluate.network(args)
    if args.npz is not None:
        made = reference_lib.read(args.npz, read.extractor, mesh=read.mesh)
    else:
        made = reference_lib.measure(
            _images(args),
            read.extractor,
            mesh=read.mesh,
            keep=reference_lib.KEPT if args.num_features is None else args.num_features,
        )
    if not processes.is_first():
        return
    reference_lib.write(args.out, made)
    for name, value in made.facts.items():
        print(f"{name}: {value}")
    print(f"written: {args.out}")


def _check(args: argparse.Namespace) -> None:
    if args.inception is None:
        raise build.ConfigError("--inception is missing: the folder of the network's weights")
    for name, needs in (("split", "config"), ("image_size", "images"), ("resize", "image_size")):
        if getattr(args, name) is not None and getattr(args, needs) is None:
            raise build.ConfigError(f"--{name} does nothing without --{needs}: leave it out")
    if (args.num_features or 0) < 0 or (args.image_size is not None and args.image_size < 1):
        raise build.ConfigError("--num_features must be at least 0, --image_size at least 1")
    if args.npz is not None and args.num_features is not None:
        raise build.ConfigError("--num_features does nothing with --npz, whose images are all kept")


def _images(args: argparse.Namespace) -> image_sets.ImageSet:
    if args.images is not None:
        return image_sets.Folder(
            args.images, image_size=args.image_size, resize=args.resize or "adm"
        )
    config = build.load_config(args.config, args.overrides)
    return evaluating.split(config, args.split or "train")
