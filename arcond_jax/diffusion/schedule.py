"""Tables of the noising process: MAR's cosine schedule and the subsets of steps sampling visits."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """Float64 tables of one process, indexed by step; cast to float32 where they meet a network.

    A sampling process that visits a subset of the steps is a Schedule too: `timesteps` maps its
    index to the time the network was trained with.

    Source: Nichol and Dhariwal (2021); MAR, diffusion/gaussian_diffusion.py and respace.py.
    """

    betas: np.ndarray
    timesteps: np.ndarray

    @classmethod
    def cosine(cls, num_timesteps: int = 1000) -> "Schedule":
        """The cosine schedule of Nichol and Dhariwal (2021), eq. 17, betas capped at 0.999."""

        def share_left(u: float) -> float:
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [
            min(1 - share_left((i + 1) / num_timesteps) / share_left(i / num_timesteps), 0.999)
            for i in range(num_timesteps)
        ]
        return cls(np.array(betas, np.float64), np.arange(num_timesteps))

    def respace(self, timesteps: np.ndarray) -> "Schedule":
        """The process that visits only `timesteps` (ascending), with the same marginals there."""
        kept = self.alphas_cumprod[timesteps]
        betas = 1.0 - kept / np.append(1.0, kept[:-1])
        return Schedule(betas, self.timesteps[timesteps])

    @property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1.0 - self.betas)

    @property
    def alphas_cumprod_prev(self) -> np.ndarray:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def posterior_variance(self) -> np.ndarray:
        """Variance of q(x_{t-1} | x_t, x_0)."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @property
    def posterior_log_variance(self) -> np.ndarray:
        """Its logarithm; index 0, where the variance is zero, repeats index 1 (if there is one)."""
        variance = self.posterior_variance
        first = variance[1] if len(variance) > 1 else self.betas[0]
        return np.log(np.append(first, variance[1:]))

    @property
    def posterior_mean_of_x0(self) -> np.ndarray:
        """Coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @property
    def posterior_mean_of_xt(self) -> np.ndarray:
        """Coefficient of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        left = 1.0 - self.alphas_cumprod
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / left


def even_timesteps(num_timesteps: int, num_kept: int) -> np.ndarray:
    """`num_kept` steps from the first to the last, as MAR spaces its 100 sampling steps.

    Raises:
      ValueError: more steps asked for than there are.

    Source: MAR, diffusion/respace.py, `space_timesteps`: an accumulated float, half to even.
    """
    if not 1 <= num_kept <= num_timesteps:
        raise ValueError(f"{num_kept} sampling steps out of a process with {num_timesteps}")
    stride = 1.0 if num_kept == 1 else (num_timesteps - 1) / (num_kept - 1)
    kept, position = [], 0.0
    for _ in range(num_kept):
        kept.append(round(position))
        position += stride
    return np.array(kept)


def trailing_timesteps(num_timesteps: int, num_kept: int, *, start: float = 1.0) -> np.ndarray:
    """`num_kept` steps ending at the noisiest one; better than even spacing when they are few.

    Args:
      start: Share of the process to begin at, in (0, 1]; 1.0 is pure noise.

    Raises:
      ValueError: more steps asked for than there are below `start`.

    Source: Lin et al. (2024), "Common Diffusion Noise Schedules and Sample Steps are Flawed".
    """
    last = num_timesteps * start
    if not 1 <= num_kept <= last:
        raise ValueError(f"{num_kept} sampling steps out of a process with {int(last)}")
    return np.array([round(last * (i + 1) / num_kept) - 1 for i in range(num_kept)])
