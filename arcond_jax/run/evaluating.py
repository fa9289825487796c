"""How the samples of a run are made, and what they are compared with."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Float32, Int

from arcond_jax import atomic, build
from arcond_jax.build import family
from arcond_jax.data import images, pipeline
from arcond_jax.evaluation import card, features, samples
from arcond_jax.evaluation import classifier as classifier_lib
from arcond_jax.parallel import processes
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
        self.label = split.label[rows]

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
    train_split, held_out = (build.source(config, split) for split in ("train", "held_out"))
    count = min(len(train_split), MAX_TRAIN_IMAGES)
    threads, resize = config.data.num_threads, config.data.get("resize", "adm")
    train = _Images(train_split, np.arange(count) * len(train_split) // count, threads)
    return card.reference(
        _Images(held_out, np.arange(len(held_out)), threads),
        held_out.label,
        image_train=train,
        extractor=_classifier(config, epath.Path(workdir) / "classifier.npz", train),
        name=f"{config.data.name}, held out: {_listed(train_split.label_names)}",
        made_by={} if resize == "adm" else {"resize": f"{resize}, not the crop of ADM"},
    )


def _listed(names: Sequence[str]) -> str:
    """A few names of classes, and how many more there are."""
    shown, more = ", ".join(names[:SHOWN_NAMES]), len(names) - SHOWN_NAMES
    return shown if more <= 0 else f"{shown} and {more} more"


def _classifier(
    config: build.Config, path: epath.Path, train: _Images
) -> classifier_lib.Classifier:
    """The classifier of a run, trained the first time."""
    if path.exists():
        classifier = classifier_lib.load(path)
        if classifier.num_classes != config.data.num_classes:
            raise ValueError(
                f"{path} knows {classifier.num_classes} classes, the run has "
                f"{config.data.num_classes}: remove it, to train another"
            )
    else:
        atomic.check(path)
        starts = range(0, len(train), features.BATCH_SIZE)
        batches = (train[start : start + features.BATCH_SIZE] for start in starts)
        image = np.concatenate([images.shrink(batch, features.SMALL) for batch in batches])
        classifier = classifier_lib.train_classifier(
            image, train.label, num_classes=config.data.num_classes, seed=config.seed
        )
        if processes.is_first():
            classifier.save(path)
    return dataclasses.replace(classifier, trained_on=f"the {config.data.name} train split")
