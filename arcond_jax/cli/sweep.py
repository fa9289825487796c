"""`arcond sweep`: scores over a grid of sampling settings, and which of them is best."""

import argparse

from arcond_jax import build
from arcond_jax.analysis import report, sweep_report
from arcond_jax.cli import evaluate, paths
from arcond_jax.evaluation import reference as reference_lib
from arcond_jax.run import evaluating, restoring, sweep

EPILOG = """examples:
  arcond sweep --checkpoint runs/digits --over sampling.guidance_scale=1.0,1.5,2.0 \\
      --num_images 1000 --out sweep --config.transport.kind=none
  arcond sweep --checkpoint weights/mar --reference adm.npz --inception weights/inception \\
      --over sampling.guidance_scale=1.0,1.5,2.0,3.0 --over sampling.latent_temperature=0.95,1.0 \\
      --num_images 10000 --halving --out sweep

All combinations are drawn, with the same seed and labels, so that differences are paired.
sweep.json is written after each; the same command goes on from it, and more values of a setting
may be added. sweep.md is the table, sweep.png the picture; error bars are standard errors by a
jackknife. With --halving all are drawn with few images, and the better half again with twice as
many, until one is left with --num_images: for less, if the best is far enough from the others.

A calibrated refiner is of one setting of the sampler: sweep without refinement. Real images are
those of --reference, or the held-out ones of the model's data; without --inception the small
classifier of the workdir reads them, and the score is no FID."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=paths.folder, help="a workdir")
    parser.add_argument(
        "--over",
        required=True,
        action="append",
        metavar="sampling.KEY=VALUE,VALUE",
        help="a setting and its values; repeat for a grid",
    )
    parser.add_argument("--num_images", required=True, type=int, help="of each combination")
    parser.add_argument("--halving", action="store_true", help="few images first, then the best")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, help="default: as memory allows")
    parser.add_argument("--reference", type=paths.place, help=".npz, or a folder of images")
    evaluate.add_network_arguments(parser)
    parser.add_argument("--out", required=True, type=paths.folder, help="folder to write")


def main(args: argparse.Namespace) -> None:
    if args.batch_size is not None and args.batch_size < 1:
        raise build.ConfigError("--batch_size must be at least 1")
    for name in ("preprocessing", "dtype"):
        if args.inception is None and getattr(args, name) is not None:
            raise build.ConfigError(f"--{name} does nothing without --inception: leave it out")
    if args.out.exists() and not args.out.is_dir():
        raise build.ConfigError(f"--out {args.out} is a file: name a folder")
    config = restoring.config_for(args.checkpoint, None, args.overrides)
    if build.family_of(config).prompts == "captions":
        raise build.ConfigError(f"the model {config.name} draws captions, and a sweep classes")
    values = sweep.over(args.over)
    sweep.cells(config, values)
    trained = restoring.restore(args.checkpoint, config=config)
    if args.inception is not None:
        network = evaluate.network(args)
    else:
        network = evaluating.classifier(config, args.checkpoint)
    if args.reference is not None:
        real = reference_lib.read(args.reference, network.extractor, mesh=network.mesh)
    else:
        real = evaluating.real(config, network)
    made = sweep.Sweep(
        trained,
        args.checkpoint,
        values,
        network=network,
        reference=real,
        out=args.out,
        seed=args.seed,
        batch_size=args.batch_size,
    )
    found = made.run(
        args.num_images,
        halving=args.halving,
        show=lambda found: sweep_report.write(args.out, found),
    )
    if found is None:  # the first process says it
        return
    print(report.table_text(*sweep_report.table(found)))
    print(f"written: {args.out}/sweep.json, sweep.md, sweep.png")
