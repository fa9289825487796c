"""`arcond config`: the settings of a config, each with the value it has."""

import argparse
import json

from arcond_jax import build
from arcond_jax import config as config_lib

EPILOG = """examples:
  arcond config --config digits:joint
  arcond config --config ar_xl_imagenet256 --config.transport.kind=residual

A config holds what its run uses: the kind of data and of refinement decide which settings there
are, and are changed like any other."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config file")
    parser.add_argument("--json", action="store_true", help="as nested JSON")


def main(args: argparse.Namespace) -> None:
    config = build.load_config(args.config, args.overrides)
    if args.json:
        print(json.dumps(config.to_dict(), indent=2))
        return
    for name, value in config_lib.flat(config).items():
        print(f"{name} = {value!r}")
