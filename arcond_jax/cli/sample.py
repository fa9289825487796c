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
from arcond_jax.evaluation import png_folder, samples
from arcond_jax.parallel import processes
from arcond_jax.run import captions as captions_lib
from arcond_jax.run import drawing, evaluating, refinement, restoring, sample_file
from arcond_jax.sampling import mar

EPILOG = """examples:
  arcond sample --checkpoint runs/digits --num_images 1000 --out samples.npz
  arcond sample --checkpoint runs/digits --label 3 --num_images 16 --out threes.npz --png threes.png
  arcond sample --checkpoint runs/digits --config.transport.kind=none --out plain.npz
  arcond sample --checkpoint weights/mar --class_name "golden retriever" --out dogs.npz
  arcond sample --checkpoint weights/t2i --captions captions.npz --out drawn.npz
  arcond sample --checkpoint weights/mar --num_images 50000 --out adm.npz --png_dir images
  arcond sample --checkpoint weights/mar --num_images 50000 --labels drawn --out drawn.npz
  arcond sample --checkpoint weights/mar --inpaint dog.png --mask mask.png --out dogs.npz
  arcond sample --checkpoint runs/tensorar --num_images 100 --out s.npz --report windows.html

Refinement is on if the config's transport.kind is not "none"; it needs `arcond calibrate` first.
Without --label or --class_name the classes take turns, or are drawn with the seed by --labels
drawn, and so are captions (LlamaGen from text), which `arcond captions` encodes: a label is the
number of one. --inpaint keeps the tokens of an image whose pixels are all black in --mask and
draws the others (MAR).
Without --batch_size up to 1000 images are drawn at once, and fewer where that would take more
than half of the memory that the weights leave. An image depends on the seed and its number, not
on the batch. Batches wait on the disk, in the folder OUT.part, never in memory: stopped, even by
kill -9, the same command goes on with them, to the same file bit for bit.
--report is about models with windows of codes (TensorAR): their drafts in pictures, how often
they are changed against chance, and what they cost; windows.json has the numbers.

The images are the array arr_0 (uint8, NHWC) of --out, as the evaluator of ADM (guided-diffusion)
reads them; pytorch-fid, clean-fid and torch-fidelity read the folder of --png_dir."""

NUM_IMAGES = 100
COLUMNS, ROWS = 10, 20  # of a sheet


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
    one_class.add_argument(
        "--labels",
        choices=evaluating.LABELS,
        default="balanced",
        help="classes in turn, or each drawn with the seed; default: balanced",
    )
    parser.add_argument("--captions", type=paths.place, help=".npz of encoded captions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=paths.place, help=".npz to write")
    parser.add_argument("--inpaint", type=paths.file, help="image to keep a part of")
    parser.add_argument("--mask", type=paths.file, help="its mask: white is drawn anew")
    parser.add_argument(
        "--png", type=paths.place, help=f"also write a sheet of the first {COLUMNS * ROWS}"
    )
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
    if atomic.is_special(args.out):
        raise build.ConfigError(f"--out {args.out} is no regular file: name one")
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
    made = evaluating.provenance(trained, config, seed=args.seed)
    one_class = args.label is not None or args.class_name is not None
    more = {"labels": "one class" if one_class else args.labels}
    if captions is not None:
        more["captions"] = args.captions.name
    made = dataclasses.replace(made, sampling={**made.sampling, **more})
    known = _known(args, trained)
    wanted = sample_file.Wanted(
        refiner=refinement.load_refiner(trained, args.checkpoint, config),
        prompt=captions_lib.prompt_of(label, captions),
        label=label,
        num_classes=count,
        metadata={"label_names": names, **dataclasses.asdict(made)},
        seed=args.seed,
        batch_size=args.batch_size and min(args.batch_size, len(label)),
        known=known,
    )
    if args.report is not None:
        shown = _reported(args, trained, wanted)
    else:
        num_known = 0 if known is None else int(known.given.sum())
        shown = sample_file.draw(
            args.out,
            drawing.Drawer(trained, num_known=num_known),
            wanted,
            png_dir=args.png_dir,
            num_shown=COLUMNS * ROWS,
        )
    if shown is None:
        return
    if args.png is not None:
        columns = min(COLUMNS, len(shown))
        sheet = figures.image_grid(shown, rows=-(-len(shown) // columns), columns=columns)
        figures.write_png(args.png, sheet)
    print(f"{len(label)} images: {args.out}")


def _reported(
    args: argparse.Namespace, trained: restoring.Trained, wanted: sample_file.Wanted
) -> np.ndarray | None:
    """Draws and writes images with the report of their windows, all of which is held at once."""
    image_uint8 = window_report.draw(
        args.report,
        trained,
        wanted.refiner,
        wanted.prompt,
        wanted.label,
        seed=args.seed,
        batch_size=wanted.batch_size,
    )
    if not processes.is_first():
        return None
    samples.write_samples(
        args.out, image_uint8, wanted.label, num_classes=wanted.num_classes, **wanted.metadata
    )
    if args.png_dir is not None:
        pngs = png_folder.PngFolder(args.png_dir, str(args.out))
        pngs.add(0, image_uint8)
        pngs.finish()
    return image_uint8[: COLUMNS * ROWS]


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
    if chosen is not None:
        return np.full(num_images, chosen, np.int32)
    return evaluating.labels(num_images, count, args.labels, seed=args.seed)
