"""What the tokenizers made of a trained network share; `Coded` serves all with a codebook."""

from typing import Any, Protocol, no_type_check, runtime_checkable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from arcond_jax import types
from arcond_jax.nn import conv

IMAGE_CHANNELS = 3


@runtime_checkable  # annotations are checked at run time in the tests
class CodeNetwork(Protocol):
    """A Linen module with methods `to_codes` and `from_codes` between images and code grids."""

    @property
    def design(self) -> conv.Design: ...

    @property
    def num_codes(self) -> int: ...


@no_type_check  # as a tree it also holds shapes or shardings where the arrays are
@flax.struct.dataclass
class Coded:
    """A tokenizer whose tokens are codes, a pytree that is saved with the weights."""

    params: types.Params
    network: CodeNetwork = flax.struct.field(pytree_node=False)
    image_size: tuple[int, int] = flax.struct.field(pytree_node=False)  # height, width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return grid(self.image_size, self.network.design.stride)

    @property
    def code_law(self) -> None:
        """Nothing is known of what an image may be, given its codes."""
        return None

    def encode(
        self, image: Float[Array, "b height width channels"], rng: Key[Array, ""] | None = None
    ) -> types.Tokens:
        """Codes of the image; there is nothing to draw, so `rng` changes nothing."""
        return self.tokens(self.store(image), rng)

    def store(self, image: Float[Array, "b height width channels"]) -> types.Stored:
        """The codes."""
        check_image(image, self.image_size)
        codes = apply(self.network, self.params, image, method="to_codes")
        return types.Stored(codes=codes.reshape(len(image), -1))

    def tokens(self, stored: types.Stored, rng: Key[Array, ""] | None = None) -> types.Tokens:
        """The codes as they are."""
        del rng
        if stored.codes is None:
            raise ValueError("No codes are stored: store images with this tokenizer first.")
        return types.Tokens(codes=jnp.asarray(stored.codes, jnp.int32))

    def decode(self, tokens: types.Tokens) -> Float[Array, "b height width channels"]:
        """The image of the codes; latents, if any, are not looked at."""
        if tokens.codes is None:
            raise ValueError("Tokens hold no codes: encode images with this tokenizer first.")
        codes = tokens.codes.reshape(-1, *self.grid)
        return apply(self.network, self.params, codes, method="from_codes")


def abstract(network: CodeNetwork, *, image_size: tuple[int, int]) -> Coded:
    """The shapes of a tokenizer, without data: what a checkpoint is restored into."""
    grid(image_size, network.design.stride)  # raises where the sizes do not divide
    return Coded(abstract_params(network, image_size), network, image_size)


def apply(network: Any, params: types.Params, x: Array, *, method: str) -> Array:
    """What a method of a Linen module gives for `x`."""
    return network.apply({"params": params}, x, method=method)


def abstract_params(network: Any, image_size: tuple[int, int]) -> types.Params:
    """Shapes of a network's parameters."""
    image = jax.ShapeDtypeStruct((1, *image_size, IMAGE_CHANNELS), jnp.float32)
    return nn.unbox(jax.eval_shape(network.init, jax.random.key(0), image))["params"]


def grid(image_size: tuple[int, int], edge: int) -> tuple[int, int]:
    """Rows and columns of tokens whose squares have an edge of that many pixels.

    Raises:
      ValueError: For sizes that do not divide.
    """
    height, width = image_size
    if height % edge or width % edge:
        raise ValueError(
            f"A token covers {edge}x{edge} pixels, which does not divide images of"
            f" {height}x{width}: resize or crop them."
        )
    return height // edge, width // edge


def check_image(
    image: Float[Array, "b height width channels"], image_size: tuple[int, int]
) -> None:
    """Raises ValueError for images of another shape."""
    expected = (*image_size, IMAGE_CHANNELS)
    if image.shape[1:] != expected:
        raise ValueError(
            f"This tokenizer was made for images of shape {expected}, got {image.shape[1:]}:"
            " resize them, or make it for this size."
        )
