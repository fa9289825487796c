"""`arcond <command>`: one file a command; errors of the user end in one line and exit code 2."""

import argparse
import logging
import sys

from arcond_jax import build, checkpoint
from arcond_jax.cli import (
    bench,
    calibrate,
    captions,
    compare,
    config,
    convert,
    demo,
    evaluate,
    export,
    sample,
    train,
)
from arcond_jax.training import loop

COMMANDS = {
    "demo": demo,
    "config": config,
    "train": train,
    "calibrate": calibrate,
    "captions": captions,
    "sample": sample,
    "evaluate": evaluate,
    "compare": compare,
    "convert": convert,
    "export": export,
    "bench": bench,
}


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    prefix = "--config."
    overrides = [a.removeprefix(prefix) for a in argv if a.startswith(prefix)]
    args = _parser().parse_args([a for a in argv if not a.startswith(prefix)])
    args.overrides = overrides

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("absl", "jax", "orbax"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        COMMANDS[args.command].main(args)
    except (
        build.ConfigError,
        checkpoint.CheckpointError,
        loop.DivergedError,
        ImportError,  # of what only some need: to read a bucket, say
        ValueError,
        OSError,
    ) as error:
        print(f"arcond {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="arcond", description="Autoregressive image generation in JAX."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").partition(": ")[2].strip()
        command = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
