"""How the samples of a run are made, what they are compared with, and how they are scored."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Float32, Int, UInt8

from arcond_jax import atomic, build, types
from arcond_jax.build import family
from arcond_jax.data import images, pipeline
from arcond_jax.evaluation import card, features, image_sets, samples
from arcond_jax.evaluation import classifier as classifier_lib
from arcond_jax.evaluation import inception as inception_lib
from arcond_jax.evaluation import reference as reference_lib
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.parallel import processes
from arcond_jax.run import drawing
from arcond_jax.run.restoring import Trained

# Settings of the sampler that change no image.
OF_SPEED = ("num_buckets",)
# As many as a Frechet distance is usually made of; their small versions take 0.6 GB in colour.
MAX_TRAIN_IMAGES = 50_000
SHOWN_NAMES = 10  # of classes, on a card


def provenance(trained: Trained, config: build.Config, *, seed: int) -> card.Settings:
    """How samples are made, for their file and their evaluation card: what is applied, and no more.

    Settings that are None are not, nor those that another one switches off.
    """
    sampling = {
        name: value
        for name, value in config.sampling.items()
        if value is not None and name not in OF_SPEED
    }
    scales = (sampling.get("guidance_scale", 1.0), sampling.get("later_guidance_scale", 1.0))
    if scales == (1.0, 1.0):
        sampling = {k: x for k, x in sampling.items() if not k.startswith("guid")}
    if sampling.get("solver", "ancestral") != "ancestral":
        del sampling["latent_temperature"]
    if not sampling.get("speculative", True):
        del sampling["speculative"], sampling["relaxed_acceptance"]
    if not sampling.get("renoise", True):
        del sampling["renoise"]
    if "tensorar" in config and (not family.has_windows(config) or family.is_drafter(config)):
        del sampling["drafts"]
    refinement = config.transport.to_dict()
    return card.Settings(
        sampling=sampling,
        refinement={} if config.transport.kind == "none" else refinement,
        seed=seed,
        checkpoint_step=trained.step,
    )


def check_samples(drawn: samples.Samples, config: build.Config) -> None:
    """Compares samples with the data of a config, before anything long is begun.

    Raises:
      ValueError: They are of another shape or of other classes, or too few to be scored.
    """
    if len(drawn.label) <= card.NUM_NEIGHBOURS:
        raise ValueError(
            f"{len(drawn.label)} samples are too few to be scored: draw at least "
            f"{card.NUM_NEIGHBOURS + 1}, better thousands"
        )
    card.check_shape(drawn.image_uint8.shape[1:], build.image_shape(config))
    if drawn.num_classes != config.data.num_classes:
        raise ValueError(
            f"the samples are of {drawn.num_classes} classes, the run of "
            f"{config.data.num_classes}: their labels do not mean the same"
        )
    said = drawn.metadata.get("label_names")
    known = build.source(config, "train").label_names
    if said is not None and said != list(known):
        raise ValueError(
            f"the samples are of the classes {said!r:.60}, the run of {list(known)!r:.60}: their "
            "labels do not mean the same"
        )


class _Images:
    """Images of a split that are loaded as they are sliced."""

    def __init__(
        self, split: pipeline.Source, rows: Int[np.ndarray, " n"], num_threads: int | None
    ) -> None:
        self._split, self._rows = split, rows
        self._pool = pipeline.pool(num_threads)
        self.label, self.label_names = split.label[rows], split.label_names

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice) -> Float32[np.ndarray, "rows height width channels"]:
        loaded = pipeline.load(self._split, self._rows[rows], self._pool)
        return images.as_float(loaded["image"])


def reference(config: build.Config, workdir: epath.PathLike) -> card.Reference:
    """Real images to compare with, and a classifier of them that is kept with the run.

    The training images are at most `MAX_TRAIN_IMAGES`, spread evenly over the split.

    Raises:
      ValueError: An image cannot be read, or the classifier there is of other data.
      OSError: The classifier is still to be trained, and could not be kept.
    """
    held_out, train = build.source(config, "held_out"), _train_images(config)
    threads, resize = config.data.num_threads, config.data.get("resize", "adm")
    return card.reference(
        _Images(held_out, np.arange(len(held_out)), threads),
        held_out.label,
        image_train=train,
        extractor=_classifier(config, epath.Path(workdir) / "classifier.npz", train),
        name=f"{config.data.name}, held out: {_listed(train.label_names)}",
        made_by={} if resize == "adm" else {"resize": f"{resize}, not the crop of ADM"},
    )


Labels = Literal["balanced", "drawn"]
LABELS: tuple[Labels, ...] = get_args(Labels)


@dataclasses.dataclass(frozen=True)
class Network:
    """What reads images for a score.

    Attributes:
      mesh: Of all devices, where the extractor reads images that are cut over them.
    """

    extractor: features.Features
    mesh: Mesh | None = None


def inception(
    folder: epath.PathLike,
    *,
    preprocessing: inception_lib.Preprocessing = "tf",
    dtype: inception_lib.Dtype = "float32",
) -> Network:
    """Inception on all devices; errors as of `inception.load`."""
    load = inception_lib.load
    if len(jax.devices()) == 1:
        return Network(load(folder, preprocessing=preprocessing, dtype=dtype))
    mesh = mesh_lib.make_mesh()
    place = mesh_lib.replicated(mesh)
    return Network(load(folder, preprocessing=preprocessing, dtype=dtype, place=place), mesh)


def classifier(config: build.Config, workdir: epath.PathLike) -> Network:
    """The small classifier of a run, trained the first time; errors as of `reference`."""
    train = _train_images(config)
    return Network(_classifier(config, epath.Path(workdir) / "classifier.npz", train))


def split(config: build.Config, name: str = "held_out") -> image_sets.Split:
    """The images of a split ("train" or "held_out"); errors as of `build.source`."""
    data = config.data
    facts: dict[str, image_sets.Setting] = {"data": data.name, "split": name}
    if data.get("directory"):
        facts["directory"] = data.directory
    if "resize" in data:
        facts |= image_sets.cropped(data.image_size, data.resize)
    return image_sets.Split(build.source(config, name), facts, num_threads=data.num_threads)


def real(config: build.Config, network: Network, name: str = "held_out") -> reference_lib.Reference:
    """A split of a run's data, read by the network."""
    return reference_lib.measure(
        split(config, name),
        network.extractor,
        mesh=network.mesh,
        num_classes=config.data.num_classes,
    )


def labels(num_images: int, num_classes: int, kind: Labels, *, seed: int) -> Int[np.ndarray, " n"]:
    """Classes to draw images of: all in turn ("balanced"), or at random by the seed ("drawn")."""
    if kind == "balanced":
        return (np.arange(num_images) % num_classes).astype(np.int32)
    return np.random.default_rng(seed).integers(num_classes, size=num_images).astype(np.int32)


def drawn(
    drawer: drawing.Drawer,
    refiner: types.Refiner,
    label: Int[np.ndarray, " n"],
    *,
    seed: int,
    batch_size: int | None = None,
    prompt: types.Prompt | None = None,
) -> Iterator[tuple[UInt8[np.ndarray, "size height width channels"], Int[np.ndarray, " size"]]]:
    """Images of a model and their classes, batch by batch, for `scoring.score`.

    Args:
      prompt: What the images are of; None for the labels.
    """
    start, prompt = 0, label if prompt is None else prompt
    for image_uint8, _ in drawer.batches(refiner, prompt, seed=seed, batch_size=batch_size):
        yield image_uint8, label[start : start + len(image_uint8)]
        start += len(image_uint8)


def _listed(names: Sequence[str]) -> str:
    """A few names of classes, and how many more there are."""
    shown, more = ", ".join(names[:SHOWN_NAMES]), len(names) - SHOWN_NAMES
    return shown if more <= 0 else f"{shown} and {more} more"


def _train_images(config: build.Config) -> _Images:
    """Training images, at most `MAX_TRAIN_IMAGES`, spread evenly over the split."""
    source = build.source(config, "train")
    count = min(len(source), MAX_TRAIN_IMAGES)
    rows = np.arange(count) * len(source) // count
    return _Images(source, rows, config.data.num_threads)


def _classifier(
    config: build.Config, path: epath.Path, train: _Images
) -> classifier_lib.Classifier:
    """The classifier of a run, trained the first time."""
    if processes.is_first() and not path.exists():
        _train_classifier(config, path, train)
    processes.together()
    classifier = classifier_lib.load(path)
    if classifier.num_classes != config.data.num_classes:
        raise ValueError(
            f"{path} knows {classifier.num_classes} classes, the run has "
            f"{config.data.num_classes}: remove it, to train another"
        )
    return dataclasses.replace(classifier, trained_on=f"the {config.data.name} train split")


def _train_classifier(config: build.Config, path: epath.Path, train: _Images) -> None:
    atomic.check(path)
    starts = range(0, len(train), features.BATCH_SIZE)
    batches = (train[start : start + features.BATCH_SIZE] for start in starts)
    image = np.concatenate([images.shrink(batch, features.SMALL) for batch in batches])
    made = classifier_lib.train_classifier(
        image, train.label, num_classes=config.data.num_classes, seed=config.seed
    )
    made.save(path)
