"""Real images as evaluations compare with them: read, measured, written; and what is known of them.

Files that others publish are read as they are:

- ADM's reference batches (`VIRTUAL_imagenet256_labeled.npz`): `mu`, `sigma`, `mu_s`, `sigma_s` of
  all of ImageNet's training images, and 10,000 of them, `arr_0`, for precision and recall.
- `mu` and `sigma` alone: MAR's `adm_in256_stats.npz`, those of pytorch-fid and of clean-fid.
- `arr_0` alone, images of any kind.

Ours have `mu`, `sigma`, `mu_s`, `sigma_s` as well, the features of some images in the place of
their pixels, and a card, which no other file has.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping

import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float, Float32, Int

from arcond_jax import atomic
from arcond_jax.evaluation import features as features_lib
from arcond_jax.evaluation import image_sets, inception, moments, npz, summary

WHAT = "reference file"
KEPT = 10_000  # rows of features: as many as ADM has images for precision and recall
KEPT_FACT = "kept for precision, recall and KID"
UNSAID = "not said by the file"
ROUNDING = 1e-5  # of a covariance, as a share of its largest entry or eigenvalue
Setting = image_sets.Setting


@dataclasses.dataclass(frozen=True)
class Reference:
    """Real images to compare with.

    Attributes:
      facts: All that is known of them, for the card of an evaluation: file, sha256, images, crop,
        resize, and the network that read them.
      features, spatial: Mean and covariance of features; None where they are not known.
      rows: Features of some of the images, for precision, recall and KID; None without.
      label: Classes of these; None where they are not known.
      image_shape: Height, width and channels; None where they are not known.
    """

    facts: Mapping[str, Setting]
    features: moments.Statistics | None
    spatial: moments.Statistics | None = None
    rows: Float32[np.ndarray, "m d"] | None = None
    label: Int[np.ndarray, " m"] | None = None
    image_shape: tuple[int, ...] | None = None

    @property
    def width(self) -> int | None:
        """Features of an image."""
        if self.features is not None:
            return self.features.mean.size
        return None if self.rows is None else self.rows.shape[1]


def network_facts(extractor: features_lib.Features) -> dict[str, Setting]:
    """What features depend on, for a card."""
    if isinstance(extractor, inception.Inception):
        return {
            "network": "Inception-v3",
            "weights": extractor.sha256,
            "preprocessing": extractor.preprocessing,
            "dtype": extractor.dtype,
        }
    return {"network": extractor.description}


def measure(
    images: image_sets.ImageSet,
    extractor: features_lib.Features,
    *,
    mesh: Mesh | None = None,
    keep: int = KEPT,
    num_classes: int | None = None,
) -> Reference:
    """Reads real images.

    Args:
      mesh, num_classes: As of `summary.summarise`, as are errors.
      keep: Images whose features are kept, evenly spread.
    """
    found = summary.summarise(
        images,
        extractor,
        what="reference images",
        mesh=mesh,
        keep=keep,
        num_classes=num_classes,
    )
    accuracy = {} if found.class_accuracy is None else {"class accuracy": found.class_accuracy}
    return Reference(
        facts={
            **images.facts,
            "images": found.count,
            "image size": _size(found.image_shape),
            KEPT_FACT: 0 if found.rows is None else len(found.rows),
            **network_facts(extractor),
            **accuracy,
        },
        features=found.features,
        spatial=found.spatial,
        rows=found.rows,
        label=found.label,
        image_shape=found.image_shape,
    )


def read(
    path: str | os.PathLike, extractor: features_lib.Features, *, mesh: Mesh | None = None
) -> Reference:
    """Reads a reference file or a folder of images; images in it are read by the network.

    Args:
      mesh: As of `summary.summarise`.

    Raises:
      FileNotFoundError, ValueError: Nothing is there; no reference or a damaged one; made with
        another network, other weights or another preprocessing; or its images cannot be read.
    """
    if epath.Path(path).is_dir():
        return measure(image_sets.Folder(path), extractor, mesh=mesh)
    held = npz.names_in(path, what=WHAT)
    if "card" in held:
        return _ours(path, held, extractor)
    if "mu" not in held:
        return measure(image_sets.Npz(path, what=WHAT), extractor, mesh=mesh)
    facts: dict[str, Setting] = {
        "file": os.fspath(path),
        "sha256": image_sets.sha256(path),
        "images": UNSAID,
        "crop, resize and network of its statistics": UNSAID,
    }
    features = _statistics(path, "mu", "sigma", count=None)
    has_spatial = {"mu_s", "sigma_s"} <= held
    spatial = _statistics(path, "mu_s", "sigma_s", count=None) if has_spatial else None
    if "arr_0" not in held:
        return Reference(facts, features, spatial)
    images = measure(image_sets.Npz(path, what=WHAT), extractor, mesh=mesh)
    _check_width(path, features.mean.size, images.width)
    read_by_us = ("image size", KEPT_FACT, *network_facts(extractor))
    facts |= {name: images.facts[name] for name in read_by_us}
    return dataclasses.replace(images, facts=facts, features=features, spatial=spatial)


def write(path: str | os.PathLike, reference: Reference) -> None:
    """Writes a reference whole or not at all, and its card as JSON beside it.

    pytorch-fid reads the file too.
    """
    arrays = {"card": np.asarray(json.dumps(dict(reference.facts)))}
    for names, found in (
        (("mu", "sigma"), reference.features),
        (("mu_s", "sigma_s"), reference.spatial),
    ):
        if found is not None:
            arrays |= dict(zip(names, (found.mean, found.covariance), strict=True))
            arrays["count"] = np.asarray(found.count or 0)
    if reference.rows is not None:
        arrays["features"] = reference.rows
    if reference.label is not None:
        arrays["label"] = reference.label.astype(np.int32)
    if reference.image_shape is not None:
        arrays["image_shape"] = np.asarray(reference.image_shape)
    npz.write(path, arrays)
    card = json.dumps(dict(reference.facts), indent=2, allow_nan=False) + "\n"
    atomic.write_text(card_path(path), card)


def card_path(path: str | os.PathLike) -> epath.Path:
    """The card beside a reference."""
    path = epath.Path(path)
    return path.with_name(path.name.removesuffix(".npz") + ".card.json")


def check_network(
    reference: Reference, extractor: features_lib.Features, *, where: str | os.PathLike
) -> None:
    """Raises ValueError if the reference says that another network or preprocessing made it."""
    for name, value in network_facts(extractor).items():
        said = reference.facts.get(name, value)
        if said != value:
            raise ValueError(
                f"{where} was made with {name} {said}, this evaluation has {value}: their features "
                "cannot be compared; use the same, or make another by `arcond reference`."
            )


def _ours(
    path: str | os.PathLike, held: frozenset[str], extractor: features_lib.Features
) -> Reference:
    wanted = {"card", "count", "image_shape", "features", "label"}
    arrays = npz.read(path, *sorted(wanted & held), what=WHAT)
    count, shape = arrays.get("count"), arrays.get("image_shape")
    rows, label = _rows(arrays.get("features"), path), arrays.get("label")
    if label is not None and rows is not None and label.shape != rows.shape[:1]:
        raise ValueError(f"{path} is not a whole {WHAT}: labels are not as many as features.")
    reference = Reference(
        facts={
            "reference file": os.fspath(path),
            "its sha256": image_sets.sha256(path),
            **_facts(arrays["card"], path),
        },
        features=_statistics(path, "mu", "sigma", count=count) if "mu" in held else None,
        spatial=_statistics(path, "mu_s", "sigma_s", count=count) if "mu_s" in held else None,
        rows=rows,
        label=label,
        image_shape=None if shape is None else tuple(shape.ravel().tolist()),
    )
    check_network(reference, extractor, where=path)
    return reference


def _facts(card: np.ndarray, path: str | os.PathLike) -> dict[str, Setting]:
    facts = None
    with contextlib.suppress(ValueError, RecursionError):
        facts = json.loads(str(card))
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is not a {WHAT}: its card must be one JSON object.")
    return facts


def _rows(rows: np.ndarray | None, path: str | os.PathLike) -> Float32[np.ndarray, "m d"] | None:
    if rows is not None and not (
        rows.dtype == np.float32 and rows.ndim == 2 and np.isfinite(rows).all()
    ):
        raise ValueError(f"{path} is not a {WHAT}: its features are not rows of finite float32.")
    return rows


def _statistics(
    path: str | os.PathLike, mean_name: str, covariance_name: str, *, count: np.ndarray | None
) -> moments.Statistics:
    arrays = npz.read(path, mean_name, covariance_name, what=WHAT)
    mean, covariance = arrays[mean_name], arrays[covariance_name]
    floats = all(np.issubdtype(x.dtype, np.floating) for x in (mean, covariance))
    if not floats or mean.ndim != 1 or covariance.shape != (mean.size, mean.size):
        raise ValueError(
            f"{path} is not a {WHAT}: {mean_name} is {mean.dtype} {list(mean.shape)} and "
            f"{covariance_name} {covariance.dtype} {list(covariance.shape)}."
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path} is not a {WHAT}: {mean_name} or {covariance_name} is not finite.")
    if not _is_covariance(covariance):
        raise ValueError(
            f"{path} is not a {WHAT}: {covariance_name} is no covariance, which is symmetric and "
            "has no negative eigenvalues."
        )
    number = None
    if count is not None:
        number = npz.whole_number(count, where=f"{path}: count") or None
    return moments.Statistics(mean.astype(np.float64), covariance.astype(np.float64), number)


def _is_covariance(matrix: Float[np.ndarray, "d d"]) -> bool:
    """Whether a matrix is one to the rounding of its type, or of float32."""
    scale = float(np.abs(matrix).max(initial=0.0))
    if not np.allclose(matrix, matrix.T, rtol=0.0, atol=ROUNDING * scale):
        return False
    eigenvalues = np.linalg.eigvalsh(matrix.astype(np.float64))
    return bool(eigenvalues[0] >= -ROUNDING * max(eigenvalues[-1], 0.0))


def _check_width(path: str | os.PathLike, width: int, found: int | None) -> None:
    if found is not None and width != found:
        raise ValueError(
            f"{path} has statistics of {width} features, the network has {found}: use the network "
            "that they were made with."
        )


def _size(image_shape: tuple[int, ...]) -> str:
    return "x".join(map(str, image_shape))
