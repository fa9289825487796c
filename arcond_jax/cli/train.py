"""`arcond train`: train a config in a working directory, or go on where it stopped."""

import argparse
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from arcond_jax import build
from arcond_jax.analysis import figures
from arcond_jax.cli import failing, paths
from arcond_jax.run import initial, training
from arcond_jax.training import profiling

EPILOG = """examples:
  arcond train --config configs/digits.py:joint --workdir runs/digits
  arcond train --config digits:ar --workdir runs/ar --config.training.learning_rate=1e-3

  arcond train --config mar_base_imagenet256 --init weights/mar --workdir runs/tuned \\
      --init_classes new --config.data.num_classes=3 --config.data.directory=flowers

Run the same command again to resume. Ctrl-C, SIGTERM and SIGHUP save and exit 75, "start me again"
(the & of a shell script shields a run from Ctrl-C), where 0 means complete; Ctrl-C after that ends
it at once as long as there is no new step to save. Learning rate and clipping may change on the
way; --restart_from goes back to an earlier checkpoint. Several hosts run one process each, started
alike in a working directory that all of them see: docs/hosts.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config file")
    parser.add_argument("--workdir", required=True, type=paths.folder, help="checkpoints and logs")
    parser.add_argument("--init", type=paths.folder, help="a workdir whose weights to start from")
    parser.add_argument(
        "--init_classes",
        choices=("new", "keep"),
        help="a fresh table of classes, or that of --init; default: keep it for the same classes",
    )
    parser.add_argument(
        "--restart_from", type=int, metavar="STEP", help="go back to this checkpoint"
    )
    parser.add_argument(
        "--profile", type=_span, metavar="START:STOP", help="trace these steps to WORKDIR/profile"
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="log to Weights & Biases too")


def _span(text: str) -> profiling.Span:
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise argparse.ArgumentTypeError(f"{text!r} is no START:STOP with START below STOP")
    return profiling.Span(int(start), int(stop))


def main(args: argparse.Namespace) -> int:
    config = build.load_config(args.config, args.overrides)
    workdir = args.workdir

    def show(
        step: int,
        image_uint8: UInt8[np.ndarray, "n height width channels"],
        label: np.ndarray,
        names: Sequence[str] | None,
    ) -> None:
        (workdir / "samples").mkdir(exist_ok=True)
        sheet = figures.class_grid(
            image_uint8, label, num_classes=int(label.max()) + 1, per_class=10, names=names
        )
        figures.write_png(workdir / "samples" / f"step_{step:08d}.png", sheet)

    if args.init is None and args.init_classes is not None:
        raise build.ConfigError("--init_classes goes with --init: give the weights to start from")
    start_from = None if args.init is None else initial.Initial(args.init, args.init_classes)
    complete = training.train(
        config,
        workdir,
        show=show,
        start_from=start_from,
        restart_from=args.restart_from,
        watch=training.Watch(args.wandb, args.profile, args.stall_minutes),
    )
    print(f"{'complete' if complete else 'stopped and saved'}: {workdir}")
    return 0 if complete else failing.STOPPED
