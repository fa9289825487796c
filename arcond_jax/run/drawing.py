"""Images from a trained model: by class, by caption, or around given tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from arcond_jax import build, types
from arcond_jax.data import images
from arcond_jax.parallel import compiled
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.run.restoring import Trained
from arcond_jax.sampling import mar as mar_sampling
from arcond_jax.sampling import sampled as sampled_lib


class Drawer:
    """Compiled sampling: prompts in, images out, the batch spread over the mesh."""

    def __init__(
        self,
        trained: Trained,
        config: build.Config | None = None,
        *,
        trace: bool = False,
        num_known: int = 0,
    ) -> None:
        """Compiles lazily, once per number of prompts and kind of refiner.

        `trained` may be replaced by a later state of the same run; what is compiled stays.

        Args:
          config: Another sampling section than the run's own; None for its own.
          trace: Keep conditions before and after refinement.
          num_known: Tokens that are given in every call.
        """
        self.trained = trained
        self._loop = build.sampler(config or trained.config, trace=trace, num_known=num_known)
        self._run = compiled.Compiled(self._draw, trained.mesh)

    def __call__(
        self,
        refiner: types.Refiner,
        prompt: types.Prompt,
        *,
        seed: int,
        first_row: int = 0,
        known: mar_sampling.Known | None = None,
    ) -> tuple[jax.Array, sampled_lib.Sampled]:
        """Draws one image in [-1, 1] per prompt, and what the loop left.

        Image i depends on (seed, first_row + i, its prompt) alone, unless the refiner mixes rows.

        Args:
          known: One row of tokens to keep, the same for all images.

        Raises:
          build.ConfigError: A label is not a class.
        """
        if not isinstance(prompt, types.Caption):
            check_labels(np.asarray(prompt), self.trained.config.data.num_classes)
        mesh = self.trained.mesh
        spread = types.num_rows(prompt) % mesh_lib.num_batch_shards(mesh) == 0
        place = mesh_lib.batch_sharding(mesh) if spread else mesh_lib.replicated(mesh)
        return self._run(
            self.trained.params,
            self.trained.tokenizer,
            refiner,
            jax.random.key(seed),
            jax.device_put(prompt, place),
            first_row,
            known,
        )

    def images(
        self,
        refiner: types.Refiner,
        prompt: types.Prompt,
        *,
        seed: int,
        batch_size: int | None = None,
        known: mar_sampling.Known | None = None,
    ) -> UInt8[np.ndarray, "n height width channels"]:
        """The images alone, as uint8 on the host, drawn in batches of one size."""
        num_rows = types.num_rows(prompt)
        batch_size = batch_size or num_rows
        drawn = []
        for start in range(0, num_rows, batch_size):
            # The last batch is filled up, so that the loop compiles once.
            rows = np.minimum(np.arange(start, start + batch_size), num_rows - 1)
            part = jax.tree.map(lambda x, rows=rows: x[rows], prompt)
            image, _ = self(refiner, part, seed=seed, first_row=start, known=known)
            drawn.append(images.image_to_uint8(np.asarray(image)[: num_rows - start]))
        return np.concatenate(drawn)

    def _draw(self, params, tokenizer, refiner, rng, prompt, first_row, known):
        given: dict[str, Any] = {}
        if known is not None:
            num_rows = types.num_rows(prompt)
            given["known"] = jax.tree.map(lambda x: jnp.repeat(x, num_rows, axis=0), known)
        sampled = self._loop(
            params,
            rng,
            prompt,
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
