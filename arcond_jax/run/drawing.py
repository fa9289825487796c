"""Images from a trained model: by class, by caption, or around given tokens."""

import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from arcond_jax import build, types
from arcond_jax.parallel import compiled, memory, processes, stalling
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.run.restoring import Trained
from arcond_jax.sampling import mar as mar_sampling
from arcond_jax.sampling import sampled as sampled_lib
from arcond_jax.transport import refiners

DRAWN = 1000  # rows of a batch, where memory allows them
DECODED = 64  # at a time, where memory allows them; more are no faster
FAR, MUCH = 1.5, 0.2  # pixels beyond this are no picture's; a share of them that tells


class NotFiniteError(ValueError):
    """Images that are not finite numbers; the message is one line."""


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

        Raises:
          build.ConfigError: Sampling starts from Gaussians that the tokenizer does not know.
        """
        self.trained = trained
        self._config = config or trained.config
        build.check_law(self._config, trained.tokenizer)
        self._loop = build.sampler(self._config, trace=trace, num_known=num_known)
        self._sample = compiled.Compiled(self._tokens, trained.mesh)
        self._decode = compiled.Compiled(_pixels, trained.mesh)

    def __call__(
        self,
        refiner: types.Refiner,
        prompt: types.Prompt,
        *,
        seed: int,
        first_row: int = 0,
        known: mar_sampling.Known | None = None,
    ) -> tuple[UInt8[np.ndarray, "n height width channels"], sampled_lib.Sampled]:
        """Draws one image per prompt, in one batch, and what the loop left.

        Arguments and errors are those of `sample`.
        """
        drawn = self.sample(refiner, prompt, seed=seed, first_row=first_row, known=known)
        image_uint8 = self.decode(drawn.tokens)
        stalling.ended()
        return image_uint8, drawn

    def sample(
        self,
        refiner: types.Refiner,
        prompt: types.Prompt,
        *,
        seed: int,
        first_row: int = 0,
        known: mar_sampling.Known | None = None,
    ) -> sampled_lib.Sampled:
        """Draws the tokens of one image per prompt, in one batch.

        Row i depends on (seed, first_row + i, its prompt) alone, unless the refiner mixes rows.

        Args:
          known: One row of tokens to keep, the same for all images.

        Raises:
          build.ConfigError: A label is not a class.
        """
        check_seed(seed)
        if not isinstance(prompt, types.Caption):
            check_labels(np.asarray(prompt), self.trained.config.data.num_classes)
        return self._sample(*self._arguments(refiner, prompt, seed, first_row, known))

    def decode(self, tokens: types.Tokens) -> UInt8[np.ndarray, "n height width channels"]:
        """The images of tokens, as many at a time as memory allows; they leave the device as uint8.

        Raises:
          NotFiniteError: Of some image a pixel is not a finite number.
        """
        mesh, tokens = self.trained.mesh, processes.fetch(tokens)
        num_rows = len(jax.tree.leaves(tokens)[0])

        def piece(start: int, size: int) -> tuple[types.Tokenizer, types.Tokens]:
            part = rows(tokens, start, size)
            return self.trained.tokenizer, processes.put(part, mesh_lib.batch_sharding(mesh))

        size = memory.batch_size(
            lambda size: self._decode.lower(*piece(0, size)), num_rows, at_most=DECODED, mesh=mesh
        )
        decoded = [self._decode(*piece(start, size)) for start in range(0, num_rows, size)]
        pieces = processes.fetch(decoded)
        image_uint8, finite, far = (
            np.concatenate(parts)[:num_rows] for parts in zip(*pieces, strict=True)
        )
        if not finite.all():
            raise NotFiniteError(
                f"{np.sum(~finite)} of {num_rows} images are not finite: look at the weights and "
                "at the sampling section"
            )
        if far.mean() > MUCH:
            logging.warning(
                "%.0f %% of the pixels are far beyond black or white, so these are no pictures: "
                "the model is untrained, or sampling runs away; try sampling.clip_latents=3, or "
                "less guidance",
                100 * far.mean(),
            )
        return image_uint8

    def images(
        self,
        refiner: types.Refiner,
        prompt: types.Prompt,
        *,
        seed: int,
        batch_size: int | None = None,
        known: mar_sampling.Known | None = None,
    ) -> UInt8[np.ndarray, "n height width channels"]:
        """The images alone; arguments as of `batches`."""
        drawn = self.batches(refiner, prompt, seed=seed, batch_size=batch_size, known=known)
        return np.concatenate([image_uint8 for image_uint8, _ in drawn])

    def batches(
        self,
        refiner: types.Refiner,
        prompt: types.Prompt,
        *,
        seed: int,
        batch_size: int | None = None,
        known: mar_sampling.Known | None = None,
        first_row: int = 0,
    ) -> Iterator[tuple[UInt8[np.ndarray, "size height width channels"], sampled_lib.Sampled]]:
        """Images drawn in batches of one size, each with what the loop left.

        The last batch is filled up for the loop; the images it is filled up with are left out.

        Args:
          batch_size: None for at most 1000, and fewer where they would take more than half of a
            device's memory; a refiner that mixes rows then gets all of them.
          first_row: The images before it are left out.
        """
        num_rows = types.num_rows(prompt)
        if first_row >= num_rows:
            return
        if batch_size is None:
            batch_size = self._batch_size(refiner, prompt, known)
        for start in range(first_row, num_rows, batch_size):
            part = rows(prompt, start, batch_size)  # of one size, so that the loop compiles once
            image_uint8, drawn = self(refiner, part, seed=seed, first_row=start, known=known)
            yield image_uint8[: num_rows - start], drawn

    @property
    def program(self) -> compiled.Compiled:
        """The loop, `(params, tokenizer, refiner, rng, prompt, first_row, known) -> Sampled`."""
        return self._sample

    def image(
        self,
        params: types.Params,
        tokenizer: types.Tokenizer,
        refiner: types.Refiner,
        rng: Key[Array, ""],
        prompt: types.Prompt,
        first_row: Int[Array, ""],
    ) -> UInt8[Array, "n height width channels"]:
        """Prompts to images as one function of all it reads, not compiled."""
        drawn = self._tokens(params, tokenizer, refiner, rng, prompt, first_row, None)
        return to_uint8(tokenizer.decode(drawn.tokens))

    def traced(self, prompt: types.Prompt) -> jax.stages.Traced:
        """The loop for these prompts, without refinement, as JAX writes it; nothing is compiled."""
        return self._sample.trace(*self._arguments(refiners.Identity(), prompt, 0, 0, None))

    def _batch_size(
        self, refiner: types.Refiner, prompt: types.Prompt, known: mar_sampling.Known | None
    ) -> int:
        num_rows = types.num_rows(prompt)
        if isinstance(refiner, refiners.InBatch):
            return num_rows

        def lower(size: int) -> jax.stages.Lowered:
            arguments = self._arguments(refiner, rows(prompt, 0, size), 0, 0, known)
            return self._sample.lower(*arguments)

        return memory.batch_size(lower, num_rows, at_most=DRAWN, mesh=self.trained.mesh)

    def _arguments(
        self,
        refiner: types.Refiner,
        prompt: types.Prompt,
        seed: int,
        first_row: int,
        known: mar_sampling.Known | None,
    ) -> tuple[Any, ...]:
        """Of the compiled loop; a batch that cannot be cut evenly lies whole on every device."""
        mesh, trained, num_rows = self.trained.mesh, self.trained, types.num_rows(prompt)
        even = num_rows == mesh_lib.spread_over(mesh, num_rows)
        place = mesh_lib.batch_sharding(mesh) if even else mesh_lib.replicated(mesh)
        prompt, rng = processes.put(prompt, place), jax.random.key(seed)
        return trained.params, trained.tokenizer, refiner, rng, prompt, first_row, known

    def _tokens(self, params, tokenizer, refiner, rng, prompt, first_row, known):
        given: dict[str, Any] = {}
        if known is not None:
            num_rows = types.num_rows(prompt)
            given["known"] = jax.tree.map(lambda x: jnp.repeat(x, num_rows, axis=0), known)
        codebook = build.noise_codebook(self._config, tokenizer)
        if codebook is not None:
            given["codebook"] = codebook
        return self._loop(
            params,
            rng,
            prompt,
            refiner=refiner,
            code_law=tokenizer.code_law,
            first_row=first_row,
            **given,
        )


def to_uint8(
    image: Float[Array, "n height width channels"],
) -> UInt8[Array, "n height width channels"]:
    """What `data.images.image_to_uint8` gives, on the device: a fourth of the bytes leave it."""
    levels = jnp.round((image.astype(jnp.float32) + 1.0) * 127.5)
    return jnp.clip(levels, 0, 255).astype(jnp.uint8)


def _pixels(
    tokenizer: types.Tokenizer, tokens: types.Tokens
) -> tuple[UInt8[Array, "n height width channels"], Bool[Array, " n"], Float[Array, " n"]]:
    """Images, which of them are finite, and of each the share of pixels that are `FAR`."""
    image, axes = tokenizer.decode(tokens), (1, 2, 3)
    far = jnp.mean(jnp.abs(image) > FAR, axis=axes)
    return to_uint8(image), jnp.isfinite(image).all(axis=axes), far


def rows(tree: Any, start: int, size: int) -> Any:
    """Rows from `start` on; behind the last, the last again."""
    return jax.tree.map(lambda x: x[np.minimum(np.arange(start, start + size), len(x) - 1)], tree)


def check_seed(seed: int) -> None:
    """Raises ConfigError for a seed of which a key would keep only a part."""
    if not 0 <= seed < 2**32:
        raise build.ConfigError(f"seed {seed} must be from 0 to {2**32 - 1}")


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
