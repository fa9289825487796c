"""What full-size updates take of TPU topologies, by the TPU's own compiler: docs/pods.md.

    python benchmarks/pods.py --reports reports                 # compiles what is missing: hours
    python benchmarks/pods.py --reports reports --only_table

Each config is compiled for each topology by `arcond compile --search`, from 16 devices along fsdp
on, which changes what it must until the update fits. A report is one file, so that the script
can be stopped and goes on. Needs 'arcond_jax[tpu]' and no TPU.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

CONFIGS = (
    "ar_xl_imagenet256",
    "joint_xl_imagenet256:joint_tensorar",
    "mar_base_imagenet256",
    "mar_large_imagenet256",
    "mar_huge_imagenet256",
    "cdm_xl_imagenet256",
    "llamagen_xl_256",
    "llamagen_xxl_384",
    "llamagen_3b_384",
    "rar_xl",
    "rar_xxl",
    "magvit2_xl",
)
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:2x2x4", "v6e:4x4", "v6e:16x16")
GIB = 2**30


def path_of(folder: pathlib.Path, config: str, topology: str) -> pathlib.Path:
    """The report of a config on a topology."""
    return folder / f"{config}_{topology}.json".replace(":", "_")


def compile_one(config: str, topology: str, out: pathlib.Path) -> None:
    """Writes that report."""
    command = [sys.executable, "-m", "arcond_jax", "compile", "--config", config, "--search"]
    command += ["--topology", topology, "--json", str(out), "--config.mesh.fsdp=16"]
    subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=False)


def row(report: dict) -> str:
    """A line of the table."""
    mesh, total = report["mesh"], report["total"] / GIB
    moved = report["collectives"] and sum(report["collectives"].values()) / 1e9
    cells = [
        f"`{report['config']}`",
        report["topology"],
        f"{mesh['data']} x {mesh['fsdp']}",
        f"{report['batch_size']} / {report['num_accumulations']}",
        "yes" if report["fits"] else "no",
        f"{total:.2f} of {report['limit'] / GIB:.2f}",
        f"{100 * report['spare']:.0f} %",
        "–" if moved is None else f"{moved:.2f}",
        "–" if report["operations"] is None else f"{report['operations'] / 1e12:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Compiles what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reports", type=pathlib.Path, required=True)
    parser.add_argument("--only_table", action="store_true", help="compile nothing")
    args = parser.parse_args()
    args.reports.mkdir(exist_ok=True)
    print("| config | topology | data x fsdp | batch / pieces | fits | GiB | spare | GB | TFLOP |")
    print("|---|---|---|---|---|---|---|---|---|")
    for config in CONFIGS:
        for topology in TOPOLOGIES:
            out = path_of(args.reports, config, topology)
            if not out.exists() and not args.only_table:
                compile_one(config, topology, out)
            if out.exists():
                print(row(json.loads(out.read_text())[-1]), flush=True)


if __name__ == "__main__":
    main()
