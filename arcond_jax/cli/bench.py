"""`arcond bench`: seconds per image, split by part, with the operations behind them."""

import argparse
import dataclasses
import json
import math

from arcond_jax import atomic, benchmark, build
from arcond_jax.analysis import report
from arcond_jax.cli import paths

EPILOG = """examples:
  arcond bench --config mar_base_imagenet256 --config.training.dtype=float32 \\
      --config.sampling.num_ar_steps=64 --config.sampling.num_head_evaluations=25 \\
      --against sampling.num_buckets=1
  arcond bench --config llamagen_b_256 --config.training.dtype=float32 \\
      --config.sampling.top_k=2000 --config.model.unroll=12 --config.model.remat=none \\
      --batch_size 1 --batch_size 8
  arcond bench --config digits:ar --batch_size 1 --batch_size 64

Weights are random. Programs run in turns; compare the numbers of one run only. GFLOP and GB are
what the sampler has to compute and to read at least."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE[:VARIANT]", help="config file")
    parser.add_argument("--batch_size", type=int, action="append", help="repeat for more; 1")
    parser.add_argument(
        "--against",
        action="append",
        nargs="+",
        default=[],
        metavar="section.key=value",
        help="time a sampler with other settings too, of sampling or tensorar; repeat for more",
    )
    parser.add_argument("--num_runs", type=int, default=1, help="of every program")
    parser.add_argument("--no_split", action="store_true", help="leave the parts out")
    parser.add_argument("--out", type=paths.file, help=".json to write")


def main(args: argparse.Namespace) -> None:
    batch_sizes = args.batch_size or [1]
    for name, value in {"--batch_size": min(batch_sizes), "--num_runs": args.num_runs}.items():
        if value < 1:
            raise build.ConfigError(f"{name} {value} must be at least 1")
    if args.out is not None:
        atomic.check(args.out)
    config = build.load_config(args.config, args.overrides)
    configs = {config.name: config}
    for settings in args.against:
        configs[" ".join(settings)] = build.with_overrides(config, settings)
    timings = benchmark.measure(
        configs,
        batch_sizes=batch_sizes,
        num_runs=args.num_runs,
        split=not args.no_split,
    )
    num_tokens = math.prod(build.grid(config))
    rows, first = [], timings[0]
    for timing in timings:
        if timing.name == config.name:
            first = timing
        work, peak = timing.work, timing.peak_bytes / 2**30
        rows.append(
            [
                timing.name,
                f"{timing.batch_size}",
                f"{timing.seconds_per_image:.3g}",
                f"{timing.seconds_per_image / first.seconds_per_image:.2f}",
                f"{num_tokens / timing.seconds_per_image:.3g}",
                f"{peak:.2f}",
                None if work is None else f"{work.operations / 1e9:.0f}",
                None if timing.gflops is None else f"{timing.gflops:.0f}",
                None if work is None or not work.bytes_read else f"{work.bytes_read / 1e9:.0f}",
                None if not work or not work.bytes_read else f"{timing.gigabytes_per_second:.1f}",
            ]
        )
    header = ["sampler", "batch", "s/image", "ratio", "tokens/s", "peak GiB"]
    header += ["GFLOP", "GFLOP/s", "GB", "GB/s"]
    print(report.table_text(header, rows))
    if args.out is not None:
        text = json.dumps([dataclasses.asdict(t) for t in timings], indent=2)
        atomic.write_text(args.out, text + "\n")
