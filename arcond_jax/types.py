"""Axis letters, the records that travel between the parts, and the contracts they keep.

Axis letters, the same in every signature and einsum:
  b batch, l length (positions of the token grid), d width, h heads, k head dim, f MLP width,
  v codebook, c latent channels, w tensor window, n m points, s slots, g groups;
  image axes are spelled height, width, channels.

A batch goes: image --tokenizer--> Tokens --generator--> loss, and back: label --sampler--> Tokens
--tokenizer--> image. Images are float32 in [-1, 1], NHWC; `image_uint8` only at both ends.
"""

from typing import Any, Protocol, no_type_check, runtime_checkable

import flax.struct
from jaxtyping import Array, Float, Int, Key

Params = Any  # a plain tree of arrays
Metrics = dict[str, Array]  # scalars, averaged over the steps between two log lines
RefinerState = Any  # what a refiner carries from one slot to the next


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Batch:
    """What the data pipeline yields; `label` is a class id, `num_classes` means no class."""

    image: Float[Array, "b height width channels"]
    label: Int[Array, " b"]


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Tokens:
    """One token grid in raster order: continuous latents, discrete codes, or both on one grid."""

    latents: Float[Array, "b l c"] | None = None
    codes: Int[Array, "b l"] | None = None


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class CodeLaw:
    """The Gaussian of the latents behind each code, in the tokenizer's latent units."""

    mean: Float[Array, "v c"]
    cholesky: Float[Array, "v c c"]


@runtime_checkable  # annotations are checked at run time in the tests
class Tokenizer(Protocol):
    """Maps images to token grids and back.

    `rng` is for tokenizers whose latents have a law given the image: without it they give its mode.
    `code_law` is None unless the tokenizer has codes and latents on one grid.
    """

    @property
    def code_law(self) -> CodeLaw | None: ...

    def encode(
        self, image: Float[Array, "b height width channels"], rng: Key[Array, ""] | None = None
    ) -> Tokens: ...

    def decode(self, tokens: Tokens) -> Float[Array, "b height width channels"]: ...


@runtime_checkable  # annotations are checked at run time in the tests
class Generator(Protocol):
    """A trainable model of token grids given a class.

    `step` is the number of updates tried so far, for what changes over training.
    """

    def init(self, rng: Key[Array, ""]) -> Params: ...

    def loss(
        self,
        params: Params,
        tokens: Tokens,
        label: Int[Array, " b"],
        rng: Key[Array, ""],
        *,
        step: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, ""], Metrics]: ...


@runtime_checkable  # annotations are checked at run time in the tests
class Refiner(Protocol):
    """Moves the conditions of one slot towards their ideal law before any head sees them.

    `init` gives what is carried from slot to slot (nothing for most refiners). Rows with the null
    class are never refined: under guidance only the conditional stream comes here.
    """

    def init(self, label: Int[Array, " b"]) -> RefinerState: ...

    def __call__(
        self,
        cond: Float[Array, "b d"],
        state: RefinerState,
        *,
        slot: Int[Array, ""],
        label: Int[Array, " b"],
    ) -> tuple[Float[Array, "b d"], RefinerState]: ...
