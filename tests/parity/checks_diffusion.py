"""Tables of the noise process, whole and respaced."""

import golden as golden_lib
import numpy as np

from arcond_jax.diffusion import schedule as schedule_lib

COSINE = schedule_lib.Schedule.cosine()
ROUNDING = 1e-12  # float64 on both sides, but sums and products of up to 1000 factors


def respaced(name: str) -> schedule_lib.Schedule:
    """The process MAR calls `name`: "" whole, "100", "10,10,20" by section, "ddim25" by stride."""
    if not name:
        return COSINE
    num_timesteps = len(COSINE.betas)
    if name.startswith("ddim"):
        kept = schedule_lib.leading_timesteps(num_timesteps, int(name.removeprefix("ddim")))
    else:
        kept = schedule_lib.even_timesteps(num_timesteps, *map(int, name.split(",")))
    return COSINE.respace(kept)


def tables(process: schedule_lib.Schedule) -> dict[str, np.ndarray]:
    """Everything the official process holds, by its official name."""
    kept = process.alphas_cumprod
    return {
        "betas": process.betas,
        "log_betas": np.log(process.betas),
        "timestep_map": process.timesteps,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": process.alphas_cumprod_prev,
        "alphas_cumprod_next": np.append(kept[1:], 0.0),
        "sqrt_alphas_cumprod": np.sqrt(kept),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - kept),
        "log_one_minus_alphas_cumprod": np.log(1.0 - kept),
        "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / kept),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / kept - 1.0),
        "posterior_variance": process.posterior_variance,
        "posterior_log_variance_clipped": process.posterior_log_variance,
        "posterior_mean_coef1": process.posterior_mean_of_x0,
        "posterior_mean_coef2": process.posterior_mean_of_xt,
    }


def check(golden: golden_lib.Golden) -> None:
    assert golden.config["noise_schedule"] == "cosine"
    ours = {
        f"{name.replace(',', '_') or 'full'}/{table}": value
        for name in golden.config["respacings"]
        for table, value in tables(respaced(name)).items()
    }
    assert ours.keys() == golden.outputs.keys()
    for name, expected in golden.outputs.items():
        np.testing.assert_allclose(ours[name], expected, rtol=ROUNDING, err_msg=name)


CHECKS = {"diffusion_tables": check}
