"""What kind of source a path is, told by its content."""

import pathlib
from collections.abc import Sequence

import numpy as np

from arcond_jax.data import parquet, records, stored, tars, tfds, unpacked
from arcond_jax.data.listing import Listing

PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z")


def find(
    sources: Sequence[pathlib.Path], *, class_names: tuple[str, ...] | None = None
) -> dict[str, Listing]:
    """The splits, "train", "held_out" or both, of one or several sources, labelled alike.

    Args:
      sources: Folders or files; one split may be in one, and the other in another.
      class_names: In the order of their ids, for sources that know ids alone.

    Raises:
      ImportError: A kind that needs an extra.
      ValueError: A source does not exist, is of no known kind, has no labels, or a class of its
        train split has no images.
    """
    found: dict[str, Listing] = {}
    for source in sources:
        for split, listing in _of_one(source).items():
            if split in found:
                raise ValueError(f"{source} has a split {split}, which another source has as well")
            found[split] = _named(listing, class_names)
    train = found.get("train")
    if train is not None:
        counts = np.bincount(train.label, minlength=len(train.class_names))
        if not counts.all():
            empty = train.class_names[int(np.argmin(counts))]
            raise ValueError(f"the class {empty!r} has no images to train on: {sources[0]}")
        if "held_out" in found:
            found["held_out"] = found["held_out"].labelled(train.class_names)
    return found


def _of_one(source: pathlib.Path) -> dict[str, Listing]:
    if not source.exists():
        raise ValueError(f"{source} does not exist: name a file or a folder of images")
    if source.is_file():
        if source.name.endswith(".parquet"):
            return parquet.find([source], source)
        if source.name.endswith(".tar"):
            return tars.find([source], source)
        packed = source.suffix in PACKED
        what = "unpack it first" if packed else "give a folder, a .tar or a .parquet file"
        raise ValueError(f"{source} is not read: {what}")
    if records.is_prepared(source):
        tokens = records.read_manifest(source).get("kind") == stored.KIND
        what, name = ("is a cache", "cache") if tokens else ("is prepared already", "records")
        raise ValueError(
            f"{source} {what}: train on it by data.name={name} and data.directory={source}"
        )
    if tfds.is_prepared(source):
        raise ValueError(f"{source} was prepared by tfds: train on it as it is, by data.name=tfds")
    for ending, module in ((".parquet", parquet), (".tar", tars)):
        depths = (f"*{ending}", f"*/*{ending}")  # deeper are single images, a million perhaps
        files = [x for depth in depths for x in source.glob(depth) if x.name[0] != "."]
        if files:
            return module.find(files, source)
    return unpacked.find(source)


def _named(listing: Listing, class_names: tuple[str, ...] | None) -> Listing:
    """With class names in the place of ids."""
    ids = tuple(str(i) for i in range(len(listing.class_names)))
    if class_names is None or listing.class_names != ids:
        return listing
    if len(class_names) < len(ids):
        raise ValueError(f"{len(class_names)} class names are too few for {len(ids)} classes")
    return listing.renamed(class_names)
