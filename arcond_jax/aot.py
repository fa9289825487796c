"""Ahead of time: what a step of a config takes of a machine that need not be here.

A program is compiled for the devices of a topology and never run. Its memory, what devices send
each other and how much they compute are read from it; how long it would take is not, since what a
compiler estimates is no measurement.
"""

import collections
import dataclasses
import functools
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import Mesh

from arcond_jax import build, types
from arcond_jax.nn import attention, kernels
from arcond_jax.parallel import collectives as collectives_lib
from arcond_jax.parallel import compiled, memory, operations
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.parallel import topology as topology_lib
from arcond_jax.run import drawing, refinement, restoring
from arcond_jax.training import state as state_lib

WHAT = ("train", "sample", "calibrate")
# What the compiler says of a program that takes too much.
_TOO_MUCH = re.compile(
    r"\(?([\d.]+)([KMGT])\)? (?:of [\d.]+[KMGT] hbm|exceeds available HBM)", re.IGNORECASE
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Report:
    """A program that was compiled, or that the compiler gave up because it takes too much.

    Attributes:
      what: Of `WHAT`.
      mesh: Devices along each of its axes.
      slices: That the devices are in; `data` alone goes over their border.
      batch_size: Images of a step, over all devices.
      num_accumulations: Pieces of that batch, one after another.
      remat: What a backward pass computes again.
      parts: Bytes of a device that lie there all the time.
      temporary: Bytes of a device beside them while the program runs.
      limit: Bytes of a device there are.
      fits: Whether the compiler could lay the program out.
      operations: Multiplications and additions of matrix products on a device, those that are
        done again included; None where they depend on data.
      attention: Of each kind in `nn.kernels.KINDS` that the program has, the numbers of queries
        and of keys.
      collectives: Of one step; None if the program does not fit, which is known before them.
      compile_seconds: Until the compiler was done or gave up.
    """

    config: str
    topology: str
    what: str
    mesh: dict[str, int]
    slices: int
    batch_size: int
    num_accumulations: int
    remat: str
    parts: dict[str, int]
    temporary: int
    limit: int
    fits: bool
    operations: float | None
    attention: dict[str, list[tuple[int, int]]]
    collectives: list[collectives_lib.Collective] | None
    compile_seconds: float

    @property
    def total(self) -> int:
        """Bytes of a device."""
        return sum(self.parts.values()) + self.temporary

    @property
    def spare(self) -> float:
        """Share of a device's memory that stays free; negative if more is wanted than there is."""
        return 1.0 - self.total / self.limit

    @property
    def largest(self) -> collectives_lib.Collective | None:
        """The collective that moves most at a time."""
        return max(self.collectives or (), key=lambda x: x.bytes, default=None)


def compile_for(
    config: build.Config, topology: topology_lib.Topology, *, what: str = "train"
) -> Report:
    """Compiles a step of a config for a topology.

    Args:
      what: "train": the update of `arcond train`. "sample": the loop that draws the tokens of
        `data.batch_size` images, with the config's refinement. "calibrate": the same with the
        refinement fitted at each slot, for as many images as that takes.

    Raises:
      build.ConfigError: The mesh or the batch does not go with so many devices, or there is
        nothing to calibrate.
    """
    mesh = (build.training_mesh if what == "train" else build.mesh)(config, topology.devices)
    program = _PROGRAMS[what](config, mesh)
    start = time.perf_counter()
    traced = program.compiled.trace(*program.args)
    temporary, fits, found, limit = 0, True, None, topology.memory or memory.of_device(mesh)
    try:
        made = traced.lower().compile()
        sizes: Any = made.memory_analysis()
        temporary = sizes.temp_size_in_bytes
        temporary += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        found = collectives_lib.of_program(made.as_text() or "", mesh)
    except jax.errors.JaxRuntimeError as error:
        wanted = _TOO_MUCH.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or wanted is None:
            raise
        temporary, fits = int(float(wanted[1]) * _UNITS[wanted[2]]), False
    count = operations.count(traced.jaxpr)
    return Report(
        config=config.name,
        topology=topology.name,
        what=what,
        mesh=dict(mesh.shape),
        slices=topology.slices,
        batch_size=program.num_rows,
        num_accumulations=config.training.num_accumulations if what == "train" else 1,
        remat=config.model.get("remat", "none"),
        parts=program.parts,
        temporary=temporary,
        limit=limit,
        fits=fits and sum(program.parts.values()) + temporary <= limit,
        operations=None if count is None else count / program.num_shares,
        attention=_attention(traced.jaxpr),
        collectives=found,
        compile_seconds=time.perf_counter() - start,
    )


def _attention(program: core.ClosedJaxpr) -> dict[str, list[tuple[int, int]]]:
    found = collections.defaultdict(set)
    for equation in operations.equations(program.jaxpr):
        for kind, *sizes in attention.SCOPE.findall(str(equation.source_info.name_stack)):
            found[kind].add(tuple(map(int, sizes)))
    return {kind: sorted(found[kind]) for kind in kernels.KINDS if kind in found}


def search(
    config: build.Config, topology: topology_lib.Topology, *, what: str = "train"
) -> Iterator[Report]:
    """Reports of one change after another, of which the last fits or nothing is left to change.

    Parameters are cut over more devices, then blocks are computed again in the backward pass, then
    the batch is taken in pieces: in the order of what they cost. Sampling has fewer rows at once.
    """
    settings: dict[str, Any] = {}
    while True:
        report = compile_for(build.changed(config, settings), topology, what=what)
        yield report
        change = None if report.fits else _change(report, config)
        if change is None:
            return
        settings |= change


def left_to_change(report: Report, config: build.Config) -> bool:
    """Whether `search` would go on from a report."""
    return not report.fits and _change(report, config) is not None


def _change(report: Report, config: build.Config) -> dict[str, Any] | None:
    """What to change next of a program that takes too much; None when there is nothing left."""
    excess = report.total / report.limit
    fsdp = report.mesh["fsdp"]
    of_slice = math.prod(report.mesh.values()) // report.slices
    wanted = next((x for x in (16, 8, 4, 2) if of_slice % (x * report.mesh["tensor"]) == 0), 1)
    if fsdp < wanted:
        return {"mesh.fsdp": wanted, "mesh.data": None}
    shards = report.mesh["data"] * fsdp
    if report.what == "train":
        if report.remat == "none" and "remat" in config.model:
            return {"model.remat": "full"}
        rows = report.batch_size // shards // report.num_accumulations
        if rows == 1:
            return None
        factor = min(rows, 2 ** max(1, math.ceil(math.log2(excess))))
        while rows % factor:
            factor -= 1
        return {"training.num_accumulations": report.num_accumulations * factor}
    if report.what == "sample" and report.batch_size > shards:
        fewer = max(1, int(report.batch_size / shards / max(2.0, excess)))
        return {"data.batch_size": fewer * shards}
    return None


@dataclasses.dataclass(frozen=True)
class _Program:
    compiled: compiled.Compiled
    args: tuple[Any, ...]
    parts: dict[str, int]
    num_rows: int
    num_shares: int  # of the operations: a device does one


def _train(config: build.Config, mesh: Mesh) -> _Program:
    state = state_lib.abstract_on(build.abstract_state(config), mesh)
    tokenizer = _whole(build.abstract_tokenizer(config), mesh)
    batch = _rows(abstract_batch(config), mesh)
    parts = {
        "parameters": _bytes(state.params),
        "average": _bytes(state.ema),
        "optimizer": _bytes(state.opt_state),
        "tokenizer": _bytes(tokenizer),
        "batch": _bytes(batch),
    }
    step = build.train_step(config, mesh, _zeros(tokenizer))
    return _Program(step, (state, tokenizer, batch), parts, config.data.batch_size, mesh.size)


def _sample(config: build.Config, mesh: Mesh) -> _Program:
    refiner = refinement.abstract_refiner(config)
    label = jax.ShapeDtypeStruct((config.data.batch_size,), jnp.int32)
    try:
        jax.eval_shape(lambda refiner, label: refiner.init(label), refiner, label)
    except ValueError as error:
        raise build.ConfigError(f"data.batch_size {config.data.batch_size}: {error}") from None
    return _drawn(config, mesh, refiner, config.data.batch_size)


def _calibrate(config: build.Config, mesh: Mesh) -> _Program:
    if config.transport.kind in ("none", "in_batch"):
        raise build.ConfigError(
            f"transport.kind {config.transport.kind} fits nothing: there is nothing to calibrate"
        )
    calibrator, label = refinement.abstract_calibrator(config)
    return _drawn(config, mesh, calibrator, len(label))


def _drawn(config: build.Config, mesh: Mesh, refiner: Any, num_rows: int) -> _Program:
    trained, refiner = _trained(config, mesh), _whole(refiner, mesh)
    drawer = drawing.Drawer(trained)
    prompt = jax.eval_shape(lambda: build.network(config).no_prompt(num_rows))
    parts = {
        "parameters": _bytes(trained.params),
        "tokenizer": _bytes(trained.tokenizer),
        "refiner": _bytes(refiner),
    }
    even = num_rows == mesh_lib.spread_over(mesh, num_rows)
    num_copies = 1 if even else mesh_lib.num_batch_shards(mesh)  # each draws them all
    prompt = _rows(prompt, mesh) if even else _whole(prompt, mesh)
    rng = _whole(jax.eval_shape(lambda: jax.random.key(0)), mesh)
    args = (trained.params, trained.tokenizer, refiner, rng, prompt, 0, None)
    return _Program(drawer.program, args, parts, num_rows, mesh.size // num_copies)


_PROGRAMS: dict[str, Callable[[build.Config, Mesh], _Program]] = {
    "train": _train,
    "sample": _sample,
    "calibrate": _calibrate,
}


def _trained(config: build.Config, mesh: Mesh) -> restoring.Trained:
    """The shapes of a trained model."""
    params = state_lib.abstract_on(build.abstract_params(config), mesh)
    tokenizer = _whole(build.abstract_tokenizer(config), mesh)
    bank = jax.eval_shape(functools.partial(build.empty_bank, config))
    return restoring.Trained(config, mesh, tokenizer, params, bank, 0, None)


def abstract_batch(config: build.Config) -> types.Batch:
    """Shapes of a batch as training puts it on the devices."""
    num_rows = config.data.batch_size
    prompt = jax.eval_shape(lambda: build.network(config).no_prompt(num_rows))
    image: Any = jax.ShapeDtypeStruct((num_rows, *build.image_shape(config)), jnp.uint8)
    if config.data.name != "cache":
        return types.Batch(image, prompt)
    as_float = jax.ShapeDtypeStruct(image.shape, jnp.float32)
    tokenizer = build.abstract_tokenizer(config)
    stored = jax.eval_shape(lambda made, image: made.store(image), tokenizer, as_float)
    narrow = {jnp.dtype(jnp.float32): jnp.float16, jnp.dtype(jnp.int32): jnp.uint16}
    stored = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, narrow[x.dtype]), stored)
    return types.Batch(None, prompt, stored)


def _whole(tree: Any, mesh: Mesh) -> Any:
    return mesh_lib.shapes_in(nn.unbox(tree), mesh_lib.replicated(mesh))


def _rows(tree: Any, mesh: Mesh) -> Any:
    return mesh_lib.shapes_in(tree, mesh_lib.batch_sharding(mesh))


def _zeros(tree: Any) -> Any:
    """Numbers in the place of shapes, which take no memory."""
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree)


def _bytes(tree: Any) -> int:
    """Of one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
