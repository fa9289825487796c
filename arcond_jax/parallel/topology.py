"""Devices by the name of where a program is to run, most of them of machines that are not here.

Compiling for a TPU needs its compiler, which comes with libtpu, and no TPU.
"""

import contextlib
import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

# Chips and their layout, by what Google Cloud and libtpu call a generation. Memory is what the
# compiler gives a program on a device: it says so when a program takes more.


@dataclasses.dataclass(frozen=True)
class Generation:
    """One kind of TPU.

    Attributes:
      shapes: Layouts of chips that can be had, from small to large.
      memory: GiB of a device.
      cores: Of a chip, as the names of accelerator types count them: v5p-32 has 16 chips.
    """

    shapes: tuple[str, ...]
    memory: float
    cores: int = 1


FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
GENERATIONS = {
    "v4": Generation(DEEP, 15.25, cores=2),
    "v5e": Generation(FLAT, 15.75),
    "v5p": Generation(DEEP, 95.74, cores=2),
    "v6e": Generation(FLAT, 31.25),
    "tpu7x": Generation(DEEP, 94.75, cores=2),
}
ALIASES = {"v5litepod": "v5e"}
HERE = ("cpu", "gpu")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Where a program is to run.

    Attributes:
      name: As libtpu writes it, "v5e:4x4", or the platform of devices that are here.
      devices: All of them, in no particular order.
      memory: Bytes that a program may take on each; None where nobody says.
      slices: That they are in.
    """

    name: str
    devices: Sequence[Any]
    memory: int | None
    slices: int = 1


class TopologyError(ValueError):
    """A name that is none, or devices that cannot be had; the message is one line."""


def canonical(name: str) -> str:
    """libtpu's name, "v5e:4x4", of any spelling: also "v5e-16" and "v5litepod-16".

    Raises:
      TopologyError: There is no such generation, layout or number.
    """
    match = re.fullmatch(r"(\w+?)(?::([\dx]+)|-(\d+))?", name.strip().lower())
    generation = ALIASES.get(match[1], match[1]) if match else None
    if match is None or generation not in GENERATIONS:
        raise TopologyError(f"topology {name!r} is none of {_names()}")
    if not (match[2] or match[3]):
        raise TopologyError(
            f"topology {name!r} has no size: {name}:{GENERATIONS[generation].shapes[0]}"
        )
    kind = GENERATIONS[generation]
    if match[3]:
        fitting = [x for x in kind.shapes if num_chips(x) * kind.cores == int(match[3])]
    else:
        fitting = [x for x in kind.shapes if x == match[2]]
    if not fitting:
        counts = ", ".join(f"{num_chips(x) * kind.cores}" for x in kind.shapes)
        raise TopologyError(
            f"topology {name!r}: {generation} has the layouts {', '.join(kind.shapes)}, which are "
            f"{generation}-N with N = {counts}"
        )
    return f"{generation}:{fitting[0]}"


def num_chips(shape: str) -> int:
    """Of a layout, "4x4"."""
    return math.prod(int(x) for x in shape.split("x"))


def named(name: str, *, slices: int = 1) -> Topology:
    """The devices of a topology; "cpu" and "gpu" are those of this machine.

    Args:
      slices: TPU slices of that topology, connected by a slower network.

    Raises:
      TopologyError: An unknown name; no such devices here; no libtpu.
    """
    name = name.strip().lower()
    if name in HERE:
        if slices > 1:
            raise TopologyError(f"topology {name!r} is this machine, which has no slices")
        try:
            return Topology(name, jax.devices(name), None)
        except RuntimeError:
            raise TopologyError(f"topology {name!r}: this machine has no {name} for jax") from None
    name = canonical(name)
    # It is compiled for, not run: another process may do so too, and nobody is asked for a TPU.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        with _quiet():
            made = topologies.get_topology_desc(name, "tpu", num_slices=slices)
    except Exception as error:  # of the plugin: no type of its own
        why = str(error).splitlines()[0]
        if "not installed" in why:
            why = "needs the TPU's compiler: pip install 'arcond_jax[tpu]'"
        raise TopologyError(f"topology {name!r}: {why}") from None
    memory = GENERATIONS[name.partition(":")[0]].memory
    return Topology(name, made.devices, int(memory * 2**30), slices)


@contextlib.contextmanager
def _quiet():
    """Without what libtpu prints of a machine that is none of Google's."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _names() -> str:
    tpus = (f"{name}:{kind.shapes[0]} ... {kind.shapes[-1]}" for name, kind in GENERATIONS.items())
    return ", ".join([*tpus, *HERE])
