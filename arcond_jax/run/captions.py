"""Captions on disk, and the prompts that a model is asked by."""

import dataclasses

import numpy as np
from etils import epath
from jaxtyping import Bool, Float32, Int

from arcond_jax import build, types
from arcond_jax.evaluation import npz


@dataclasses.dataclass(frozen=True)
class Captions:
    """Encoded captions; `valid` is False at their padding, which comes first."""

    embedding: Float32[np.ndarray, "n prefix caption_width"]
    valid: Bool[np.ndarray, "n prefix"]


def prompt_of(label: Int[np.ndarray, " b"], captions: Captions | None) -> types.Prompt:
    """The prompts of labels: classes, or with captions the captions of these numbers."""
    if captions is None:
        return np.asarray(label, np.int32)
    return types.Caption(
        embedding=captions.embedding[label],
        valid=captions.valid[label],
        given=np.ones(len(label), bool),
    )


def of_training(config: build.Config) -> Captions | None:
    """The captions that a config trains with, one for each class; None for models of classes.

    Raises:
      build.ConfigError: None are named, or they are not those of the model or of the classes.
    """
    if build.family_of(config).prompts == "classes":
        return None
    if config.data.captions is None:
        raise build.ConfigError(
            "data.captions is not set: give the file that `arcond captions` made, with a caption "
            "for each class in the order of their folders"
        )
    captions = read(epath.Path(config.data.captions).expanduser(), config)
    if len(captions.valid) != config.data.num_classes:
        raise build.ConfigError(
            f"{config.data.captions} has {len(captions.valid)} captions, data.num_classes is "
            f"{config.data.num_classes}: give one for each class"
        )
    return captions


def read(path: epath.PathLike, config: build.Config) -> Captions:
    """Reads what `arcond captions` wrote.

    Raises:
      build.ConfigError: They are not captions of the model.
      FileNotFoundError, ValueError: No such file, or damaged.
    """
    arrays = npz.read(path, "embedding", "valid", what="file of captions")
    embedding, valid = arrays["embedding"], arrays["valid"]
    size = (config.model.num_caption_vectors, config.model.caption_width)
    if embedding.ndim != 3 or embedding.shape[1:] != size or len(embedding) == 0:
        raise build.ConfigError(
            f"{path}: embedding is {list(embedding.shape)}, the model needs [n, {size[0]}, "
            f"{size[1]}] of at least one caption"
        )
    if valid.shape != embedding.shape[:2] or valid.dtype != np.bool_:
        raise build.ConfigError(
            f"{path}: valid is {valid.dtype} {list(valid.shape)}, the captions need bool "
            f"{list(embedding.shape[:2])}"
        )
    if not np.issubdtype(embedding.dtype, np.floating) or not np.isfinite(embedding).all():
        raise build.ConfigError(f"{path}: embedding holds something else than finite floats")
    if not (valid[:, -1].all() and (valid[:, 1:] >= valid[:, :-1]).all()):
        raise build.ConfigError(
            f"{path}: valid must be False at the padding in front of a caption and True from there "
            "to the end"
        )
    return Captions(embedding.astype(np.float32), valid)
