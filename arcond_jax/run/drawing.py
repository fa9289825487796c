"""Images from a trained model: by class, by caption, or around given tokens."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt8

from arcond_jax import build, sharding, types
from arcond_jax.data import images
from arcond_jax.evaluation import npz
from arcond_jax.models import captioned
from arcond_jax.run.restoring import Trained
from arcond_jax.sampling import mar as mar_sampling
from arcond_jax.sampling import sampled as sampled_lib


class Drawer:
    """Compiled sampling: class labels in, images out, the batch spread over the mesh."""

    def __init__(
        self,
        trained: Trained,
        config: build.Config | None = None,
        *,
        trace: bool = False,
        num_known: int = 0,
    ) -> None:
        """Compiles lazily, once per number of labels and kind of refiner.

        `trained` may be replaced by a later state of the same run; what is compiled stays.

        Args:
          config: Another sampling section than the run's own; None for its own.
          trace: Keep conditions before and after refinement.
          num_known: Tokens that are given in every call.
        """
        self.trained = trained
        self._loop = build.sampler(config or trained.config, trace=trace, num_known=num_known)
        self._run = sharding.on_mesh(self._draw, trained.mesh)

    def __call__(
        self,
        refiner: types.Refiner,
        label: Int[np.ndarray, " n"],
        *,
        seed: int,
        first_row: int = 0,
        known: mar_sampling.Known | None = None,
    ) -> tuple[jax.Array, sampled_lib.Sampled]:
        """Draws one image in [-1, 1] per label, and what the loop left.

        Image i depends on (seed, first_row + i, its label) alone, unless the refiner mixes rows.

        Args:
          known: One row of tokens to keep, the same for all images.

        Raises:
          build.ConfigError: A label is not a class.
        """
        check_labels(label, self.trained.config.data.num_classes)
        mesh = self.trained.mesh
        spread = len(label) % sharding.num_batch_shards(mesh) == 0
        place = sharding.batch_sharding(mesh) if spread else sharding.replicated(mesh)
        return self._run(
            self.trained.params,
            self.trained.tokenizer,
            refiner,
            jax.random.key(seed),
            jax.device_put(np.asarray(label, np.int32), place),
            first_row,
            known,
        )

    def images(
        self,
        refiner: types.Refiner,
        label: Int[np.ndarray, " n"],
        *,
        seed: int,
        batch_size: int | None = None,
        known: mar_sampling.Known | None = None,
    ) -> UInt8[np.ndarray, "n height width channels"]:
        """The images alone, as uint8 on the host, drawn in batches of one size."""
        batch_size = batch_size or len(label)
        drawn = []
        for start in range(0, len(label), batch_size):
            part = label[start : start + batch_size]
            # The last batch is filled up, so that the loop compiles once.
            padded = np.pad(part, (0, batch_size - len(part)), mode="edge")
            image, _ = self(refiner, padded, seed=seed, first_row=start, known=known)
            drawn.append(images.image_to_uint8(np.asarray(image)[: len(part)]))
        return np.concatenate(drawn)

    def _draw(self, params, tokenizer, refiner, rng, label, first_row, known):
        given: dict[str, Any] = {}
        if known is not None:
            given["known"] = jax.tree.map(lambda x: jnp.repeat(x, len(label), axis=0), known)
        sampled = self._loop(
            params,
            rng,
            label,
            refiner=refiner,
            code_law=tokenizer.code_law,
            first_row=first_row,
            **given,
        )
        return tokenizer.decode(sampled.tokens), sampled


def check_labels(label: Int[np.ndarray, " n"], count: int) -> None:
    """Raises ConfigError unless all labels are classes."""
    wrong = [int(x) for x in np.asarray(label) if not 0 <= x < count]
    if wrong:
        raise build.ConfigError(f"label {wrong[0]} is not a class: use 0 to {count - 1}")


def known_tokens(
    trained: Trained,
    image: Float[np.ndarray, "height width channels"],
    keep: Bool[np.ndarray, "mask_height mask_width"],
) -> mar_sampling.Known:
    """The tokens of an image that stay: those all of whose pixels are kept.

    Raises:
      build.ConfigError: Image or mask are not of the model's size, or nothing is left to draw.
    """
    config = trained.config
    wanted = build.image_shape(config)
    for name, shape in (("image", image.shape), ("mask", keep.shape)):
        if shape != wanted[: len(shape)]:
            found, size = ("x".join(map(str, x)) for x in (shape, wanted))
            raise build.ConfigError(
                f"the {name} is {found}, the model draws images of {size}: scale or crop it to that"
            )
    rows, columns = build.grid(config)
    squares = keep.reshape(rows, keep.shape[0] // rows, columns, keep.shape[1] // columns)
    given = squares.all(axis=(1, 3)).reshape(1, -1)
    if given.all():
        raise build.ConfigError("the mask keeps every token: make some of it white, to be drawn")
    latents = trained.tokenizer.encode(jnp.asarray(image)[None]).latents
    if latents is None:
        raise build.ConfigError(f"tokenizer {config.tokenizer.name} gives no latents to keep")
    return mar_sampling.Known(latents=latents, given=jnp.asarray(given))


@dataclasses.dataclass(frozen=True)
class Captions:
    """Encoded captions; `valid` is False at their padding, which comes first."""

    embedding: Float32[np.ndarray, "n prefix caption_width"]
    valid: Bool[np.ndarray, "n prefix"]


def read_captions(path: pathlib.Path, config: build.Config) -> Captions:
    """Reads what `arcond captions` wrote.

    Raises:
      build.ConfigError: They are not captions of the model.
      FileNotFoundError, ValueError: No such file, or damaged.
    """
    arrays = npz.read(path, what="file of captions")
    missing = {"embedding", "valid"} - arrays.keys()
    if missing:
        raise build.ConfigError(f"{path} is no file of captions: it lacks {', '.join(missing)}")
    embedding, valid = arrays["embedding"], arrays["valid"]
    size = (config.captioned.num_prefix, config.captioned.caption_width)
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


def with_captions(trained: Trained, captions: Captions) -> Trained:
    """The model with captions for its classes."""
    config = trained.config.copy_and_resolve_references()
    config.data.num_classes = len(captions.valid)
    placed = jax.device_put((captions.embedding, captions.valid), sharding.replicated(trained.mesh))
    params = captioned.with_captions(trained.params, *placed)
    return dataclasses.replace(trained, config=config, params=params)
