"""Reverse chains: from noise (or a noised guess) to a latent, one `lax.scan`.

A denoiser here is `(x [..., c], t []) -> [..., 2c]`; guidance, if any, is inside it.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from arcond_jax.diffusion import gaussian
from arcond_jax.diffusion import schedule as schedule_lib

Denoiser = Callable[[Float[Array, "... c"], Int[Array, ""]], Float[Array, "... two_c"]]
KINDS = ("ancestral", "ddim")


@dataclasses.dataclass(frozen=True)
class Solver:
    """Static choices of a reverse chain.

    Attributes:
      schedule: The process over the steps that are visited, first to noisiest.
      kind: "ancestral" (Ho et al., 2020, with the learned variance; noise at every step but the
        last) or "ddim" (Song et al., 2021, eta = 0).
      temperature: Scales the noise of ancestral steps, not the starting noise (MAR).
      clip: Bound on |x_0| predictions, in latent units; None leaves them free, as MAR does.
    """

    schedule: schedule_lib.Schedule
    kind: str = "ancestral"
    temperature: float = 1.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown solver {self.kind!r}: choose one of {', '.join(KINDS)}")

    @property
    def num_evaluations(self) -> int:
        return len(self.schedule.betas)

    def noised(
        self, x0: Float[Array, "... c"], noise: Float[Array, "... c"]
    ) -> Float[Array, "... c"]:
        """A guess of x_0 taken to the noise level at which the chain starts."""
        last = jnp.full(x0.shape[:-1], self.num_evaluations - 1)
        return gaussian.q_sample(x0, last, noise, schedule=self.schedule)

    def __call__(
        self,
        denoise: Denoiser,
        x: Float[Array, "... c"],
        noise: Float[Array, "steps ... c"],
    ) -> Float[Array, "... c"]:
        """Runs the chain from x at its noisiest step; `noise` has one draw per evaluation."""

        def body(x, inputs):
            i, t, step_noise = inputs
            return self._step(denoise(x, t), x, i, step_noise), None

        order = np.arange(self.num_evaluations)[::-1].copy()
        times = jnp.asarray(self.schedule.timesteps[order], jnp.int32)
        x, _ = jax.lax.scan(body, x, (jnp.asarray(order), times, noise))
        return x

    def _step(
        self,
        output: Float[Array, "... two_c"],
        x: Float[Array, "... c"],
        i: Int[Array, ""],
        noise: Float[Array, "... c"],
    ) -> Float[Array, "... c"]:
        predicted, v = jnp.split(output.astype(jnp.float32), 2, axis=-1)
        x0 = gaussian.predict_x0(x, i, predicted, schedule=self.schedule)
        if self.clip is not None:
            x0 = jnp.clip(x0, -self.clip, self.clip)
        if self.kind == "ancestral":
            mean = gaussian.posterior_mean(x0, x, i, schedule=self.schedule)
            std = jnp.exp(0.5 * gaussian.log_variance(v, i, schedule=self.schedule))
            return mean + jnp.where(i > 0, self.temperature, 0.0) * std * noise
        # DDIM re-derives the noise, so that a clipped x_0 stays on the path.
        kept = self.schedule.alphas_cumprod
        seen = (x - gaussian.lookup(np.sqrt(kept), i) * x0) / gaussian.lookup(
            np.sqrt(1.0 - kept), i
        )
        kept_prev = self.schedule.alphas_cumprod_prev
        return (
            gaussian.lookup(np.sqrt(kept_prev), i) * x0
            + gaussian.lookup(np.sqrt(1.0 - kept_prev), i) * seen
        )
