"""What latents are like, and what codes say of them, from what a tokenizer makes of images."""

import jax.numpy as jnp
import numpy as np

from arcond_jax import build
from arcond_jax.build import tokens
from arcond_jax.data import stored
from arcond_jax.tokenizers import kl
from arcond_jax.tokenizers import law as law_lib

MEASURED = 1024  # images, spread over the split, where not all are wanted
SUMMED = 512  # images whose sums are made at once: 260,000 latents of two views at 16x16


def spread(count: int, wanted: int) -> np.ndarray:
    """Indices spread over so many items; all, where there are no more than wanted."""
    wanted = min(count, wanted)
    return np.arange(wanted) * count // wanted


def of_cache(config: build.Config, cache: stored.Stored) -> dict[str, float]:
    """What the latents of a cache are like, from images spread over it; empty where it has none."""
    if not {"moments", "latents"} & cache.arrays.keys():
        return {}
    sums = Sums(config)
    for index in spread(len(cache), MEASURED):
        views = [cache.view(int(index), view) for view in range(cache.num_views)]
        sums.add({name: np.stack([view[name] for view in views]) for name in cache.arrays})
    return law_lib.statistics(sums.done())


class Sums:
    """The sums of latents and codes, over all views of the images whose rows are added.

    They are made of `SUMMED` rows at a time, whatever the size of batches, so that the same rows
    have the same sums to the last bit.
    """

    def __init__(self, config: build.Config) -> None:
        kind = tokens.kind_of(config)
        self._num_codes = build.num_codes(config) if "codes" in kind.gives else 1
        self._patch_size = tokens.part(config, "latents").tokenizer.patch_size
        no_latents = np.zeros((0, build.token_channels(config)))
        self.total = law_lib.sums(no_latents, num_codes=self._num_codes)
        self._rows: list[dict[str, np.ndarray]] = []

    def add(self, row: dict[str, np.ndarray]) -> None:
        """Takes what is stored of all views of an image."""
        self._rows.append(row)
        if len(self._rows) == SUMMED:
            self.done()

    def done(self) -> law_lib.Sums:
        """The sums of all rows so far."""
        if not self._rows:
            return self.total
        latents, variance = self._latents()
        codes = None
        if "codes" in self._rows[0]:
            codes = np.concatenate([row["codes"].reshape(-1) for row in self._rows])
        self.total += law_lib.sums(latents, codes, variance=variance, num_codes=self._num_codes)
        self._rows.clear()
        return self.total

    def _latents(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Latents in the order of codes and without a scale; of moments, mean and variance."""
        if "latents" in self._rows[0]:
            latents = np.concatenate([row["latents"] for row in self._rows])
            return latents.reshape(-1, latents.shape[-1]), None
        moments = np.concatenate([row["moments"] for row in self._rows]).astype(np.float32)
        mean, log_variance = np.split(moments, 2, axis=-1)
        variance = np.exp(np.clip(log_variance, *kl.LOG_VARIANCES))
        mean, variance = (
            np.asarray(kl.cut(jnp.asarray(x), self._patch_size)) for x in (mean, variance)
        )
        channels = mean.shape[-1]
        return mean.reshape(-1, channels), variance.reshape(-1, channels)
