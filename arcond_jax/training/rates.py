"""How fast a run goes and what it takes of its devices, as its log says."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from arcond_jax import types
from arcond_jax.training import state as state_lib

# Products of bfloat16 that one device of jax can do, in 10^12 operations a second, dense: Google
# Cloud's pages of TPU versions (a device of a tpu7x is half a chip) and NVIDIA's data sheets.
# Names are what `jax.Device.device_kind` begins with; the first that fits is taken.
PEAKS = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v6": 918.0,
    "TPU7x": 1153.5,
    "TPU v7": 1153.5,
    "NVIDIA A100": 312.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100": 989.4,
    "NVIDIA H200": 989.4,
    "NVIDIA B200": 2250.0,
}


NAMES = (  # of what a line says of the machine, not of the model
    "steps_per_second",
    "images_per_second",
    "data_wait_share",
    "device_teraflops",
    "mfu",
    "memory_gib",
    "peak_memory_gib",
)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step does.

    Attributes:
      images: Of a batch, over all devices.
      operations: Gives those of a device, of matrix products of the model and its gradient, each
        once even if it is done again to save memory; None where they depend on data.
    """

    images: int
    operations: Callable[[state_lib.TrainState, types.Batch], float | None]


class Rates:
    """Of the steps since the last line.

    `next_of` takes a batch and counts the time that it was waited for.
    """

    def __init__(self, work: Work) -> None:
        self._work, self._operations, self._counted = work, None, False
        self._reset()

    def _reset(self) -> None:
        self._start, self._count, self._waited = time.perf_counter(), 0, 0.0

    def next_of(self, iterator: Any) -> types.Batch:
        start = time.perf_counter()
        batch = next(iterator)
        self._waited += time.perf_counter() - start
        self._count += 1
        return batch

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """The time of the block is none of training."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read_and_reset(self, state: state_lib.TrainState, batch: types.Batch) -> dict[str, float]:
        """Steps, images and operations a second, and more where the device says it.

        `mfu` is the share of `PEAKS` that the operations are (Chowdhery et al., 2022, appendix B,
        without their formula: the products are counted). Memory is that of the fullest device
        of this process.
        """
        seconds = time.perf_counter() - self._start
        steps_per_second = self._count / seconds
        rates = {
            "steps_per_second": steps_per_second,
            "images_per_second": steps_per_second * self._work.images,
            "data_wait_share": self._waited / seconds,
        }
        if not self._counted:
            self._operations, self._counted = self._work.operations(state, batch), True
        if self._operations is not None:
            rates["device_teraflops"] = self._operations * steps_per_second / 1e12
            limit = peak(jax.local_devices()[0].device_kind)
            if limit is not None:
                rates["mfu"] = rates["device_teraflops"] / limit
        self._reset()
        return rates | _memory()


def peak(device_kind: str) -> float | None:
    """Of `PEAKS`; None for a device that it does not know."""
    return next((x for name, x in PEAKS.items() if device_kind.startswith(name)), None)


def _memory() -> dict[str, float]:
    """GiB in use, and the most there were; empty where the device does not say (a CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    named = {"memory_gib": "bytes_in_use", "peak_memory_gib": "peak_bytes_in_use"}
    return {
        name: max(x[key] for x in stats) / 2**30
        for name, key in named.items()
        if all(key in x for x in stats)
    }
