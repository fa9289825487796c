"""Next-tensor prediction around any causal model of codes: the transformers that fold windows.

Window i is (y_i, ..., y_{i+w-1}) in the order positions are visited (`models.windows`). The input
encoder folds a window into one vector that is added to the embedded token, the output decoder
unfolds a condition into a row for each entry; both start as the identity of the plain
autoregressive model, which window 1 always is.

`Drafter` keeps only the unfolding, and that of guesses alone: the model inside stays what it is,
and speculative sampling takes the guesses that it would have drawn itself.

Source: "TensorAR: Refinement is All You Need in Autoregressive Image Generation" (arXiv v1, May
2025, and ICLR 2026). The two versions differ: v1 has two plain transformer blocks on each side,
ICLR one attention layer. The drafter is this library's own; that it is told the code just drawn is
the idea of Hydra (Ankner et al., 2024).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from arcond_jax import placement, types
from arcond_jax.nn import attention, linear, mlp, norm, parameter, stack

PARTS = ("window_encoder", "window_decoder")  # parameters beside those of the model inside


class QueryBlock(nn.Module):
    """Pre-norm self-attention over a few rows, then (unless `mlp_ratio` is 0) a GELU MLP.

    The parameter counts printed in v1 fit plain blocks of 12 d^2 whatever the backbone's block is.

    Attributes:
      rows: First and last + 1 of the rows to compute; the others only serve as keys. Exact, and
        saves their work in a last block.
    """

    num_heads: int
    mlp_ratio: int
    rows: tuple[int, int]
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "n rows d"], mask: Bool[Array, "rows rows"] | None = None
    ) -> Float[Array, "n kept d"]:
        d = x.shape[-1]
        kept = slice(*self.rows)
        head_dim = d // self.num_heads

        def project(y: Array, count: int, name: str) -> list[Array]:
            features = (count, self.num_heads, head_dim)
            axes = ("embed", None, "heads", None)
            y = linear.Linear(features, axes, dtype=self.dtype, name=name)(y)
            return [y[..., i, :, :] for i in range(count)]

        y = norm.RMSNorm(name="attention_norm")(x)
        keys, values = project(y, 2, "key_value")
        (queries,) = project(y[:, kept], 1, "query")
        y = attention.attend(queries, keys, values, None if mask is None else mask[kept])
        y = y.reshape(*y.shape[:2], d)
        out = linear.Linear((d,), ("heads", "embed"), dtype=self.dtype, name="out")
        x = x[:, kept] + out(y)
        if self.mlp_ratio:
            y = norm.RMSNorm(name="mlp_norm")(x)
            x = x + mlp.GeluMLP(d, self.mlp_ratio * d, dtype=self.dtype, name="mlp")(y)
        return placement.constrain_batch(x)


class QueryTransformer(nn.Module):
    """`depth` query blocks; the last computes only `rows`."""

    depth: int
    num_heads: int
    mlp_ratio: int
    rows: tuple[int, int]
    remat: str
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self, x: Float[Array, "n rows d"], mask: Bool[Array, "rows rows"] | None = None
    ) -> Float[Array, "n kept d"]:
        block = stack.rematerialised(QueryBlock, self.remat)
        for i in range(self.depth):
            rows = self.rows if i == self.depth - 1 else (0, x.shape[1])
            options = (self.num_heads, self.mlp_ratio, rows, self.dtype)
            x = block(*options, name=f"block_{i}")(x, mask)
        return x


class InputEncoder(nn.Module):
    """Folds the embedded codes of a window into one vector, zero at initialisation.

    Attributes:
      out: What the vector comes out of: a "gain" for each channel or a matrix ("projection"), which
        start at zero, or "norm", which does not.
    """

    depth: int
    num_heads: int
    mlp_ratio: int = 4
    out: str = "gain"
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, codes: Float[Array, "*n w d"], seen: Bool[Array, "*n w"]
    ) -> Float[Array, "*n d"]:
        """In the place of codes that are not to be seen stands a learned vector."""
        *n, w, d = codes.shape
        axes = (None, "embed")
        position = parameter.parameter(
            self, "position", parameter.normal_init, (w + 1, d), axes
        ).astype(self.dtype)
        pad = parameter.parameter(self, "pad", parameter.zeros_init, (d,), axes[1:])
        entries = jnp.where(seen[..., None], codes, pad.astype(codes.dtype)).reshape(-1, w, d)
        # Row 0 is the query: nothing but its own learned vector.
        rows = jnp.pad(entries, ((0, 0), (1, 0), (0, 0))) + position
        options = (self.depth, self.num_heads, self.mlp_ratio, (0, 1), self.remat, self.dtype)
        rows = QueryTransformer(*options, name="transformer")(rows)
        folded = norm.RMSNorm(use_scale=False)(rows[:, 0])
        if self.out == "gain":
            folded = gain(self, folded)
        elif self.out == "projection":
            folded = linear.Linear(
                (d,),
                ("embed", None),
                kernel_init=parameter.zeros_init,
                dtype=self.dtype,
                name="projection",
            )(folded)
        return folded.reshape(*n, d)


class OutputDecoder(nn.Module):
    """Unfolds a condition into a row per entry; row 0 is the condition itself at initialisation.

    The rows come out as large as conditions are, so that one head serves all entries.

    Attributes:
      window: Entries there are.
      unit: Whether conditions are of unit size; otherwise rows take the size of theirs.
      residual: Whether row 0 is the condition and something added, by a gain that starts at zero;
        otherwise it is a row like the others.
    """

    depth: int
    num_heads: int
    window: int
    mlp_ratio: int = 4
    unit: bool = True
    residual: bool = True
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        cond: Float[Array, "*n d"],
        num_entries: int,
        about: Float[Array, "*n entries d"] | None = None,
    ) -> Float[Array, "*n entries d"]:
        """Rows of the first entries; their values do not depend on how many they are.

        Args:
          about: Vectors that tell these entries where they lie. Then an entry sees those before it
            and no later ones, of which nobody may have said where they lie.
        """
        *n, d = cond.shape
        flat = cond.reshape(-1, d)
        rows = unfolded(self, flat[:, None], (1, 1 + num_entries), about, in_order=True)
        rows = norm.RMSNorm(use_scale=False)(rows)
        if not self.unit:
            rows = rows * size(flat)[:, None]
        if self.residual:
            first = flat + gain(self, rows[:, 0])
            rows = jnp.concatenate([first[:, None], rows[:, 1:]], axis=1)
        return rows.reshape(*n, num_entries, d)


class DraftDecoder(nn.Module):
    """Unfolds a condition, and the code that was drawn from it, into rows of the entries after it.

    Attributes:
      window: Entries there are, that of the code included.
      unit: As in `OutputDecoder`.
    """

    depth: int
    num_heads: int
    window: int
    mlp_ratio: int = 4
    unit: bool = True
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        cond: Float[Array, "*n d"],
        code: Float[Array, "*n d"],
        about: Float[Array, "*n drafts d"] | None = None,
    ) -> Float[Array, "*n drafts d"]:
        *n, d = cond.shape
        told = jnp.stack([cond, code.astype(cond.dtype)], axis=-2).reshape(-1, 2, d)
        rows = unfolded(self, told, (2, 1 + self.window), about)
        rows = norm.RMSNorm(name="norm")(rows)
        if not self.unit:
            rows = rows * size(told[:, 0])[:, None]
        return rows.reshape(*n, self.window - 1, d)


def unfolded(
    decoder: OutputDecoder | DraftDecoder,
    told: Float[Array, "n told d"],
    rows: tuple[int, int],
    about: Float[Array, "*n entries d"] | None,
    *,
    in_order: bool = False,
) -> Float[Array, "n kept d"]:
    """Learned queries, as many as rows are missing behind what is told, through the transformer.

    Args:
      in_order: Whether queries that are told where they lie see none after themselves.
    """
    n, num_told, d = told.shape
    count = decoder.window + 1 - num_told
    queries = parameter.parameter(
        decoder, "queries", parameter.normal_init, (count, d), (None, "embed")
    ).astype(told.dtype)
    queries = jnp.broadcast_to(queries, (n, count, d))
    if about is not None:
        about = about.reshape(-1, *about.shape[-2:]).astype(told.dtype)
        queries = queries[:, : about.shape[1]] + about
    x, mask = jnp.concatenate([told, queries], axis=1), None
    if about is not None and in_order:
        mask = jnp.tri(x.shape[1], dtype=bool)
    options = (decoder.depth, decoder.num_heads, decoder.mlp_ratio)
    transformer = QueryTransformer(*options, rows, decoder.remat, decoder.dtype, name="transformer")
    return transformer(x, mask)


def size(x: Float[Array, "n d"]) -> Float[Array, "n 1"]:
    """Root of the mean square."""
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
    return jnp.sqrt(square).astype(x.dtype)


def frozen(params: types.Params) -> types.Params:
    """The same parameters, of which only the windows' own have gradients."""
    return {x: p if x in PARTS else jax.lax.stop_gradient(p) for x, p in params.items()}


def gain(module: nn.Module, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """Scales each channel by a learned gain that starts at zero.

    A vector and not a matrix: the parameter counts of v1 leave no room for d x d.
    """
    scale = parameter.parameter(module, "gain", parameter.zeros_init, (x.shape[-1],), ("embed",))
    return scale.astype(x.dtype) * x


class Around(nn.Module, kw_only=True):
    """A model of codes, itself a `types.CausalModel`, that hands every call to the model inside.

    The model inside keeps its parameters under their own names; what is around it adds its own
    beside them.

    Attributes:
      inner: Unbound model that predicts one code at a position.
    """

    inner: Any

    @property
    def length(self) -> int:
        return self.inner.length

    @property
    def factor_sizes(self) -> tuple[int, ...]:
        return self.inner.factor_sizes

    @property
    def channels(self) -> int | None:
        return self.inner.channels

    @property
    def unrolled(self) -> bool:
        return self.inner.unrolled

    def no_prompt(self, num_rows: int) -> types.Prompt:
        return self.inner.no_prompt(num_rows)

    def null(self, prompt: types.Prompt) -> types.Prompt:
        return self.inner.null(prompt)

    def empty_cache(self, prompt: types.Prompt, spare: int = 0) -> types.Cache:
        return self.inner.empty_cache(prompt, spare)

    def prefix(
        self, prompt: types.Prompt, at: Int[Array, "*b 1"]
    ) -> tuple[Float[Array, "b p d"], Int[Array, "*b p"]]:
        return self.inner.prefix(prompt, at)

    def embed(self, token: types.Token, at: Int[Array, "*b n_plus_w"]) -> Float[Array, "b n d"]:
        return self.inner.embed(token, at)

    def advance(
        self,
        x: Float[Array, "b n d"],
        about: Int[Array, "*b n"],
        prompt: types.Prompt,
        cache: types.Cache | None,
    ) -> tuple[Float[Array, "b n d"], types.Cache | None]:
        return self.inner.advance(x, about, prompt, cache)

    def rows(
        self, cond: Float[Array, "*n d"], at: Int[Array, "*m entries"]
    ) -> Float[Array, "*n entries d"]:
        return self.inner.rows(cond, at)

    def factor_logits(
        self, row: Float[Array, "*n d"], factors: Int[Array, "*n i"]
    ) -> Float[Array, "*n v"]:
        return self.inner.factor_logits(row, factors)

    def all_factor_logits(
        self, row: Float[Array, "*n d"], factors: Int[Array, "*n factors"]
    ) -> list[Float[Array, "*n v"]]:
        return self.inner.all_factor_logits(row, factors)

    def code_vectors(self, codes: Int[Array, "*n factors"]) -> Float[Array, "*n d"]:
        return self.inner.code_vectors(codes)

    def where(
        self, at: Int[Array, "*n"]
    ) -> tuple[Float[Array, "*n d"], Float[Array, "*n d"]] | None:
        return self.inner.where(at)

    def latent_cond(
        self, cond: Float[Array, "*n d"], codes: Int[Array, "*n"] | None
    ) -> Float[Array, "*n d"]:
        """Of a model that has latents besides."""
        return self.inner.latent_cond(cond, codes)

    def denoise(
        self, x: Float[Array, "*n c"], t: Int[Array, "..."], cond: Float[Array, "*n d"]
    ) -> Float[Array, "*n two_c"]:
        """Of a model that has latents besides."""
        return self.inner.denoise(x, t, cond)

    def _about(
        self, at: Int[Array, "*m entries"], cond: Array
    ) -> Float[Array, "*n entries d"] | None:
        """What tells the rows of every condition where they lie."""
        told = self.inner.where(at)
        if told is None:
            return None
        return jnp.broadcast_to(told[1], (*cond.shape[:-1], *told[1].shape[-2:]))


class Windowed(Around, kw_only=True):
    """TensorAR around a model of codes.

    Attributes:
      window: Codes predicted at each position; at least 2.
      depth: Query blocks on each side (2 in arXiv v1, 1 in the ICLR version).
      num_heads: Of the query blocks.
      mlp_ratio: Of the MLP in query blocks; 0 for attention only (ICLR version).
      projection: Whether what the encoder adds comes out of a matrix: the counts printed in the
        ICLR version are those of nine d x d, one more than in the blocks.
      residual: Whether both sides add to what the model inside has, starting with nothing;
        otherwise they stand in its place, which is for training from scratch.
      remat: As in `nn.stack.scanned`.
    """

    window: int
    num_heads: int
    depth: int = 2
    mlp_ratio: int = 4
    projection: bool = False
    residual: bool = True
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        nn.share_scope(self, self.inner)
        out = ("projection" if self.projection else "gain") if self.residual else "norm"
        blocks: dict[str, Any] = dict(
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            remat=self.remat,
            dtype=self.dtype,
        )
        self.window_encoder = InputEncoder(out=out, **blocks)
        self.window_decoder = OutputDecoder(
            window=self.window, unit=self.inner.normalised, residual=self.residual, **blocks
        )

    @property
    def num_drafts(self) -> int:
        """Codes guessed beyond the one that is drawn."""
        return self.window - 1

    def embed(self, token: types.Token, at: Int[Array, "*b n_plus_w"]) -> Float[Array, "b n d"]:
        """The embedded token, told the drafts of what comes after it."""
        assert token.codes is not None and token.seen is not None
        codes = self.inner.code_vectors(token.codes)
        x = self.inner.embed(token, at)
        if not self.residual:
            x = x - codes[..., 0, :]
        order = jnp.arange(codes.shape[1])[:, None] + jnp.arange(self.window)
        told = self.inner.where(at[..., order])
        return x + self.window_encoder(codes if told is None else codes + told[0], token.seen)

    def rows(
        self, cond: Float[Array, "*n d"], at: Int[Array, "*m entries"]
    ) -> Float[Array, "*n entries d"]:
        """From a condition, a row for each of the first entries of its window."""
        return self.window_decoder(cond, at.shape[-1], self._about(at, cond))

    def draft_rows(
        self,
        cond: Float[Array, "*n d"],
        codes: Int[Array, "*n factors"],
        at: Int[Array, "*m entries"],
    ) -> Float[Array, "*n drafts d"]:
        """Rows of the drafts, which are not told the code that was drawn."""
        del codes
        return self.rows(cond, at)[..., 1:, :]


class Drafter(Around, kw_only=True):
    """A plain model of codes, and guesses of what it will draw after the next code.

    It is trained and sampled as the model inside; `draft_rows` are trained by `losses.DraftLoss`
    and verified by `sampling.speculative`.

    Attributes:
      num_drafts: Codes guessed at each position.
      depth, num_heads, mlp_ratio: Of the query blocks.
      remat: As in `nn.stack.scanned`.
    """

    num_drafts: int
    num_heads: int
    depth: int = 1
    mlp_ratio: int = 4
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        nn.share_scope(self, self.inner)
        self.window_decoder = DraftDecoder(
            depth=self.depth,
            num_heads=self.num_heads,
            window=self.num_drafts + 1,
            mlp_ratio=self.mlp_ratio,
            unit=self.inner.normalised,
            remat=self.remat,
            dtype=self.dtype,
        )

    @property
    def window(self) -> int:
        return self.inner.window

    def draft_rows(
        self,
        cond: Float[Array, "*n d"],
        codes: Int[Array, "*n factors"],
        at: Int[Array, "*m entries"],
    ) -> Float[Array, "*n drafts d"]:
        """Rows of the drafts, told the code that was drawn from the condition.

        `at` holds the position of that code and those of the drafts.
        """
        about = self._about(at[..., 1:], cond)
        return self.window_decoder(cond, self.inner.code_vectors(codes), about)
