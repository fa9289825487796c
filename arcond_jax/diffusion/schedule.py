"""Tables of the noising process: MAR's cosine schedule and the subsets of steps sampling visits."""

import dataclasses
import math

import numpy as np
from jaxtyping import Int

SPACINGS = ("even", "leading", "trailing", "log_snr")


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


def spaced_timesteps(
    schedule: Schedule, num_kept: int, *, spacing: str, start: float = 1.0
) -> Int[np.ndarray, " steps"]:
    """The steps a sampling chain visits, ascending; `Schedule.respace` makes a process of them.

    Args:
      spacing: "even" (MAR's), "leading" (MAR's "ddimN"), "trailing" or "log_snr".
      start: Share of the process to begin at, in (0, 1]; 1.0 is pure noise. Below 1.0 for
        "trailing" and "log_snr" only.

    Raises:
      ValueError: a spacing that does not exist, or steps or a start that do not fit it.
    """
    num_timesteps = len(schedule.betas)
    if spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r} is not one of {', '.join(SPACINGS)}")
    if not 0.0 < start <= 1.0:
        raise ValueError(f"start {start} is a share of the process: use a number in (0, 1]")
    if spacing == "trailing":
        return trailing_timesteps(num_timesteps, num_kept, start=start)
    if spacing == "log_snr":
        return log_snr_timesteps(schedule, num_kept, start=start)
    if start != 1.0:
        raise ValueError(f"start {start} needs spacing trailing or log_snr: {spacing} has its own")
    return {"even": even_timesteps, "leading": leading_timesteps}[spacing](num_timesteps, num_kept)


def even_timesteps(num_timesteps: int, *section_counts: int) -> Int[np.ndarray, " steps"]:
    """Steps from the first to the last, as MAR spaces its 100 sampling steps.

    Args:
      section_counts: Steps to keep. Several numbers cut the process into as many sections of
        equal size, the first ones a step longer if need be, each spaced on its own.

    Raises:
      ValueError: more steps asked for than there are.

    Source: MAR, diffusion/respace.py, `space_timesteps`: an accumulated float, half to even.
    """
    kept, first = [], 0
    for i, num_kept in enumerate(section_counts):
        size = (num_timesteps + len(section_counts) - 1 - i) // len(section_counts)
        _require(num_kept, size)
        stride = 1.0 if num_kept == 1 else (size - 1) / (num_kept - 1)
        position = 0.0
        for _ in range(num_kept):
            kept.append(first + round(position))
            position += stride
        first += size
    return np.array(kept)


def leading_timesteps(num_timesteps: int, num_kept: int) -> Int[np.ndarray, " steps"]:
    """Every k-th step from step 0 on, for the smallest k that leaves `num_kept` steps.

    Raises:
      ValueError: no k does.

    Source: MAR, diffusion/respace.py, `space_timesteps` of "ddimN"; one step is allowed here.
    """
    _require(num_kept, num_timesteps)
    kept = np.arange(0, num_timesteps, -(-num_timesteps // num_kept))
    if len(kept) != num_kept:
        raise ValueError(
            f"no whole stride takes {num_kept} of {num_timesteps} steps: take {len(kept)}"
        )
    return kept


def trailing_timesteps(
    num_timesteps: int, num_kept: int, *, start: float = 1.0
) -> Int[np.ndarray, " steps"]:
    """`num_kept` steps ending at the noisiest one; better than even spacing when they are few.

    Args:
      start: Share of the process to begin at, in (0, 1]; 1.0 is pure noise.

    Raises:
      ValueError: more steps asked for than there are below `start`.

    Source: Lin et al. (2024), "Common Diffusion Noise Schedules and Sample Steps are Flawed".
    """
    last = num_timesteps * start
    _require(num_kept, int(last))
    return np.array([round(last * (i + 1) / num_kept) - 1 for i in range(num_kept)])


def log_snr_timesteps(
    schedule: Schedule, num_kept: int, *, start: float = 1.0
) -> Int[np.ndarray, " steps"]:
    """Steps from step 0 to the noisiest one, uniform in the logarithm of signal to noise.

    Where the process is too coarse for that, the nearest steps that are still free. A single step
    is the noisiest.

    Args:
      start: Share of the process to begin at, in (0, 1]. A whole cosine process ends in a leap of
        that logarithm which takes steps from the rest; the official code starts it at 0.9946.

    Raises:
      ValueError: more steps asked for than there are below `start`.

    Source: Lu et al. (2022), "DPM-Solver"; dpm_solver_pytorch.py, `get_time_steps` with "logSNR".
    """
    last = round(len(schedule.betas) * start)
    _require(num_kept, last)
    kept = schedule.alphas_cumprod[:last]
    log_nsr = np.log1p(-kept) - np.log(kept)  # rises with the step, as interpolation wants it
    wanted = np.linspace(log_nsr[-1], log_nsr[0], num_kept)[::-1]
    timesteps = np.round(np.interp(wanted, log_nsr, np.arange(last))).astype(int)
    # Unique: first pushed up where they collide, then back below the last.
    rank = np.arange(num_kept)
    timesteps = np.maximum.accumulate(timesteps - rank) + rank
    return np.minimum(timesteps, last - num_kept + rank)


def _require(num_kept: int, available: int) -> None:
    if not 1 <= num_kept <= available:
        raise ValueError(
            f"{num_kept} sampling steps out of the {available} of the process there: take fewer"
        )
