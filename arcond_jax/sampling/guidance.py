"""Classifier-free guidance, the same for every sampler: which rows run, and how they are combined.

Each conditional row has its unconditional one beside it. Side by side and not one half behind the
other, because a batch that is cut over devices then keeps both on one of them.

Source: Ho and Salimans (2022), "Classifier-Free Diffusion Guidance".
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from arcond_jax import types

SCHEDULES = ("constant", "linear", "power_cosine")


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How strong guidance is, over what is decoded.

    Attributes:
      scale: unconditional + scale * (conditional - unconditional). 1.0 is none and costs nothing;
        otherwise the batch is doubled.
      later_scale: Of a code's factors after the first; None for that of the first.
      schedule: "constant"; "linear", from 1 to the scale with the share of tokens decoded once the
        step is done (MAR, models/mar.py, `sample_tokens`); or "power_cosine", from 1 to the scale
        along half a cosine of the share decoded before it (RAR, modeling/rar.py, `generate`; MDT,
        Gao et al., 2023).
      power: Of the share, in "power_cosine": 0.0 is constant guidance, and the larger it is the
        longer guidance stays near 1.
      positions: How many tokens are guided, from the first on; None for all. LlamaGen's
        cfg_interval plus 2.

    Raises:
      ValueError: A schedule that does not exist, or a power for another one.
    """

    scale: float = 1.0
    later_scale: float | None = None
    schedule: str = "constant"
    power: float | None = None
    positions: int | None = None

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"guidance_schedule {self.schedule!r} is not one of {', '.join(SCHEDULES)}"
            )
        if (self.power is not None) != (self.schedule == "power_cosine"):
            raise ValueError(
                f"guidance_power {self.power} and guidance_schedule {self.schedule!r}: "
                "power_cosine, and it alone, has a power"
            )

    @property
    def on(self) -> bool:
        """Whether there are unconditional rows."""
        return self.scale != 1.0 or self.later_scale not in (None, 1.0)

    def prompts(self, network: Any, prompt: types.Prompt) -> Any:
        """The prompts of all rows that the network runs; it knows what `null` ones are."""
        if not self.on:
            return prompt
        return jax.tree.map(_pair, prompt, network.null(prompt))

    def both(self, x: Shaped[Array, "b *n"]) -> Shaped[Array, "rows *n"]:
        """What was drawn, for both rows of each pair."""
        return _pair(x, x) if self.on else x

    def conditional(self, x: Shaped[Array, "rows *n"]) -> Shaped[Array, "b *n"]:
        """The conditional rows alone."""
        return _split(x)[0] if self.on else x

    def weight(
        self,
        start: Int[Array, "*at"] | int,
        stop: Int[Array, "*at"] | int,
        length: int,
        *,
        factor: int = 0,
    ) -> Float[Array, "*at"] | None:
        """How strong it is in a step that decodes tokens `start` to `stop` of `length`.

        One step, or several. None where there are no unconditional rows.
        """
        if not self.on:
            return None
        scale = self.scale
        if factor and self.later_scale is not None:
            scale = self.later_scale
        weight = jnp.full(jnp.shape(start), scale, jnp.float32)
        if self.schedule == "linear":
            weight = jnp.asarray(1.0 + (scale - 1.0) * (stop / length), jnp.float32)
        elif self.power is not None:
            share = jnp.asarray(start / length, jnp.float32)
            rise = (1.0 - jnp.cos(jnp.pi * share**self.power)) / 2
            weight = 1.0 + (scale - 1.0) * rise
        if self.positions is None:
            return weight
        return jnp.where(start < self.positions, weight, 1.0)

    def combine(
        self, x: Float[Array, "rows *n"], weight: Float[Array, "*at"] | None
    ) -> Float[Array, "b *n"]:
        """What is drawn from: each conditional row, led away from the one beside it.

        There is one weight, or one for each of the first axes of what comes out.
        """
        if weight is None:
            return x
        conditional, unconditional = _split(x)
        if weight.ndim:
            weight = weight.reshape(*weight.shape, *[1] * (x.ndim - weight.ndim))
        return unconditional + weight * (conditional - unconditional)

    def combine_noise(
        self, output: Float[Array, "rows *n two_c"], weight: Float[Array, ""] | None
    ) -> Float[Array, "b *n two_c"]:
        """Of a denoiser's output the noise half; the variance stays the conditional one.

        Source: MAR, models/diffloss.py, `forward_with_cfg`.
        """
        if weight is None:
            return output
        predicted, v = jnp.split(output, 2, axis=-1)
        return jnp.concatenate([self.combine(predicted, weight), self.conditional(v)], axis=-1)

    def refine(
        self,
        refine: Callable[[Float[Array, "b *n d"]], tuple[Array, types.RefinerState]],
        cond: Float[Array, "rows *n d"],
    ) -> tuple[Float[Array, "rows *n d"], types.RefinerState]:
        """Refines the conditional rows; the unconditional ones pass."""
        if not self.on:
            return refine(cond)
        conditional, unconditional = _split(cond)
        refined, state = refine(conditional)
        return _pair(refined, unconditional), state


def _pair(
    x: Shaped[Array | np.ndarray, "b *n"], y: Shaped[Array | np.ndarray, "b *n"]
) -> Shaped[Array, "rows *n"]:
    return jnp.stack([x, y], axis=1).reshape(2 * x.shape[0], *x.shape[1:])


def _split(x: Shaped[Array, "rows *n"]) -> tuple[Shaped[Array, "b *n"], Shaped[Array, "b *n"]]:
    pairs = x.reshape(x.shape[0] // 2, 2, *x.shape[1:])
    return pairs[:, 0], pairs[:, 1]
