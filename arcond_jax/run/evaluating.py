"""How the samples of a run are made, and what they are compared with."""

import dataclasses

import numpy as np
from etils import epath

from arcond_jax import build
from arcond_jax.data import pipeline
from arcond_jax.evaluation import card
from arcond_jax.evaluation import classifier as classifier_lib
from arcond_jax.run.restoring import Trained

# Settings of the sampler that change no image.
OF_SPEED = ("num_buckets",)


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
    if "tensorar" in config and config.tensorar.window == 1:
        del sampling["drafts"]
    refinement = config.transport.to_dict()
    return card.Settings(
        sampling=sampling,
        refinement={} if config.transport.kind == "none" else refinement,
        seed=seed,
        checkpoint_step=trained.step,
    )


def reference(config: build.Config, workdir: epath.PathLike) -> card.Reference:
    """Real images to compare with, and a classifier of them that is kept with the run."""
    workdir = epath.Path(workdir)
    train_split, held_out = (build.source(config, split) for split in ("train", "held_out"))
    path = workdir / "classifier.npz"
    image, label = _all_of(train_split)
    if path.exists():
        classifier = classifier_lib.load(path)
    else:
        classifier = classifier_lib.train_classifier(
            image, label, num_classes=config.data.num_classes, seed=config.seed
        )
        classifier.save(path)
    held_out_image, held_out_label = _all_of(held_out)
    return card.reference(
        held_out_image,
        held_out_label,
        image_train=image,
        extractor=dataclasses.replace(classifier, trained_on=f"the {config.data.name} train split"),
        name=f"{config.data.name}, held out",
    )


def _all_of(split: pipeline.Source) -> tuple[np.ndarray, np.ndarray]:
    batch = next(pipeline.full_batches(split, len(split)))
    return batch["image"], batch["label"]
