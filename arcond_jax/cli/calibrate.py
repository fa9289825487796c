"""`arcond calibrate`: fit the refinement of conditions to a trained model and its sampler."""

import argparse
import pathlib

from arcond_jax import build, run

EPILOG = """examples:
  arcond calibrate --checkpoint runs/digits
  arcond calibrate --checkpoint runs/digits --config.sampling.code_temperature=0.8

The map depends on the sampler: give the same --config settings to `arcond sample`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=pathlib.Path, help="a workdir")
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="default: the checkpoint's own")


def main(args: argparse.Namespace) -> None:
    config = run.config_for(args.checkpoint, args.config, args.overrides)
    if config.transport.kind in ("none", "in_batch"):
        raise build.ConfigError(
            f"transport.kind={config.transport.kind} needs no calibration: use stored, bures or "
            "residual"
        )
    trained = run.restore(args.checkpoint, config=config)
    run.save_refiner(trained, args.checkpoint, config, run.calibrate(trained))
    print(f"calibrated: {args.checkpoint / 'refiner'}")
