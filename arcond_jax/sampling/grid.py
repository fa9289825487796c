"""Sampling a diffusion transformer: one reverse chain over the whole grid."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Int, Key

from arcond_jax import types
from arcond_jax.diffusion import solvers
from arcond_jax.models import dit
from arcond_jax.nn import layout
from arcond_jax.sampling import guidance as guidance_lib
from arcond_jax.sampling import sampled


@dataclasses.dataclass(frozen=True, eq=False)
class GridSampler:
    """Static choices of sampling from `DiT`.

    Attributes:
      network: The Linen module.
      solver: The chain; it runs the whole network at every step.
      guidance: Classifier-free guidance; what counts as decoded is the share of the noise process
        that is undone.
      trace: Not possible: the only condition is the class, and nothing moves it.
    """

    network: dit.DiT
    solver: solvers.Solver
    guidance: guidance_lib.Guidance = dataclasses.field(default_factory=guidance_lib.Guidance)
    trace: bool = False

    def __post_init__(self) -> None:
        if self.trace:
            raise ValueError("a diffusion transformer has no conditions to trace: its class is all")

    def __call__(
        self,
        params: types.Params,
        rng: Key[Array, ""],
        prompt: Int[Array, " b"],
        *,
        refiner: types.Refiner,
        code_law: types.CodeLaw | None = None,
        first_row: Int[Array, ""] | int = 0,
    ) -> sampled.Sampled:
        """Draws one grid of latents per label; rows as in `raster.Raster`.

        Neither `refiner` nor `code_law` is called: there is one static condition and no code.
        """
        shape = (self.solver.num_evaluations + 1, self.network.length, self.network.channels)
        rngs = sampled.row_rngs(rng, prompt.shape[0], first_row)
        noise = jax.vmap(lambda rng: jax.random.normal(rng, shape), out_axes=1)(rngs)
        params = layout.rounded(params, self.network.dtype)
        guidance, prompts = self.guidance, self.guidance.prompts(self.network, prompt)

        def denoise(x: Float[Array, "b l c"], t: Int[Array, ""]) -> Float[Array, "b l two_c"]:
            x = guidance.both(x)
            output: Any = self.network.apply({"params": params}, x, t, prompts)
            undone = dit.NUM_TIMES - 1 - t
            weight = guidance.weight(undone, undone + 1, dit.NUM_TIMES)
            return guidance.combine_noise(output, weight)

        latents = self.solver(denoise, noise[0], noise[1:])
        return sampled.Sampled(types.Tokens(latents=latents), refiner_state=refiner.init(prompt))
