"""`arcond sample`: class labels or captions in, a file of images out."""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from arcond_jax import atomic, build
from arcond_jax.analysis import figures, window_report
from arcond_jax.cli import paths
from arcond_jax.data import class_names, images
from arcond_jax.evaluation import samples
from arcond_jax.parallel import processes, stalling
from arcond_jax.run import captions as captions_lib
from arcond_jax.run import drawing, evaluating, refinement, restoring
from arcond_jax.sampling import mar

EPILOG = """examples:
  arcond sample --checkpoint runs/digits --num_images 1000 --out samples.npz
  arcond sample --checkpoint runs/digits --label 3 --num_images 16 --out threes.npz --png threes.png
  arcond sample --checkpoint runs/digits --config.transport.kind=none --out plain.npz
  arcond sample --checkpoint weights/mar --class_name "golden retriever" --out dogs.npz
  arcond sample --checkpoint weights/t2i --captions captions.npz --out drawn.npz
  arcond sample --checkpoint weights/mar --num_images 50000 --out adm.npz --png_dir images
  arcond sample --checkpoint weights/mar --inpaint dog.png --mask mask.png --out dogs.npz
  arcond sample --checkpoint runs/tensorar --num_images 100 --out s.npz --report windows.html

Refinement is on if the config's transport.kind is not "none"; it needs `arcond calibrate` first.
Without --label or --class_name the classes take turns, and so do captions (LlamaGen from
text), which `arcond captions` encodes: a label is the number of one. --inpaint keeps the
tokens of an image whose pixels are all black in --mask and draws the others (MAR).
Without --batch_size up to 1000 images are drawn at once, and fewer where that would take more
than half of the memory that the weights leave. An image depends on the seed and its number, not
on the batch. --report is about models with windows of codes (TensorAR): their drafts in
pictures, how often they are changed against chance, and what they cost; windows.json has the
numbers.

The images are the array arr_0 (uint8, NHWC) of --out, as the evaluator of ADM (guided-diffusion)
reads them; pytorch-fid, clean-fid and torch-fidelity read the folder of --png_dir."""

NUM_IMAGES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=paths.folder, help="a workdir")
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="default: the checkpoint's own")
    parser.add_argument(
        "--num_images", type=int, help=f"default: {NUM_IMAGES}, or one of each caption"
    )
    parser.add_argument("--batch_size", type=int, help="default: as memory allows")
    one_class = parser.add_mutually_exclusive_group()
    one_class.add_argument("--label", type=int, help="one class for all images")
    one_class.add_argument("--class_name", "--class-name", help="the same by its name")
    parser.add_argument("--captions", type=paths.place, help=".npz of encoded captions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=paths.place, help=".npz to write")
    parser.add_argument("--inpaint", type=paths.file, help="image to keep a part of")
    parser.add_argument("--mask", type=paths.file, help="its mask: white is drawn anew")
    parser.add_argument("--png", type=paths.place, help="also write a sheet of the images")
    parser.add_argument(
        "--png_dir", type=paths.file, help="new folder: also write each image, 000000.png and so on"
    )
    parser.add_argument(
        "--report", type=paths.file, help=".html to write, and .json: what windows of codes do"
    )


def main(args: argparse.Namespace) -> None:
    if any(x is not None and x < 1 for x in (args.num_images, args.batch_size)):
        raise build.ConfigError("--num_images and --batch_size must be at least 1")
    paths.check_apart(
        out=args.out,
        png=args.png,
        report=args.report,
        captions=args.captions,
        inpaint=args.inpaint,
    )
    for path in (args.out, args.png):
        if path is not None:
            atomic.check(path)
    if args.png_dir is not None and args.png_dir.exists() and not _is_empty(args.png_dir):
        raise build.ConfigError(f"--png_dir {args.png_dir} is there already: give a new folder")
    if (args.inpaint is None) != (args.mask is None):
        raise build.ConfigError("--inpaint and --mask go together: give both or none")
    drawing.check_seed(args.seed)
    config = restoring.config_for(args.checkpoint, args.config, args.overrides)
    captions = _captions(args, config)
    count = config.data.num_classes if captions is None else len(captions.valid)
    names = restoring.class_names_of(args.checkpoint) if captions is None else None
    label = _labels(args, count, names)
    drawing.check_labels(label, count)
    if args.report is not None:
        window_report.with_drafts(config, len(label))
        window_report.paths(args.report)

    trained = restoring.restore(args.checkpoint, config=config)
    config = trained.config
    settings = evaluating.provenance(trained, config, seed=args.seed)
    if captions is not None:
        sampling = {**settings.sampling, "captions": args.captions.name}
        settings = dataclasses.replace(settings, sampling=sampling)
    refiner = refinement.load_refiner(trained, args.checkpoint, config)
    known = _known(args, trained)
    num_known = 0 if known is None else int(known.given.sum())
    prompt = captions_lib.prompt_of(label, captions)
    batch_size = args.batch_size and min(args.batch_size, len(label))
    with stalling.watched(args.stall_minutes):
        if args.report is not None:
            image_uint8 = window_report.draw(
                args.report, trained, refiner, prompt, label, seed=args.seed, batch_size=batch_size
            )
        else:
            image_uint8 = drawing.Drawer(trained, num_known=num_known).images(
                refiner, prompt, seed=args.seed, batch_size=batch_size, known=known
            )
    if not processes.is_first():
        return
    samples.write_samples(
        args.out,
        image_uint8,
        label.astype(np.int32),
        num_classes=count,
        label_names=names,
        **dataclasses.asdict(settings),
    )
    if args.png is not None:
        columns = min(10, len(label))
        sheet = figures.image_grid(image_uint8, rows=-(-len(label) // columns), columns=columns)
        figures.write_png(args.png, sheet)
    if args.png_dir is not None:
        figures.write_png_folder(args.png_dir, image_uint8)
    print(f"{len(label)} images: {args.out}")


def _is_empty(folder: pathlib.Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _known(args: argparse.Namespace, trained: restoring.Trained) -> mar.Known | None:
    if args.inpaint is None:
        return None
    num_channels = trained.config.data.num_channels
    image = images.read_image(args.inpaint, num_channels=num_channels)
    mask = images.read_image(args.mask, num_channels=1)
    return drawing.known_tokens(trained, image, mask[..., 0] < 0.0)


def _captions(args: argparse.Namespace, config: build.Config) -> captions_lib.Captions | None:
    wanted = build.family_of(config).prompts == "captions"
    if args.captions is None:
        if wanted:
            raise build.ConfigError(
                f"the model {config.name} draws captions: give --captions, which `arcond captions` "
                "makes"
            )
        return None
    if not wanted:
        raise build.ConfigError(f"the model {config.name} draws classes, so leave out --captions")
    if args.class_name is not None:
        raise build.ConfigError("--class_name names classes, not captions: use --label")
    return captions_lib.read(args.captions, config)


def _labels(args: argparse.Namespace, count: int, names: Sequence[str] | None) -> np.ndarray:
    num_images = args.num_images
    if num_images is None:
        num_images = NUM_IMAGES if args.captions is None else count
    chosen = args.label
    if args.class_name is not None:
        if names is None:
            raise build.ConfigError(
                f"{args.checkpoint} does not say what its classes are called: use --label"
            )
        chosen = class_names.label_of(args.class_name, names)
    return np.arange(num_images) % count if chosen is None else np.full(num_images, chosen)
