"""`arcond <command>`: one file a command; errors of the user end in one line and exit code 2."""

import argparse
import ast
import importlib
import logging
import sys
from importlib import resources
from types import ModuleType

COMMANDS = (
    "demo",
    "config",
    "prepare",
    "estimate",
    "encode",
    "train",
    "status",
    "calibrate",
    "captions",
    "sample",
    "evaluate",
    "reference",
    "compare",
    "sweep",
    "convert",
    "export",
    "bench",
    "compile",
)
# Those that processes on several hosts run as one.
TOGETHER = ("train", "calibrate", "sample", "evaluate", "reference", "compare", "sweep")


def main(argv: list[str]) -> int:
    """Runs a command; returns the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # before a library does
    for quieter in ("jax", "matplotlib"):
        logging.getLogger(quieter).setLevel(logging.WARNING)
    # Orbax logs what it raises as well, and what ends after a first read or write failed.
    for noisy in ("absl", "orbax", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    prefix = "--config."
    overrides = [a.removeprefix(prefix) for a in argv if a.startswith(prefix)]
    rest = [a for a in argv if not a.startswith(prefix)]
    try:
        args = _parser(rest).parse_args(rest)
    except ValueError as error:  # of jax, at its import
        print(f"arcond: {error}: set that variable rightly or not at all", file=sys.stderr)
        return 2
    args.overrides = overrides

    # Here, so that the help of a command waits for nothing that it does not show.
    import jax

    from arcond_jax.cli import compilation, failing, joining
    from arcond_jax.parallel import processes, stalling

    if jax.config.read("jax_enable_x64"):  # keys would draw other numbers
        logging.warning("JAX_ENABLE_X64 is not heeded: nothing here is computed in 64 bits")
        jax.config.update("jax_enable_x64", False)
    compilation.keep()

    def run() -> int | None:
        minutes = None
        if args.command in TOGETHER:
            joining.join(args, argv)
            minutes = None if args.command == "train" else args.stall_minutes  # it does so itself
        with stalling.watched(minutes):
            code = module_of(args.command).main(args)
            processes.together()  # one may still write what all have drawn
        return code

    code, line = failing.guarded(args.command, run)
    joining.leave(code, line)
    return code


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    """Knows the flags of the command at hand and what the others do: no other is imported."""
    parser = argparse.ArgumentParser(
        prog="arcond", description="Autoregressive image generation in JAX."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((a for a in argv if not a.startswith("-")), None)
    for name in COMMANDS:
        summary = _summary(name)
        command = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == chosen:
            module = module_of(name)
            command.epilog = module.EPILOG
            module.add_arguments(command)
            if name in TOGETHER:
                from arcond_jax.cli import joining

                stall_minutes = joining.STALL if name == "train" else None
                joining.add_arguments(command, stall_minutes=stall_minutes)
    return parser


def module_of(name: str) -> ModuleType:
    """The file of a command."""
    return importlib.import_module(f"arcond_jax.cli.{name}")


def _summary(name: str) -> str:
    """What the docstring of a command says, read without importing it."""
    source = resources.files("arcond_jax.cli").joinpath(f"{name}.py").read_text("utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition(": ")[2]
