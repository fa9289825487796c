"""A folder of shards that is written by many processes, each shard whole or not at all.

The plan, which image goes into which shard, follows from the source and the settings alone. Shard s
is written by process s modulo the number of processes, so that a process that was killed goes on
with the shard it was at, and all ways lead to the same bytes.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from arcond_jax import atomic
from arcond_jax.data import records
from arcond_jax.run import progress

PROGRESS = "progress"  # folder of what is known of each shard that is written
FAILED = "failed.txt"  # names and reasons of the images that were left out


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard of the plan: images [start, stop) of a split."""

    split: str
    file: str
    start: int
    stop: int


def cut(split: str, starts: Sequence[int], count: int) -> list[Shard]:
    """The shards of a split of so many images, each from its start on."""
    ends = zip(starts, [*starts[1:], count], strict=True)
    return [
        Shard(split, f"{split}-{i:05d}-of-{len(starts):05d}.array_record", start, stop)
        for i, (start, stop) in enumerate(ends)
    ]


def check_out(sources: Iterable[pathlib.Path], out: pathlib.Path) -> None:
    """Raises ValueError for a folder that cannot be written to from these sources."""
    if "://" in str(out) or str(out).startswith("gs:/"):
        raise ValueError(f"{out} is a bucket: write to a local folder, and copy it there")
    for source in sources:
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise ValueError(f"{out} is inside of the source {source}: write to a folder beside it")
    if out.exists() and not records.is_prepared(out) and not _is_empty(out):
        raise ValueError(f"{out} holds something else: give a folder that is empty or not there")


def _is_empty(out: pathlib.Path) -> bool:
    """Whether a folder holds nothing but the rest of a manifest that was being written."""
    return out.is_dir() and all(x.name.startswith(f".{records.MANIFEST}.") for x in out.iterdir())


def begin(out: pathlib.Path, plan: dict[str, Any], shards: Sequence[Shard]) -> dict[str, Any]:
    """Writes the plan as a manifest, or checks that `out` was begun with the same one.

    Returns:
      The plan, with what shards hold.

    Raises:
      ValueError: It was begun with another one.
    """
    planned = {shard.file: shard.stop - shard.start for shard in shards}
    plan = {"kind": plan["kind"], "complete": False, **plan, "planned": planned}
    plan = json.loads(json.dumps(plan))  # as it comes back: tuples are lists
    if not records.is_prepared(out):
        out.mkdir(parents=True, exist_ok=True)
        records.write_manifest(out, plan)
        (out / PROGRESS).mkdir(exist_ok=True)
        return plan
    begun = records.read_manifest(out, kind=plan["kind"])
    for name, value in plan.items():
        if name != "complete" and begun.get(name) != value:
            was, now = (json.dumps(x.get(name))[:100] for x in (begun, plan))
            raise ValueError(
                f"{out} was begun with another {name} ({was}, now {now}): the source or the "
                "settings have changed; write to another folder"
            )
    (out / PROGRESS).mkdir(exist_ok=True)
    return plan


def unfinished(
    out: pathlib.Path, shards: Sequence[Shard], process_index: int, process_count: int
) -> tuple[list[Shard], progress.Progress]:
    """The shards that this process has yet to write, and how far it is."""
    mine = shards[process_index::process_count]
    missing = [shard for shard in mine if _finished(out, shard) is None]
    total, left = (sum(shard.stop - shard.start for shard in part) for part in (mine, missing))
    return missing, progress.Progress(total, done=total - left)


def _finished(out: pathlib.Path, shard: Shard) -> dict[str, Any] | None:
    """What is known of a shard that lies there whole; None for any other."""
    try:
        known = json.loads((out / PROGRESS / f"{shard.file}.json").read_text("utf-8"))
        whole = (out / shard.file).stat().st_size == known["bytes"]
        if "beside" in known:
            whole &= _beside(out, shard).stat().st_size == known["beside"]
        return known if whole else None
    except (FileNotFoundError, ValueError, KeyError):
        return None


def _beside(out: pathlib.Path, shard: Shard) -> pathlib.Path:
    return out / PROGRESS / f"{shard.file}.npz"


def keep(
    out: pathlib.Path,
    shard: Shard,
    label: list[int],
    failed: Sequence[Sequence[str]] = (),
    arrays: Mapping[str, Any] | None = None,
) -> None:
    """Notes that a shard is written: its labels, what was left out of it, and arrays made of it."""
    size = (out / shard.file).stat().st_size
    known = {"records": len(label), "bytes": size, "label": label, "failed": failed}
    if arrays is not None:
        with atomic.file(_beside(out, shard)) as opened:
            np.savez(opened, **arrays)
        known["beside"] = _beside(out, shard).stat().st_size
    atomic.write_text(out / PROGRESS / f"{shard.file}.json", json.dumps(known))


def arrays_of(out: pathlib.Path, shard: Shard) -> dict[str, np.ndarray]:
    """The arrays that `keep` was given of a finished shard."""
    with np.load(_beside(out, shard)) as held:
        return dict(held)


def write_failed(out: pathlib.Path, failed: Sequence[Sequence[str]]) -> None:
    """Lists the images that cannot be read, name and reason, one a line."""
    if failed:
        atomic.write_text(out / FAILED, "".join(f"{name}\t{why}\n" for name, why in failed))
    else:
        (out / FAILED).unlink(missing_ok=True)


def all_known(out: pathlib.Path, shards: Sequence[Shard]) -> list[dict[str, Any]] | None:
    """What is known of each shard; None while there are some to be written."""
    known = [_finished(out, shard) for shard in shards]
    return None if None in known else [x for x in known if x is not None]


def finish(
    out: pathlib.Path,
    plan: dict[str, Any],
    shards: Sequence[Shard],
    known: list[dict[str, Any]],
    **more: Any,
) -> dict[str, Any]:
    """Writes the labels, the list of what was left out and the complete manifest; returns it.

    Args:
      more: Of the manifest.

    Raises:
      ValueError: Every image of a class to train on was left out.
    """
    splits, failed = {}, [pair for x in known for pair in x["failed"]]
    write_failed(out, failed)
    for name in dict.fromkeys(shard.split for shard in shards):
        of_split = [(s.file, x) for s, x in zip(shards, known, strict=True) if s.split == name]
        label = np.asarray([i for _, x in of_split for i in x["label"]], np.int32)
        splits[name] = {
            "records": len(label),
            "counts": np.bincount(label, minlength=len(plan["class_names"])).tolist(),
            "labels_sha256": records.write_labels(out, name, label),
            "shards": [
                {"file": file, "records": x["records"], "bytes": x["bytes"]} for file, x in of_split
            ],
        }
        counts = splits[name]["counts"]
        if failed and name == "train" and not all(counts):
            raise ValueError(
                f"no image of the class {plan['class_names'][counts.index(0)]!r} can be read (see "
                f"{out / FAILED}): repair them, or remove the class"
            )
    manifest = plan | {"complete": True, "failed": len(failed), **more, "splits": splits}
    records.write_manifest(out, manifest)
    return manifest
