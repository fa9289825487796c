"""`arcond encode`: images in, a cache of what the tokenizer makes of them out, to train from."""

import argparse

from arcond_jax import build
from arcond_jax.cli import estimate, paths, prepare
from arcond_jax.data import views
from arcond_jax.run import caching

EPILOG = """examples:
  arcond encode --config mar_base_imagenet256 --config.tokenizer.path=weights/kl16 \\
      --source imagenet --out moments --views flip
  arcond encode --config llamagen_b_256 --config.tokenizer.path=weights/vq16 \\
      --source imagenet --out codes --views ten --crop_ranges 1.05,1.1
  arcond train --config mar_base_imagenet256 --config.tokenizer.path=weights/kl16 \\
      --workdir runs/mar --config.data.name=cache --config.data.directory=moments

Kept are moments (mean and log variance) of KL-16, codes of VQ-16, MaskGIT-VQ and LFQ, or both with
the Gaussians that link them; or latents and codes of patches, whose tokenizer is fitted and kept
too. A source is one of `arcond prepare`, or a folder that it or tfds prepared; its training images
are encoded. Without --views they are those of the config: data.views, or the mirror image where
data.random_flip is set. Images that cannot be decoded are listed in OUT/failed.txt. Run the same
command again to go on where it stopped."""


def _ranges(text: str) -> tuple[float, ...]:
    return tuple(float(x) for x in text.split(","))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    prepare.add_encoded_arguments(parser)
    parser.add_argument("--out", required=True, type=paths.file, help="folder to write")
    parser.add_argument("--views", metavar="{one,flip,ten}", help="of each image")
    parser.add_argument(
        "--crop_ranges",
        type=_ranges,
        metavar="RANGE,...",
        help=f"of views ten; default: {views.CROP_RANGE}",
    )
    parser.add_argument(
        "--dtype", choices=caching.DTYPES, default="float16", help="of moments and latents"
    )
    parser.add_argument(
        "--batch_size",
        type=prepare.count,
        help=f"images at a time on each device; default: {caching.BATCH_SIZE}, or what fits",
    )
    prepare.add_on_error(parser)
    prepare.add_process_arguments(parser)


def main(args: argparse.Namespace) -> None:
    prepare.check_process(args)
    config = build.load_config(args.config, args.overrides)
    manifest, found = caching.encode(
        config,
        args.source,
        args.out,
        caching.Options(
            _views(args), args.dtype, args.batch_size, stop_on_error=args.on_error == "stop"
        ),
        num_threads=args.num_threads,
        process_index=args.process_index,
        process_count=args.process_count,
    )
    if not manifest["complete"]:
        print(prepare.unfinished(args.out))
        return
    count, classes = manifest["splits"]["train"]["records"], len(manifest["class_names"])
    views = f"views {manifest['views']['kind']}: {len(manifest['views']['names'])} of each"
    left_out = prepare.left_out(manifest, args.out)
    print(f"{args.out}: {count} images of {classes} classes, {views}{left_out}")
    estimate.show(found)


def _views(args: argparse.Namespace) -> views.Views | None:
    if args.views is None and args.crop_ranges is None:
        return None
    kind = args.views or "ten"
    default = (views.CROP_RANGE,) if kind == "ten" else ()
    return views.Views(kind, default if args.crop_ranges is None else args.crop_ranges)
