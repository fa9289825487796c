"""Listings of folders of images: a folder a class, or ILSVRC's flat folder of validation images."""

import pathlib

import numpy as np

from arcond_jax.data import folder
from arcond_jax.data.listing import VALIDATION, Listing, validation_labels

KAGGLE = (("ILSVRC", "Data", "CLS-LOC"), ("Data", "CLS-LOC"), ("CLS-LOC",))


def find(root: pathlib.Path) -> dict[str, Listing]:
    """Splits of a folder: train and held out, or classes or validation images at its top.

    Raises:
      ValueError: It has no images, or they have no labels, or a class has no images.
    """
    kaggle = [root.joinpath(*parts) for parts in KAGGLE if root.joinpath(*parts).is_dir()]
    root = kaggle[0] if kaggle else root
    found = {}
    for split, names in folder.SPLITS.items():
        # Kaggle's test images have no labels.
        chosen = [root / x for x in names if (root / x).is_dir() and not (kaggle and x == "test")]
        if chosen:
            found[split] = _split(chosen[0])
    if not found:
        only = _split(root)
        return {"held_out" if only.kind == "validation images" else "train": only}
    return found


def _split(root: pathlib.Path) -> Listing:
    names = folder.class_names(root)
    files = {name: list(folder.files_below(root / name)) for name in names}
    images = {name: [x for x in files[name] if folder.is_image(x)] for name in names}
    if any(images.values()):
        empty = [name for name in names if not images[name]]
        if empty:
            raise ValueError(
                f"{root} has {len(empty)} of {len(names)} classes without images, the first is "
                f"{empty[0]!r}: remove its folder, or put images into it"
            )
        flat = [f"{name}/{file}" for name in names for file in images[name]]
        label = np.repeat(np.arange(len(names)), [len(images[name]) for name in names])
        return _listing("class folders", root, flat, label, names)
    flat = sorted(x.name for x in root.iterdir() if x.name[0] != "." and folder.is_image(x.name))
    if flat and all(VALIDATION.fullmatch(name) for name in flat):
        label, names = validation_labels(flat)
        return _listing("validation images", root, flat, label, names)
    if flat:
        raise ValueError(
            f"{root} holds images without labels, such as {flat[0]}: put them into a folder for "
            "each class"
        )
    endings = ", ".join(folder.EXTENSIONS)
    raise ValueError(
        f"{root} has no images: give folders of classes that hold {endings}, tar or parquet files"
    )


def _listing(
    kind: str, root: pathlib.Path, files: list[str], label: np.ndarray, names: tuple[str, ...]
) -> Listing:
    return Listing(
        kind=kind,
        names=files,
        label=label.astype(np.int32),
        size=np.asarray([_size(root / file) for file in files], np.int64),
        class_names=names,
        read=lambda index: (root / files[index]).read_bytes(),
    )


def _size(path: pathlib.Path) -> int:
    """Bytes of a file; none of a link that leads nowhere, which fails when it is read."""
    return path.stat().st_size if path.exists() else 0
