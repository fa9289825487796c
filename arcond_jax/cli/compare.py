"""`arcond compare`: samplers of one trained model side by side, over paired seeds."""

import argparse
import json

import numpy as np

from arcond_jax import atomic, build
from arcond_jax.analysis import comparison, report
from arcond_jax.cli import paths
from arcond_jax.parallel import processes
from arcond_jax.run import evaluating, restoring

EPILOG = """examples:
  arcond compare --checkpoint runs/digits \\
      --system plain transport.kind=none \\
      --system refined transport.kind=stored \\
      --system tuned transport.kind=none sampling.latent_temperature=1.1

The first system is the baseline of the differences; ± is their standard error over the seeds. The
table is printed, and everything measured is written to comparison.json in the workdir."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=paths.folder, help="a workdir")
    parser.add_argument(
        "--system",
        required=True,
        action="append",
        nargs="+",
        metavar=("NAME", "section.key=value"),
        help="a name and settings over the model's own; repeat for every system",
    )
    parser.add_argument("--num_seeds", type=int, default=10)
    parser.add_argument("--per_class", type=int, default=100, help="images of a class per seed")
    parser.add_argument("--out", type=paths.place, help="default: comparison.json in the workdir")


def main(args: argparse.Namespace) -> None:
    if args.num_seeds < 2:
        raise build.ConfigError("--num_seeds must be at least 2: one seed has no standard error")
    if args.per_class < 1:
        raise build.ConfigError(f"--per_class {args.per_class} must be at least 1")
    names = [name for name, *_ in args.system]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise build.ConfigError(f"--system {twice[0]} is given twice: give each a name of its own")
    out = args.out or args.checkpoint / "comparison.json"
    config = restoring.config_for(args.checkpoint, None, args.overrides)
    atomic.check(out)
    trained = restoring.restore(args.checkpoint, config=config)
    systems = [
        comparison.System(name, "model", comparison.settings(config, overrides))
        for name, *overrides in args.system
    ]
    measured = comparison.compare(
        systems,
        {"model": trained},
        reference=evaluating.reference(config, args.checkpoint),
        label=np.repeat(np.arange(config.data.num_classes), args.per_class),
        seeds=range(args.num_seeds),
    )
    if not processes.is_first():
        return
    header, rows = comparison.table(measured, baseline=systems[0].name)
    print(report.table_text(header, rows))
    atomic.write_text(out, json.dumps(comparison.as_json(measured), indent=2) + "\n")
    print(f"written: {out}")
