"""How the samples of a run are made, and what they are compared with."""

import pathlib

import numpy as np

from arcond_jax import build
from arcond_jax.data import pipeline
from arcond_jax.evaluation import card
from arcond_jax.evaluation import classifier as classifier_lib
from arcond_jax.run.restoring import Trained

# Of the section `sampling`: what a card says only where it is set.
OTHER_SETTINGS = (
    "top_k",
    "top_p",
    "min_p",
    "guided_positions",
    "later_guidance_scale",
    "later_code_temperature",
    "clip_latents",
    "warm_start",
)


def provenance(trained: Trained, config: build.Config, *, seed: int) -> card.Settings:
    """How samples are made, for their file and their evaluation card."""
    sampling, kind = config.sampling, config.transport.kind
    has_codes, has_latents = config.loss.w_tensor > 0, config.loss.w_diffusion > 0
    names = OTHER_SETTINGS
    names += ("guidance_power",) if sampling.guidance_schedule == "power_cosine" else ()
    names += ("spacing",) if has_latents else ()
    names += ("drafts", "stride") if has_codes and config.tensorar.window > 1 else ()
    return card.Settings(
        other_settings={name: sampling[name] for name in names if sampling[name] is not None},
        guidance_scale=sampling.guidance_scale,
        guidance_schedule=sampling.guidance_schedule,
        code_temperature=sampling.code_temperature if has_codes else None,
        latent_temperature=sampling.latent_temperature if has_latents else None,
        num_ar_steps=sampling.num_ar_steps if config.backbone == "mar" else None,
        solver=sampling.solver if has_latents else None,
        num_head_evaluations=sampling.num_head_evaluations if has_latents else 0,
        refinement=None if kind == "none" else kind,
        refinement_settings={} if kind == "none" else config.transport.to_dict(),
        seed=seed,
        checkpoint_step=trained.step,
    )


def reference(config: build.Config, workdir: pathlib.Path) -> card.Reference:
    """Real images to compare with, and a classifier of them that is kept with the run."""
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
        classifier=classifier,
        name=f"{config.data.name}, held out",
        feature_extractor=f"a small classifier trained on the {config.data.name} train split",
    )


def _all_of(split: pipeline.Source) -> tuple[np.ndarray, np.ndarray]:
    batch = next(pipeline.full_batches(split, len(split)))
    return batch["image"], batch["label"]
