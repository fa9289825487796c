"""`arcond prepare`: images of any kind of source in, a folder of shards to train from out."""

import argparse
import pathlib
from typing import Any

from arcond_jax.cli import paths
from arcond_jax.run import preparing, sharded

EPILOG = """examples:
  arcond prepare --source ILSVRC2012_img_train.tar ILSVRC2012_img_val.tar --out imagenet
  arcond prepare --source kaggle/ILSVRC --out imagenet --process_index 0 --process_count 8
  arcond prepare --source photos --out prepared --held_out 0.05 --resize 256
  arcond train --config llamagen_b_256 --workdir runs/b --config.tokenizer.path=weights/vq16 \\
      --config.data.name=records --config.data.directory=imagenet

What the source is, is told by its content: ILSVRC's tar files, folders of classes with or without
train/ and val/, ILSVRC's flat folder of validation images, Kaggle's ILSVRC/Data/CLS-LOC, parquet
files of Hugging Face ('arcond_jax[parquet]'), tar files of WebDataset. Images stay encoded as they
are; each is decoded once, and those that cannot be are listed in OUT/failed.txt. Run the same
command again to go on where it stopped. What tfds prepared needs none of this: data.name=tfds."""


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--source", required=True, nargs="+", type=paths.file, help="files or folders of images"
    )
    parser.add_argument("--out", required=True, type=paths.file, help="folder to write")
    parser.add_argument(
        "--held_out", type=_share, metavar="SHARE", help="of each class, if the source has none"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of held-out images")
    add_on_error(parser)
    parser.add_argument(
        "--resize", type=count, metavar="PIXELS", help="keep crops of this size, lossless"
    )
    parser.add_argument(
        "--class_names", type=paths.file, metavar="FILE", help="a name a line, for ids alone"
    )
    parser.add_argument("--shard_mb", type=count, default=512, help="size of a shard")
    parser.add_argument("--num_threads", type=count, help="default: one a core")
    add_process_arguments(parser)


def add_encoded_arguments(parser: argparse.ArgumentParser) -> None:
    """Of commands that run a config's tokenizer over images."""
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config file")
    parser.add_argument(
        "--source",
        nargs="+",
        type=paths.file,
        default=[],
        help="files or folders of images; default: the data of the config",
    )
    parser.add_argument("--num_threads", type=count, help="default: one a core")


def add_on_error(parser: argparse.ArgumentParser) -> None:
    """Of commands that meet images which cannot be read."""
    parser.add_argument(
        "--on_error", choices=("skip", "stop"), default="skip", help="at images that are damaged"
    )


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Of commands that several processes run, on one folder."""
    parser.add_argument("--process_index", type=int, default=0)
    parser.add_argument("--process_count", type=count, default=1)


def check_process(args: argparse.Namespace) -> None:
    """Raises ValueError for an index beyond the count."""
    if not 0 <= args.process_index < args.process_count:
        raise ValueError(
            f"--process_index {args.process_index} must be 0 to {args.process_count - 1}"
        )


def unfinished(out: pathlib.Path) -> str:
    """What the other processes still have to do, in a line."""
    return f"{out}: shards of other processes are missing; the last of them completes it"


def left_out(manifest: dict[str, Any], out: pathlib.Path) -> str:
    """How many images could not be read, and where they are listed; empty where all could."""
    count = manifest["failed"]
    return f"; {count} could not be read: {out / sharded.FAILED}" if count else ""


def main(args: argparse.Namespace) -> None:
    check_process(args)
    manifest = preparing.prepare(
        args.source,
        args.out,
        preparing.Options(
            held_out=args.held_out,
            seed=args.seed,
            resize=args.resize,
            stop_on_error=args.on_error == "stop",
            class_names=_names(args.class_names),
            shard_bytes=args.shard_mb * 2**20,
        ),
        num_threads=args.num_threads,
        process_index=args.process_index,
        process_count=args.process_count,
    )
    if not manifest["complete"]:
        print(unfinished(args.out))
        return
    counts = ", ".join(f"{x['records']} {name}" for name, x in manifest["splits"].items())
    classes = len(manifest["class_names"])
    print(f"{args.out}: {counts} images of {classes} classes{left_out(manifest, args.out)}")


def _names(path: pathlib.Path | None) -> tuple[str, ...] | None:
    return None if path is None else tuple(path.read_text("utf-8").splitlines())
