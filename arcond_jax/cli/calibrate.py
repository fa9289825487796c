"""`arcond calibrate`: fit the refinement of conditions to a trained model and its sampler."""

import argparse

from arcond_jax import build
from arcond_jax.build import transport
from arcond_jax.cli import paths
from arcond_jax.parallel import stalling
from arcond_jax.run import refinement, restoring

EPILOG = """examples:
  arcond calibrate --checkpoint runs/digits
  arcond calibrate --checkpoint runs/digits --config.sampling.code_temperature=0.8

The map depends on the sampler: give the same --config settings to `arcond sample`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=paths.folder, help="a workdir")
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="default: the checkpoint's own")


def main(args: argparse.Namespace) -> None:
    config = restoring.config_for(args.checkpoint, args.config, args.overrides)
    if transport.kind_of(config).maps is None:
        fitted = (name for name, kind in transport.KINDS.items() if kind.maps is not None)
        raise build.ConfigError(
            f"transport.kind={config.transport.kind} needs no calibration: use one of "
            f"{', '.join(fitted)}"
        )
    with stalling.watched(args.stall_minutes):
        trained = restoring.restore(args.checkpoint, config=config)
        refiner = refinement.calibrate(trained)
        refinement.save_refiner(trained, args.checkpoint, config, refiner)
    print(f"calibrated: {args.checkpoint / 'refiner'}")
