"""Axis letters, a glossary, the records that travel between the parts, and their contracts.

Axis letters, the same in every signature and einsum:
  b batch, l length (positions of the token grid), d width, h heads, k head dim, f MLP width,
  v codebook, c latent channels, w tensor window, n m points, s slots, g groups;
  image axes are spelled height, width, channels.

Words, the field's where it has one:
  position   a place of the token grid; raster order counts them row by row.
  step       one training update; a decoding step of MAR is an `ar_step`.
  latent     the continuous vector of a position.
  code       the discrete id of a position; some tokenizers' are so large that models predict them
             in several factors, one after another.
  tokens     latents, codes, or both on one grid.
  condition  what a backbone tells the heads about a position (`cond`).
  refinement moving a condition towards its ideal distribution before any head sees it.
  slot       one condition of a row in decoding order, as refinement counts them: a position of an
             autoregressive model, a decoding step of MAR.
  group      the rows that share an ideal distribution: a class, or all.
  window     the code of a position and those after it, as TensorAR predicts them together; its
             entries are numbered from 0, the position itself.
  draft      an entry of a window beyond 0: a guess that later windows draw again, or that
             speculative sampling verifies.
  prompt     what an image is asked for by: a class label or a caption.

A batch goes: image --tokenizer--> Tokens --generator--> loss, and back: prompt --sampler--> Tokens
--tokenizer--> image. Images are float32 in [-1, 1], NHWC; uint8 only at both ends.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, no_type_check, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt, UInt8

Params = Any  # a plain tree of arrays
Metrics = dict[str, Array]  # scalars, averaged over the steps between two log lines
RefinerState = Any  # what a refiner carries from one slot to the next
Cache = Any  # what a causal model keeps of the tokens it has seen; nobody else looks into it


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Caption:
    """What a frozen text encoder makes of a text, one in each row.

    Attributes:
      embedding: Vectors of the words, padded in front to a fixed number.
      valid: False at the padding.
      given: False for a row that is to be drawn without its caption. It keeps the padding, which
        the official code of LlamaGen hides from such a row too.
    """

    embedding: Float[Array | np.ndarray, "b prefix caption_width"]
    valid: Bool[Array | np.ndarray, "b prefix"]
    given: Bool[Array | np.ndarray, " b"]


# A class id, `num_classes` meaning none; or a caption.
Prompt = Int[Array | np.ndarray, " b"] | Caption


def group_of(prompt: Prompt) -> Int[Array, " b"]:
    """The class of each row, for what keeps to classes; rows with captions are of one class."""
    if isinstance(prompt, Caption):
        return jnp.zeros(prompt.given.shape, jnp.int32)
    return jnp.asarray(prompt)


def num_rows(prompt: Prompt) -> int:
    """Rows that are asked for."""
    return jax.tree.leaves(prompt)[0].shape[0]


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Stored:
    """What a tokenizer makes of images once and for all, of any precision.

    Attributes:
      moments: Of latents that are a draw: mean and log variance, without the latents' scale.
      latents, codes: The tokens of other tokenizers.
    """

    moments: Float[Array | np.ndarray, "b rows columns moments"] | None = None
    latents: Float[Array | np.ndarray, "b l c"] | None = None
    codes: Int[Array | np.ndarray, "b l"] | UInt[Array | np.ndarray, "b l"] | None = None


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Batch:
    """What the data pipeline yields: images, or what was stored of them.

    Images are in [-1, 1], or in uint8 to be scaled on the device.
    """

    image: (
        Float[Array | np.ndarray, "b height width channels"]
        | UInt8[Array | np.ndarray, "b height width channels"]
        | None
    )
    prompt: Prompt
    stored: Stored | None = None


def batch_of(rows: Mapping[str, np.ndarray], prompt: Prompt) -> Batch:
    """A batch of what the rows hold: "image", or fields of `Stored`."""
    kept = {field.name: rows.get(field.name) for field in dataclasses.fields(Stored)}
    return Batch(rows["image"], prompt) if "image" in rows else Batch(None, prompt, Stored(**kept))


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Tokens:
    """One token grid in raster order: continuous latents, discrete codes, or both on one grid."""

    latents: Float[Array, "b l c"] | None = None
    codes: Int[Array, "b l"] | None = None


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Token:
    """Tokens as a causal model is fed them, n in a row, in the order they are visited.

    Attributes:
      codes: The window at each of them, codes in factors.
      seen: Which entries of the window the model is shown; entry 0 always.
      latents: Of the tokens themselves.
    """

    codes: Int[Array, "b n w factors"] | None = None
    seen: Bool[Array, "b n w"] | None = None
    latents: Float[Array, "b n c"] | None = None


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class CodeLaw:
    """The Gaussian of the latents behind each code, in the tokenizer's latent units."""

    mean: Float[Array, "v c"]
    cholesky: Float[Array, "v c c"]


@runtime_checkable  # annotations are checked at run time in the tests
class Tokenizer(Protocol):
    """Maps images to token grids and back.

    `rng` is for tokenizers whose latents are a draw given the image: without it they give the mode.
    `encode` is `store` and then `tokens`; what lies between may be kept on a disk.
    `code_law` is None unless the tokenizer has codes and latents on one grid.
    """

    @property
    def code_law(self) -> CodeLaw | None: ...

    def encode(
        self, image: Float[Array, "b height width channels"], rng: Key[Array, ""] | None = None
    ) -> Tokens: ...

    def store(self, image: Float[Array, "b height width channels"]) -> Stored: ...

    def tokens(self, stored: Stored, rng: Key[Array, ""] | None = None) -> Tokens: ...

    def decode(self, tokens: Tokens) -> Float[Array, "b height width channels"]: ...


@runtime_checkable  # annotations are checked at run time in the tests
class CausalModel(Protocol):
    """A Linen module that visits positions one after another, each told what came before it.

    What sampling and training need of such a model, whatever its order, codes or prompts. Methods
    from `prefix` on read parameters, so they are called by `apply`. A model with latents also has
    `latent_cond` and `denoise`, as `models.joint.Joint`; one that guesses codes ahead has
    `num_drafts` and `draft_rows`, as `models.tensorar.Windowed`.

    Attributes:
      length: Positions.
      window: Codes predicted at each of them; 1 is plain autoregression.
      factor_sizes: Values of each factor of a code, in the order they are drawn; none in a model of
        latents alone.
      channels: Numbers in a latent; None in a model of codes alone.
      unrolled: Whether its blocks are a Python loop rather than a scan.
    """

    @property
    def length(self) -> int: ...

    @property
    def window(self) -> int: ...

    @property
    def factor_sizes(self) -> tuple[int, ...]: ...

    @property
    def channels(self) -> int | None: ...

    @property
    def unrolled(self) -> bool: ...

    def no_prompt(self, num_rows: int) -> Prompt:
        """Rows that ask for nothing."""
        ...

    def null(self, prompt: Prompt) -> Prompt:
        """The prompts of the unconditional rows beside these."""
        ...

    def empty_cache(self, prompt: Prompt, spare: int = 0) -> Cache:
        """What holds the prompt, all positions, and `spare` places more.

        Speculative sampling feeds guesses beyond the end, and takes guesses back: it needs an
        `nn.attention.Cache`, whose index may then be another one in each row. A model with another
        cache is sampled without it and may ignore `spare`.
        """
        ...

    def prefix(
        self, prompt: Prompt, at: Int[Array, "*b 1"]
    ) -> tuple[Float[Array, "b p d"], Int[Array, "*b p"]]:
        """What is fed before the tokens, and which position each condition is about.

        `at` is the position visited first, which the last condition of the prefix is about; -1
        marks conditions about none.
        """
        ...

    def embed(self, token: Token, at: Int[Array, "*b n_plus_w"]) -> Float[Array, "b n d"]:
        """Tokens as they are fed; `at` holds their positions and those of the window after them.

        The next position visited is the first of that window. Where there are no more, any stands.
        """
        ...

    def advance(
        self,
        x: Float[Array, "b n d"],
        about: Int[Array, "*b n"],
        prompt: Prompt,
        cache: Cache | None,
    ) -> tuple[Float[Array, "b n d"], Cache | None]:
        """Conditions after what is fed and, before it, what the cache holds; and the cache."""
        ...

    def rows(
        self, cond: Float[Array, "*n d"], at: Int[Array, "*m entries"]
    ) -> Float[Array, "*n w d"]:
        """From a condition, one row for each of the first entries of its window.

        `at` says where these lie, for every condition or for all.
        """
        ...

    def factor_logits(
        self, row: Float[Array, "*n d"], factors: Int[Array, "*n i"]
    ) -> Float[Array, "*n v"]:
        """Logits of the factor that follows the given ones, float32."""
        ...

    def all_factor_logits(
        self, row: Float[Array, "*n d"], factors: Int[Array, "*n factors"]
    ) -> list[Float[Array, "*n v"]]:
        """Logits of every factor, each given the real ones before it."""
        ...

    def code_vectors(self, codes: Int[Array, "*n factors"]) -> Float[Array, "*n d"]:
        """Embedded codes."""
        ...

    def where(
        self, at: Int[Array, "*n"]
    ) -> tuple[Float[Array, "*n d"], Float[Array, "*n d"]] | None:
        """What tells a code that it lies at a position, and what tells a guess that it is about it.

        None for a model that visits positions in one order only: it needs no telling.
        """
        ...

    # Of every Linen module.
    def apply(self, variables: Any, *args: Any, **options: Any) -> Any: ...


@runtime_checkable  # annotations are checked at run time in the tests
class Generator(Protocol):
    """A trainable model of token grids given a prompt.

    `step` is the number of updates tried so far, for what changes over training.
    """

    def init(self, rng: Key[Array, ""]) -> Params: ...

    def loss(
        self,
        params: Params,
        tokens: Tokens,
        prompt: Prompt,
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
