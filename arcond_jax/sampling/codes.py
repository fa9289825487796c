"""The compiled sampling loop of models of codes: one scan over positions in raster order.

A code is one factor or several, drawn one after another at each position. The condition of a
position is refined before any factor of its code is drawn from it.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from arcond_jax import types
from arcond_jax.nn import attention, layout
from arcond_jax.sampling import filters, sampled


@runtime_checkable  # annotations are checked at run time in the tests
class CodeModel(Protocol):
    """A causal Linen module over codes.

    `start` gives the condition of position 0 and `advance` that of the position after the one whose
    factors it is given. `factor_logits` draws on the condition and on the factors that were drawn
    before; their number says which factor comes next. `null` gives the labels of the unconditional
    rows beside those of the conditional ones.
    """

    num_classes: int

    @property
    def length(self) -> int: ...

    @property
    def factor_sizes(self) -> tuple[int, ...]: ...

    def null(self, label: Int[Array, " b"]) -> Int[Array, " b"]: ...

    def start(self, label: Int[Array, " b"]) -> tuple[Float[Array, "b d"], attention.Cache]: ...

    def advance(
        self,
        factors: Int[Array, "b factors"],
        position: Int[Array, ""],
        label: Int[Array, " b"],
        cache: attention.Cache,
    ) -> tuple[Float[Array, "b d"], attention.Cache]: ...

    def factor_logits(
        self, cond: Float[Array, "*n d"], factors: Int[Array, "*n i"]
    ) -> Float[Array, "*n v"]: ...

    def join(self, factors: Int[Array, "*n factors"]) -> Int[Array, "*n"]: ...

    # Of every Linen module.
    def apply(self, variables: Any, *args: Any, **options: Any) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Draw:
    """How one factor of a code is drawn.

    Attributes:
      guidance_scale: 1.0 is none.
      temperature: Divides the guided logits.
      top_k, top_p, min_p: As in `filters.filter_logits`.
    """

    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} must be positive")


@dataclasses.dataclass(frozen=True, eq=False)
class CodeSampler:
    """Static choices of sampling from a model of codes.

    Attributes:
      network: The Linen module.
      draws: One for each factor of a code.
      guidance_power: Lets guidance grow over positions as `filters.power_cosine_weight` says; None
        keeps it constant.
      guided_positions: How many are guided, from the first on; None for all.
      trace: Also return the conditions before and after refinement.

    Raises:
      ValueError: Not as many draws as factors.
    """

    network: CodeModel
    draws: tuple[Draw, ...] = (Draw(),)
    guidance_power: float | None = None
    guided_positions: int | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        num_factors = len(self.network.factor_sizes)
        if len(self.draws) != num_factors:
            raise ValueError(
                f"{len(self.draws)} draws do not fit codes of {num_factors} factors: give one each"
            )

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
        """Draws one grid of codes per label; rows and refinement as in `CausalSampler`.

        `code_law` is not looked at: it is about latents.
        """
        rngs_of_rows = sampled.row_rngs(rng, label.shape[0], first_row)
        fed_label = label
        if self.guided:
            fed_label = jnp.concatenate([label, self.network.null(label)])
        params = layout.for_rows(params, fed_label.shape[0])

        def draw(
            cond: Float[Array, "n d"], state: types.RefinerState, position: Int[Array, ""]
        ) -> tuple[Int[Array, "b factors"], types.RefinerState, Any]:
            b = label.shape[0]
            drawn = cond[:b]
            refined, state = refiner(drawn, state, slot=position, label=label)
            rngs = jax.vmap(jax.random.fold_in, (0, None))(rngs_of_rows, position)
            cond = jnp.concatenate([refined, cond[b:]])
            factors = self._draw_factors(params, cond, position, rngs)
            return factors, state, (drawn, refined) if self.trace else None

        def body(carry: tuple, position: Int[Array, ""]) -> tuple[tuple, Any]:
            factors, cache, state = carry
            cond, cache = self._apply(
                params, self._both(factors), position - 1, fed_label, cache, method="advance"
            )
            factors, state, trace = draw(cond, state, position)
            return (factors, cache, state), (factors, trace)

        # The first position has no code before it, and the code of the last is fed to nothing.
        cond, cache = self._apply(params, fed_label, method="start")
        first, state, first_trace = draw(cond, refiner.init(label), jnp.zeros((), jnp.int32))
        positions = jnp.arange(1, self.network.length)
        (_, _, state), rest = jax.lax.scan(body, (first, cache, state), positions)
        factors, traced = jax.tree.map(
            lambda head, tail: jnp.moveaxis(jnp.concatenate([head[None], tail]), 0, 1),
            (first, first_trace),
            rest,
        )
        codes = self.network.join(factors)
        return sampled.Sampled(types.Tokens(codes=codes), cond=traced, refiner_state=state)

    @property
    def guided(self) -> bool:
        """Whether any factor is guided; otherwise the batch is not doubled."""
        return any(draw.guidance_scale != 1.0 for draw in self.draws)

    def guidance_weight(self, scale: float, position: Int[Array, ""]) -> Float[Array, ""] | None:
        """Guidance of a factor at a position; None if no factor is guided."""
        if not self.guided:
            return None
        weight = jnp.asarray(scale, jnp.float32)
        if self.guidance_power is not None:
            share = position / self.network.length
            weight = filters.power_cosine_weight(scale, self.guidance_power, share)
        if self.guided_positions is None:
            return weight
        return jnp.where(position < self.guided_positions, weight, 1.0)

    def _draw_factors(
        self,
        params: types.Params,
        cond: Float[Array, "n d"],
        position: Int[Array, ""],
        rngs: Key[Array, " b"],
    ) -> Int[Array, "b factors"]:
        factors = jnp.zeros((rngs.shape[0], 0), jnp.int32)
        for i, draw in enumerate(self.draws):
            both = self._apply(params, cond, self._both(factors), method="factor_logits")
            logits = filters.guide(both, self.guidance_weight(draw.guidance_scale, position))
            logits = filters.filter_logits(
                logits / draw.temperature, top_k=draw.top_k, top_p=draw.top_p, min_p=draw.min_p
            )
            factor_rngs = jax.vmap(jax.random.fold_in, (0, None))(rngs, i)
            factor = jax.vmap(jax.random.categorical)(factor_rngs, logits)
            factors = jnp.concatenate([factors, factor[:, None]], axis=1)
        return factors

    def _apply(self, params: types.Params, *args: Any, method: str) -> Any:
        return self.network.apply({"params": params}, *args, method=method)

    def _both(self, x: Array) -> Array:
        """Duplicates rows for the unconditional stream, which shares what was drawn."""
        return jnp.concatenate([x, x]) if self.guided else x
