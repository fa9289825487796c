"""The noise process around a denoiser with learned variance: noising, loss, reverse-step moments.

A denoiser returns 2c numbers for c channels: the noise it sees, then v, which places the log
variance between its two bounds. All in float32.

Source: Nichol and Dhariwal (2021); MAR (Li et al., 2024), diffusion/gaussian_diffusion.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from arcond_jax.diffusion import schedule as schedule_lib


def lookup(table: np.ndarray, t: Int[Array, "..."]) -> Float[Array, "... 1"]:
    """Entries of a float64 table at t, in float32, ready to multiply channels."""
    return jnp.asarray(table, jnp.float32)[t][..., None]


def q_sample(
    x0: Float[Array, "... c"],
    t: Int[Array, "..."],
    noise: Float[Array, "... c"],
    *,
    schedule: schedule_lib.Schedule,
) -> Float[Array, "... c"]:
    """x_t given x_0."""
    kept = schedule.alphas_cumprod
    return lookup(np.sqrt(kept), t) * x0 + lookup(np.sqrt(1.0 - kept), t) * noise


def predict_x0(
    x: Float[Array, "... c"],
    t: Int[Array, "..."],
    noise: Float[Array, "... c"],
    *,
    schedule: schedule_lib.Schedule,
) -> Float[Array, "... c"]:
    """x_0 given x_t and the noise in it."""
    kept = schedule.alphas_cumprod
    return lookup(np.sqrt(1.0 / kept), t) * x - lookup(np.sqrt(1.0 / kept - 1.0), t) * noise


def posterior_mean(
    x0: Float[Array, "... c"],
    x: Float[Array, "... c"],
    t: Int[Array, "..."],
    *,
    schedule: schedule_lib.Schedule,
) -> Float[Array, "... c"]:
    """Mean of q(x_{t-1} | x_t, x_0)."""
    return (
        lookup(schedule.posterior_mean_of_x0, t) * x0 + lookup(schedule.posterior_mean_of_xt, t) * x
    )


def log_variance(
    v: Float[Array, "... c"], t: Int[Array, "..."], *, schedule: schedule_lib.Schedule
) -> Float[Array, "... c"]:
    """Learned log variance: between the posterior's (v = -1) and log beta (v = 1), not clamped."""
    low = lookup(schedule.posterior_log_variance, t)
    high = lookup(np.log(schedule.betas), t)
    share = (v + 1.0) / 2.0
    return share * high + (1.0 - share) * low


def loss(
    output: Float[Array, "... two_c"],
    x0: Float[Array, "... c"],
    x: Float[Array, "... c"],
    t: Int[Array, "..."],
    noise: Float[Array, "... c"],
    *,
    schedule: schedule_lib.Schedule,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Mean squared error of the noise, and the variational term that trains the variance.

    The variational term is in bits per channel; its gradient reaches v only. At t = 0 it is the
    likelihood of a Gaussian discretised to 1/255.

    Source: MAR, diffusion/gaussian_diffusion.py, `training_losses` with LEARNED_RANGE and MSE.
    """
    output = output.astype(jnp.float32)
    predicted, v = jnp.split(output, 2, axis=-1)
    mse = jnp.mean((noise - predicted) ** 2, axis=-1)

    predicted_x0 = predict_x0(x, t, jax.lax.stop_gradient(predicted), schedule=schedule)
    mean = posterior_mean(predicted_x0, x, t, schedule=schedule)
    log_var = log_variance(v, t, schedule=schedule)
    true_mean = posterior_mean(x0, x, t, schedule=schedule)
    true_log_var = lookup(schedule.posterior_log_variance, t)
    kl = 0.5 * (
        log_var
        - true_log_var
        - 1.0
        + jnp.exp(true_log_var - log_var)
        + (true_mean - mean) ** 2 * jnp.exp(-log_var)
    )
    nll = -discretized_log_likelihood(x0, mean, 0.5 * log_var)
    vb = jnp.where(t == 0, jnp.mean(nll, axis=-1), jnp.mean(kl, axis=-1)) / math.log(2.0)
    return mse, vb


def discretized_log_likelihood(
    x: Float[Array, "... c"], mean: Float[Array, "... c"], log_std: Float[Array, "... c"]
) -> Float[Array, "... c"]:
    """log P of x's bin of half width 1/255 under a Gaussian; the bins beyond +-0.999 are open.

    Source: MAR, diffusion/diffusion_utils.py; the normal CDF is its tanh approximation.
    """

    def cdf(u: Array) -> Array:
        return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (u + 0.044715 * u**3)))

    centered, inverse_std = x - mean, jnp.exp(-log_std)
    above = cdf(inverse_std * (centered + 1.0 / 255.0))
    below = cdf(inverse_std * (centered - 1.0 / 255.0))
    tiny = 1e-12  # the official clamp

    def log(p: Array) -> Array:
        return jnp.log(jnp.maximum(p, tiny))

    return jnp.where(
        x < -0.999, log(above), jnp.where(x > 0.999, log(1.0 - below), log(above - below))
    )
