"""`arcond compile`: whether a config fits devices that are not here, and what they would send."""

import argparse
import dataclasses
import json
from typing import Any

from arcond_jax import aot, atomic, build
from arcond_jax.analysis import report as report_lib
from arcond_jax.cli import paths
from arcond_jax.parallel import collectives, topology

EPILOG = """examples:
  arcond compile --config ar_xl_imagenet256 --topology v5e:16x16 --config.mesh.fsdp=16
  arcond compile --config mar_huge_imagenet256 --topology v5e-16 --search
  arcond compile --config llamagen_xxl_384 --topology v6e:4x4 --what sample
  arcond compile --config digits:joint --topology cpu --json report.json

Topologies: v5e:16x16, v5e-256 and v5litepod-256 are one; so are v5p:2x2x4 and v5p-32, which counts
cores. cpu and gpu are the devices of this machine. A TPU is compiled for by the TPU's own compiler,
without a TPU: pip install 'arcond_jax[tpu]'. Full-size steps take minutes to compile; one that does
not fit is refused in under a minute. Exit code 3: it does not fit."""

GIB, MIB = 2**30, 2**20
MORE_DEVICES = "Nothing is left to change: take more devices, a smaller batch or fewer parameters."
DOES_NOT_FIT = 3  # exit code
MAX_SLICES = 1024  # more than there are; the compiler makes a list of their devices
MOST_SIZES = 4  # of attention, in a line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config file")
    parser.add_argument("--topology", required=True, help="v5e:4x4, v5p-32, cpu, ...")
    parser.add_argument("--slices", type=int, default=1, help="of that topology; 1")
    parser.add_argument("--what", choices=aot.WHAT, default="train", help="train")
    parser.add_argument(
        "--search", action="store_true", help="change mesh.fsdp, remat and pieces until it fits"
    )
    parser.add_argument("--json", type=paths.file, metavar="FILE", help="the same as JSON")


def main(args: argparse.Namespace) -> int:
    if not 1 <= args.slices <= MAX_SLICES:
        raise build.ConfigError(f"--slices {args.slices} must be from 1 to {MAX_SLICES}")
    if args.json is not None:
        atomic.check(args.json)
    config = build.load_config(args.config, args.overrides)
    devices = topology.named(args.topology, slices=args.slices)
    made = []
    if args.search:
        for report in aot.search(config, devices, what=args.what):
            made.append(report)
            print(_line(report), flush=True)
    else:
        made.append(aot.compile_for(config, devices, what=args.what))
    print(text(made[-1]))
    if not made[-1].fits:
        more = aot.left_to_change(made[-1], config)
        print("--search looks for what would." if more else MORE_DEVICES)
    if args.json is not None:
        atomic.write_text(args.json, json.dumps([plain(x) for x in made], indent=2) + "\n")
    return 0 if made[-1].fits else DOES_NOT_FIT


def plain(report: aot.Report) -> dict[str, Any]:
    """As JSON."""
    found = report.collectives
    return dataclasses.asdict(report) | {
        "total": report.total,
        "spare": report.spare,
        "collectives": None if found is None else collectives.total(found),
        "largest_collective": None if report.largest is None else report.largest.bytes,
    }


def _line(report: aot.Report) -> str:
    verdict = "fits" if report.fits else "does not fit"
    return (
        f"fsdp {report.mesh['fsdp']}, remat {report.remat}, batch {report.batch_size} in "
        f"{report.num_accumulations}: {report.total / GIB:.1f} of {report.limit / GIB:.2f} GiB, "
        f"{verdict} ({report.compile_seconds:.0f} s)"
    )


def _attention(kind: str, sizes: list[tuple[int, int]]) -> str:
    """Sizes are queries x keys; of many the first and the last."""
    names = [f"{queries} x {keys}" for queries, keys in sizes]
    if len(names) > MOST_SIZES:
        names = [names[0], "...", names[-1]]
    return f"{kind} of {', '.join(names)}"


def text(report: aot.Report) -> str:
    """A few lines and a table."""
    mesh = " x ".join(f"{name} {size}" for name, size in report.mesh.items())
    lines = [
        f"{report.what} {report.config} on {report.topology}: {mesh}, batch {report.batch_size}"
        + (f" in {report.num_accumulations} pieces" if report.num_accumulations > 1 else "")
        + f", remat {report.remat}",
        "",
    ]
    held = report.parts | {"while it runs": report.temporary, "all": report.total}
    unit, size = ("GiB", GIB) if report.total > GIB else ("MiB", MIB)
    rows = [[name, f"{x / size:.3f}"] for name, x in held.items()]
    rows += [["there is", f"{report.limit / size:.3f}"]]
    lines += [report_lib.table_text(["memory of a device", unit], rows), ""]
    if report.fits:
        lines.append(f"It fits, with {100 * report.spare:.0f} % to spare.")
    else:
        over = (report.total - report.limit) / GIB
        lines.append(f"It does not fit, by {over:.1f} GiB.")
    if report.operations is not None:
        lines.append(f"{report.operations / 1e12:.3g} TFLOP of matrix products a device and step.")
    if report.attention:
        kinds = (_attention(kind, sizes) for kind, sizes in report.attention.items())
        lines.append(f"Attention, queries x keys: {'; '.join(kinds)}.")
    if report.collectives is not None:
        sums = collectives.total(report.collectives)
        lines.append(f"{sum(sums.values()) / 1e9:.3g} GB sent or received a device and step:")
        rows = [[kind, f"{size / 1e6:.3g}"] for kind, size in sums.items()]
        lines += [report_lib.table_text(["collective", "MB"], rows)] if rows else ["  none"]
    lines.append(f"Compiled in {report.compile_seconds:.0f} s.")
    return "\n".join(lines)
