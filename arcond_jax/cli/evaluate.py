"""`arcond evaluate`: FID and other scores of samples or of a model, with their card."""

import argparse
import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, Protocol

from etils import epath

from arcond_jax import atomic, build
from arcond_jax.cli import paths
from arcond_jax.data import images
from arcond_jax.evaluation import card, image_sets, inception, samples, scoring, summary
from arcond_jax.evaluation import reference as reference_lib
from arcond_jax.parallel import processes
from arcond_jax.run import drawing, evaluating, refinement, restoring

EPILOG = """examples:
  arcond evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz \\
      --inception weights/inception
  arcond evaluate --samples pngs --reference ref.npz --inception weights/inception
  arcond evaluate --checkpoint runs/mar --num_images 50000 --reference ref.npz \\
      --inception weights/inception
  arcond evaluate --checkpoint runs/digits --num_images 1000
  arcond evaluate --samples samples.npz --checkpoint runs/digits

--samples is a file with the array arr_0, as `arcond sample` and guided-diffusion write it, or a
folder of images; with --num_images they are drawn and scored batch by batch, and never on a disk.
--reference is one of ADM's, of MAR, of pytorch-fid or clean-fid, of `arcond reference`, or a folder
of images; without it real images are the held-out ones of the model's data.

Without --inception a small classifier reads the images, which is trained and kept in the workdir
the first time: its numbers are no FID. FID is said of 50,000 images alone, and FID-10k of 10,000.
The card is printed, and written as JSON beside the samples or to --out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=paths.place, help=".npz, or a folder of images")
    parser.add_argument("--checkpoint", type=paths.folder, help="a workdir")
    parser.add_argument("--num_images", type=int, help="draw so many from the checkpoint")
    parser.add_argument(
        "--labels", choices=evaluating.LABELS, help="of what is drawn; default: balanced"
    )
    parser.add_argument("--seed", type=int, help="of what is drawn; default: 0")
    parser.add_argument("--batch_size", type=int, help="drawn at a time; default: by memory")
    parser.add_argument("--reference", type=paths.place, help=".npz, or a folder of images")
    add_network_arguments(parser)
    parser.add_argument(
        "--distances",
        choices=("float16", "float32", "float64"),
        help="of precision and recall; float16 is what ADM's evaluator takes; default: float32",
    )
    parser.add_argument(
        "--allow_singular",
        action="store_true",
        help="a Frechet distance though images are fewer than features",
    )
    parser.add_argument("--out", type=paths.place, help="default: .card.json beside the samples")


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """What reads the images."""
    parser.add_argument(
        "--inception", type=paths.folder, help="from `arcond convert --family inception`"
    )
    parser.add_argument(
        "--preprocessing",
        choices=inception.PREPROCESSINGS,
        help="tf is that of ADM and torch-fidelity; default: tf",
    )
    parser.add_argument("--dtype", choices=tuple(inception.DTYPES), help="default: float32")


def network(args: argparse.Namespace) -> evaluating.Network:
    """The Inception of the flags."""
    given = {"preprocessing": args.preprocessing, "dtype": args.dtype}
    return evaluating.inception(
        args.inception, **{name: x for name, x in given.items() if x is not None}
    )


class _Printable(Protocol):
    def as_text(self) -> str: ...
    def as_json(self) -> str: ...


def main(args: argparse.Namespace) -> None:
    _check(args)
    paths.check_apart(samples=args.samples, out=args.out)
    paths.check_apart(reference=args.reference, out=args.out)
    out = args.out or _beside(args)
    try:
        atomic.check(out)
    except OSError as error:
        if args.out is not None:
            raise
        logging.warning("%s; the card will only be printed", error)
    if _is_of_a_run(args):
        result: _Printable = _by_classifier(args)
    else:
        result = _scored(args)
    print(result.as_text(), flush=True)
    if processes.is_first():
        atomic.write_text(out, result.as_json() + "\n")
        print(f"written: {out}")


def _is_of_a_run(args: argparse.Namespace) -> bool:
    """Whether a file of our own is to be compared with the images of its run."""
    if args.samples is None or args.inception is not None or args.reference is not None:
        return False
    return not args.samples.is_dir() and samples.read_about(args.samples) is not None


def _check(args: argparse.Namespace) -> None:
    if (args.samples is None) == (args.num_images is None):
        raise build.ConfigError("give --samples, or --checkpoint and --num_images to draw them")
    if args.num_images is not None and args.num_images < 2:
        raise build.ConfigError("--num_images must be at least 2")
    if args.checkpoint is None and (args.num_images is not None or args.inception is None):
        raise build.ConfigError(
            "--checkpoint is missing: the workdir that images are drawn from, or whose classifier "
            "reads them where there is no --inception"
        )
    if args.checkpoint is None and args.reference is None:
        raise build.ConfigError("--reference is missing: real images to compare with")
    idle = {
        "labels": args.num_images is None,
        "seed": args.num_images is None,
        "batch_size": args.num_images is None,
        "preprocessing": args.inception is None,
        "dtype": args.inception is None,
    }
    for name, does_nothing in idle.items():
        if does_nothing and getattr(args, name) is not None:
            needs = "--num_images" if name in ("labels", "seed", "batch_size") else "--inception"
            raise build.ConfigError(f"--{name} does nothing without {needs}: leave it out")
    if args.batch_size is not None and args.batch_size < 1:
        raise build.ConfigError("--batch_size must be at least 1")


def _beside(args: argparse.Namespace) -> Any:
    if args.samples is None:
        return args.checkpoint / "evaluation.card.json"
    name = args.samples.name
    kind = "images." if args.samples.is_dir() else ""  # a file of that name may be beside it
    return args.samples.with_name(f"{name.removesuffix('.npz')}.{kind}card.json")


def _by_classifier(args: argparse.Namespace) -> card.EvaluationCard:
    """Of a file of samples, what the small classifier of a run and its pixels tell."""
    for name in ("distances", "allow_singular"):
        if getattr(args, name):
            raise build.ConfigError(
                f"--{name} does nothing for samples without --inception or --reference: leave it "
                "out"
            )
    drawn = samples.read_samples(args.samples)
    settings = card.settings_of(drawn.metadata)
    config = restoring.config_for(args.checkpoint, None, args.overrides)
    evaluating.check_samples(drawn, config)
    return card.evaluate(
        images.Scaled(drawn.image_uint8),
        drawn.label,
        reference=evaluating.reference(config, args.checkpoint),
        settings=settings,
    )


def _scored(args: argparse.Namespace) -> scoring.Card:
    config = None
    if args.checkpoint is not None:
        config = restoring.config_for(args.checkpoint, None, args.overrides)
    made = _given(args.samples) if config is None or args.samples else _drawn(args, config)
    if args.inception is not None:
        read = network(args)
    else:
        assert config is not None and args.checkpoint is not None  # `_check`
        read = evaluating.classifier(config, args.checkpoint)
    if args.reference is not None:
        real = reference_lib.read(args.reference, read.extractor, mesh=read.mesh)
    else:
        assert config is not None
        real = evaluating.real(config, read)
    return scoring.score(
        made.images,
        read.extractor,
        real,
        samples=made.facts,
        total=made.total,
        num_classes=made.num_classes,
        mesh=read.mesh,
        options=scoring.Options(
            distances=args.distances or "float32", singular=args.allow_singular
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Set:
    """Images to be scored, what is known of them, and their number where they are drawn."""

    images: summary.Images
    facts: Mapping[str, card.Setting]
    total: int | None = None
    num_classes: int | None = None


def _given(path: epath.Path) -> _Set:
    """A file or folder of images, and how they were made where the file says so."""
    if path.is_dir():
        return _Set(image_sets.Folder(path), {})
    about = samples.read_about(path)
    if about is None:
        return _Set(image_sets.Npz(path), {})
    metadata, num_classes = about
    made = _flat(card.settings_of(metadata)) if metadata else {}
    return _Set(image_sets.Npz(path), made, num_classes=num_classes)


def _drawn(args: argparse.Namespace, config: build.Config) -> _Set:
    """Images that are drawn as they are read; whatever is missing for that is found here."""
    if build.family_of(config).prompts == "captions":
        raise build.ConfigError(
            f"the model {config.name} draws captions: draw by `arcond sample --captions`, and give "
            "the file by --samples"
        )
    seed, kind = args.seed or 0, args.labels or "balanced"
    drawing.check_seed(seed)
    trained = restoring.restore(args.checkpoint, config=config)
    refiner = refinement.load_refiner(trained, args.checkpoint, trained.config)
    label = evaluating.labels(args.num_images, config.data.num_classes, kind, seed=seed)
    made = evaluating.provenance(trained, trained.config, seed=seed)
    drawer = drawing.Drawer(trained)
    return _Set(
        evaluating.drawn(drawer, refiner, label, seed=seed, batch_size=args.batch_size),
        {"checkpoint": str(args.checkpoint), "labels": kind, **_flat(made)},
        len(label),
        config.data.num_classes,
    )


def _flat(made: card.Settings) -> Mapping[str, card.Setting]:
    fields = dataclasses.asdict(made)
    refined = {f"refinement {name}": x for name, x in fields["refinement"].items()}
    return {
        "checkpoint step": made.checkpoint_step,
        "sampling seed": made.seed,
        **fields["sampling"],
        **(refined or {"refinement": "none"}),
    }
