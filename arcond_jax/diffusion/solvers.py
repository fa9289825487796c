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
KINDS = ("ancestral", "ddim", "dpm")


@dataclasses.dataclass(frozen=True)
class Solver:
    """Static choices of a reverse chain.

    Attributes:
      schedule: The process over the steps that are visited, first to noisiest.
      kind: "ancestral" (Ho et al., 2020, with the learned variance; noise at every step but the
        last), "ddim" (Song et al., 2021, eta = 0) or "dpm" (DPM-Solver++(2M), Lu et al., 2022,
        "DPM-Solver++", algorithm 2: second order at the same cost).
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

        def body(carry, inputs):
            (x, x0_before), (i, t, step_noise) = carry, inputs
            return self._step(denoise(x, t), x, x0_before, i, step_noise), None

        order = np.arange(self.num_evaluations)[::-1].copy()
        times = jnp.asarray(self.schedule.timesteps[order], jnp.int32)
        carry = (x, jnp.zeros_like(x) if self.kind == "dpm" else None)
        (x, _), _ = jax.lax.scan(body, carry, (jnp.asarray(order), times, noise))
        return x

    def _step(
        self,
        output: Float[Array, "... two_c"],
        x: Float[Array, "... c"],
        x0_before: Float[Array, "... c"] | None,
        i: Int[Array, ""],
        noise: Float[Array, "... c"],
    ) -> tuple[Float[Array, "... c"], Float[Array, "... c"] | None]:
        """The next x, and the prediction of x_0 for the step after it, if the kind needs it."""
        predicted, v = jnp.split(output.astype(jnp.float32), 2, axis=-1)
        x0 = gaussian.predict_x0(x, i, predicted, schedule=self.schedule)
        if self.clip is not None:
            x0 = jnp.clip(x0, -self.clip, self.clip)
        if self.kind == "ancestral":
            mean = gaussian.posterior_mean(x0, x, i, schedule=self.schedule)
            std = jnp.exp(0.5 * gaussian.log_variance(v, i, schedule=self.schedule))
            return mean + jnp.where(i > 0, self.temperature, 0.0) * std * noise, None
        if x0_before is not None:  # dpm
            of_x, of_x0, of_x0_before = dpm_coefficients(self.schedule)
            line = gaussian.lookup(of_x0, i) * x0 + gaussian.lookup(of_x0_before, i) * x0_before
            return gaussian.lookup(of_x, i) * x + line, x0
        # DDIM re-derives the noise, so that a clipped x_0 stays on the path.
        kept = self.schedule.alphas_cumprod
        seen = (x - gaussian.lookup(np.sqrt(kept), i) * x0) / gaussian.lookup(
            np.sqrt(1.0 - kept), i
        )
        kept_prev = self.schedule.alphas_cumprod_prev
        x = (
            gaussian.lookup(np.sqrt(kept_prev), i) * x0
            + gaussian.lookup(np.sqrt(1.0 - kept_prev), i) * seen
        )
        return x, None


def dpm_coefficients(
    schedule: schedule_lib.Schedule,
) -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, " steps"], Float[np.ndarray, " steps"]]:
    """What DPM-Solver++(2M) multiplies x, its x_0 and the x_0 of the step before with, by index.

    The step draws a line through the two predictions over half the log of signal to noise. The
    first step has no prediction before it and the last goes to infinity there: both are first
    order, which is DDIM's step.

    Source: Lu et al. (2022), "DPM-Solver++", algorithm 2, in float64.
    """
    kept, kept_next = schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    of_x = np.sqrt((1.0 - kept_next) / (1.0 - kept))
    gain = np.sqrt(kept_next) - np.sqrt(kept) * of_x
    gaps = -np.diff(np.log(kept) - np.log1p(-kept))  # gaps[j]: from step j + 1 to step j
    slope = np.zeros_like(kept)
    slope[1:-1] = gaps[:-1] / (2.0 * gaps[1:])
    return of_x, gain * (1.0 + slope), -gain * slope
