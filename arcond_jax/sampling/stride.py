"""Advancing several codes a step: block-parallel decoding with a TensorAR window. Lossy.

The codes of a window are drawn independently of each other given one condition, so every code
beyond the first costs quality; stride 1 is the exact sampler in `raster.py`, and draws the same.
Models of codes alone.

Source: this library's extension of TensorAR's Algorithm 1 (2025).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from arcond_jax import types
from arcond_jax.nn import factors as factors_lib
from arcond_jax.nn import layout
from arcond_jax.sampling import heads, raster, sampled


@dataclasses.dataclass(frozen=True, eq=False)
class StrideSampler:
    """Emits the first `stride` codes of every window.

    Attributes:
      base: Everything but the stride; its drafts are "off" (codes behind the emitted ones are
        forgotten) or "feed" (fed back as drafts).
      stride: Codes a step, 1 to the window.

    Raises:
      ValueError: A base or a stride for which this makes no sense.
    """

    base: raster.Raster
    stride: int

    def __post_init__(self) -> None:
        window = self.base.network.window
        if len(self.base.heads) != 1 or not isinstance(self.base.heads[0], heads.Codes):
            raise ValueError("a stride needs a model of codes alone: latents are drawn 1 a step")
        if not 1 <= self.stride <= window:
            raise ValueError(f"stride {self.stride} must be from 1 to the window, {window}")
        if self.head.drafts == "draw" or self.base.trace:
            raise ValueError("a stride has no drafts to show and no conditions to trace")

    @property
    def head(self) -> heads.Codes:
        """What draws the windows."""
        head = self.base.heads[0]
        assert isinstance(head, heads.Codes)
        return head

    @property
    def network(self) -> types.CausalModel:
        return self.base.network

    def __call__(
        self,
        params: types.Params,
        rng: Key[Array, ""],
        prompt: types.Prompt,
        *,
        refiner: types.Refiner,
        code_law: types.CodeLaw | None = None,
        first_row: Int[Array, ""] | int = 0,
        codebook: Float[Array, "v c"] | None = None,
    ) -> sampled.Sampled:
        """Draws one code grid per prompt; rows and refinement as in `raster.Raster`.

        `code_law` is not looked at: it is about latents.
        """
        base, network, stride = self.base, self.network, self.stride
        label = types.group_of(prompt)
        row_rngs = sampled.row_rngs(rng, label.shape[0], first_row)
        prompts = base.guidance.prompts(network, prompt)
        weights = base.laid_out(params, types.num_rows(prompts) * stride)

        def advance(x: Array, cache: types.Cache, state, position: Array) -> tuple:
            """Runs the fed tokens and draws the window that starts at `position`."""
            place = heads.Place(network, layout.together(weights), base.guidance, position)
            about = position + jnp.arange(x.shape[1]) - (x.shape[1] - 1)
            cond, cache = place.apply(x, about, prompts, cache, method="advance")
            refine = functools.partial(refiner, state=state, slot=position, label=label)
            cond, state = base.guidance.refine(refine, cond[:, -1])
            rngs = jax.vmap(jax.random.fold_in, (0, None))(row_rngs, position)
            # All entries are drawn, emitted or not.
            window = self.head.draw_window(place, cond, rngs, num_entries=network.window)
            return window, cache, state

        def body(carry: tuple, position: Int[Array, ""]) -> tuple[tuple, Array]:
            window, cache, state = carry
            place = heads.Place(
                network,
                layout.together(weights),
                base.guidance,
                position - 1,
                row_rngs=row_rngs,
                codebook=codebook,
            )
            token = jax.tree.map(base.guidance.both, self._fed(window, place))
            at = position - stride + jnp.arange(stride + network.window)
            at = jnp.minimum(at, network.length - 1)
            x = place.apply(token, at, method="embed")
            return advance(x, cache, state, position), window[:, :stride]

        x, cache = base.start(params, prompts)
        start = advance(x, cache, refiner.init(label), jnp.zeros((), jnp.int32))
        positions = jnp.arange(stride, network.length, stride)
        (last, _, state), emitted = jax.lax.scan(body, start, positions)
        emitted = jnp.concatenate([jnp.moveaxis(emitted, 0, 1), last[:, None, :stride]], axis=1)
        codes = factors_lib.join(emitted, network.factor_sizes).reshape(label.shape[0], -1)
        return sampled.Sampled(types.Tokens(codes=codes[:, : network.length]), refiner_state=state)

    def _fed(self, window: Int[Array, "b w factors"], place: heads.Place) -> types.Token:
        """One window per emitted code; only the last may hold drafts, those beyond the emitted.

        `place` is where that last one is.
        """
        stride, width = self.stride, self.network.window
        shifted = jnp.pad(window, ((0, 0), (0, width), (0, 0)))
        fed = [shifted[:, r : r + width] for r in range(stride)]
        codes = jnp.stack([*fed[:-1], self.head.noised(place, fed[-1])], axis=1)
        row, entry = jnp.arange(stride)[:, None], jnp.arange(width)
        is_draft = (row == stride - 1) & (self.head.drafts == "feed") & (row + entry < width)
        inside = place.position + 1 - stride + row + entry < self.network.length
        seen = (entry == 0) | (is_draft & inside)
        return types.Token(codes=codes, seen=jnp.broadcast_to(seen, codes.shape[:-1]))
