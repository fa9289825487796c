"""Sampling a diffusion transformer: one reverse chain over the whole grid."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from arcond_jax import types
from arcond_jax.diffusion import solvers
from arcond_jax.models import dit
from arcond_jax.sampling import filters, sampled


@dataclasses.dataclass(frozen=True, eq=False)
class GridSampler:
    """Static choices of sampling from `DiT`.

    Attributes:
      network: The Linen module.
      solver: The chain; it runs the whole network at every step.
      guidance_scale: 1.0 is none and costs nothing; otherwise the batch is doubled. Constant along
        the chain.
      trace: Not possible: the only condition is the class, and nothing moves it.
    """

    network: dit.DiT
    solver: solvers.Solver
    guidance_scale: float = 1.0
    trace: bool = False

    def __post_init__(self) -> None:
        if self.trace:
            raise ValueError("a diffusion transformer has no conditions to trace: its class is all")

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
        """Draws one grid of latents per label; rows as in `CausalSampler`.

        Neither `refiner` nor `code_law` is called: there is one static condition and no code.
        """
        shape = (self.solver.num_evaluations + 1, self.network.length, self.network.channels)
        rngs = sampled.row_rngs(rng, label.shape[0], first_row)
        noise = jax.vmap(lambda rng: jax.random.normal(rng, shape), out_axes=1)(rngs)

        guided = self.guidance_scale != 1.0
        weight = jnp.asarray(self.guidance_scale, jnp.float32) if guided else None
        fed_label = label
        if guided:
            fed_label = jnp.concatenate([label, jnp.full_like(label, self.network.num_classes)])

        def denoise(x: Float[Array, "b l c"], t: Int[Array, ""]) -> Float[Array, "b l two_c"]:
            x = jnp.concatenate([x, x]) if guided else x
            output: Any = self.network.apply({"params": params}, x, t, fed_label)
            return filters.guide_noise(output, weight)

        latents = self.solver(denoise, noise[0], noise[1:])
        return sampled.Sampled(types.Tokens(latents=latents), refiner_state=refiner.init(label))
