"""Advancing several codes a step: block-parallel decoding with a TensorAR window. Lossy.

The codes of a window are drawn independently of each other given one condition, so every code
beyond the first costs quality; stride 1 is the exact sampler in `causal.py`. Models of codes alone.

Source: this library's extension of TensorAR's Algorithm 1 (2025).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from arcond_jax import types
from arcond_jax.models.joint import Joint
from arcond_jax.nn import attention, layout
from arcond_jax.sampling import causal, sampled


@dataclasses.dataclass(frozen=True, eq=False)
class StrideSampler:
    """Emits the first `stride` codes of every window.

    Attributes:
      base: Everything but the stride; its drafts are "off" (codes behind the emitted ones are
        forgotten) or "feed" (fed back as drafts).
      stride: Codes a step, 1 to the window.
    """

    base: causal.CausalSampler
    stride: int

    def __post_init__(self) -> None:
        window = self.base.network.window
        if self.base.solver is not None:
            raise ValueError(
                "a stride above 1 needs a model of codes alone: latents are drawn 1 a step"
            )
        if not 1 <= self.stride <= window:
            raise ValueError(f"stride {self.stride} must be from 1 to the window, {window}")
        if self.base.drafts == "draw" or self.base.trace:
            raise ValueError("a stride above 1 has no drafts to show and no conditions to trace")

    def __call__(
        self,
        params: types.Params,
        rng: Key[Array, ""],
        label: Int[Array, " b"],
        *,
        refiner: types.Refiner,
        code_law: types.CodeLaw | None = None,
        first_row: Int[Array, ""] | int = 0,
    ) -> sampled.Sampled:
        """Draws one code grid per label; rows and refinement as in `CausalSampler`.

        `code_law` is not looked at: it is about latents.
        """
        base, network = self.base, self.base.network
        length, stride = network.length, self.stride
        row_rngs = sampled.row_rngs(rng, label.shape[0], first_row)
        fed_label = base.fed_label(label)
        params = layout.for_rows(params, fed_label.shape[0] * stride)
        whole = dataclasses.replace(base, drafts="draw")  # all slots are drawn, emitted or not

        def advance(x: Array, cache: attention.Cache, refiner_state, position: Array) -> tuple:
            """Runs the fed tokens and draws the window that starts at `position`."""
            about = position + jnp.arange(x.shape[1]) - (x.shape[1] - 1)
            cond, cache = base.apply(params, x, cache, about, method=Joint.condition)
            cond, refiner_state = base.refine(
                cond[:, -1], refiner, refiner_state, slot=position, label=label
            )
            rngs = jax.vmap(jax.random.fold_in, (0, None))(row_rngs, position)
            weight = base.guidance_weight(position)
            return whole.draw_window(params, cond, weight, rngs), cache, refiner_state

        def body(carry: tuple, position: Int[Array, ""]) -> tuple[tuple, Array]:
            window, cache, refiner_state = carry
            x = base.apply(params, None, base.both(self._fed(window, position)), method=Joint.embed)
            return advance(x, cache, refiner_state, position), window[:, :stride]

        start = advance(
            base.apply(params, fed_label, method=Joint.class_token),
            network.backbone.empty_cache(fed_label.shape[0]),
            refiner.init(label),
            jnp.zeros((), jnp.int32),
        )
        (last, _, refiner_state), emitted = jax.lax.scan(
            body, start, jnp.arange(stride, length, stride)
        )
        emitted = jnp.concatenate([jnp.moveaxis(emitted, 0, 1), last[:, None, :stride]], axis=1)
        codes = emitted.reshape(label.shape[0], -1)[:, :length]
        return sampled.Sampled(types.Tokens(codes=codes), refiner_state=refiner_state)

    def _fed(self, window: Int[Array, "b w"], position: Int[Array, ""]) -> Int[Array, "b n w"]:
        """One window per emitted code; only the last may hold drafts, those beyond the emitted."""
        stride, width, pad = self.stride, self.base.network.window, self.base.network.pad
        shifted = jnp.pad(window, ((0, 0), (0, width)), constant_values=pad)
        fed = jnp.stack([shifted[:, r : r + width] for r in range(stride)], axis=1)
        row, slot = jnp.arange(stride)[:, None], jnp.arange(width)
        is_draft = (row == stride - 1) & (self.base.drafts == "feed")
        inside = position - stride + row + slot < self.base.network.length
        return jnp.where((slot == 0) | (is_draft & inside), fed, pad)
