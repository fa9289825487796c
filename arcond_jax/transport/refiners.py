"""Refiners for the sampling loop: conditions in, conditions out, one slot at a time.

All keep the contract `arcond_jax.types.Refiner` and are pytrees, so they pass through jit as
arguments. `Stored` and `Bures` hold maps fitted beforehand and treat every row on its own;
`InBatch` solves transport for the batch at hand, as "Condition Errors Refinement in Autoregressive
Image Generation with Diffusion Loss" (ICLR 2026) reads literally; `Calibrator` and
`BuresCalibrator` fit the maps in one rollout, slot by slot, because the conditions of a slot depend
on how the earlier slots were refined.
"""

import functools
from typing import Any, Literal, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from arcond_jax import types
from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import blocks as blocks_lib
from arcond_jax.transport import bures, entropic, sinkhorn
from arcond_jax.transport import inverse as inverse_lib
from arcond_jax.transport import options as options_lib

# "class": the group of a row is its label, and rows of the null class stay as they are.
# "shared": all rows are of group 0, whatever their label.
Grouping = Literal["class", "shared"]

_OPTIONS = options_lib.RefineOptions()


@flax.struct.dataclass
class Identity:
    """Leaves every condition as it is: plain sampling."""

    def init(self, label: Int[Array, " b"]) -> types.RefinerState:
        """Carries nothing."""
        del label
        return None

    def __call__(
        self,
        cond: Float[Array, "b d"],
        state: types.RefinerState,
        *,
        slot: Int[Array, ""],
        label: Int[Array, " b"],
    ) -> tuple[Float[Array, "b d"], types.RefinerState]:
        """Returns what it is given."""
        del slot, label
        return cond, state


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class StoredState:
    """What `Stored` carries from slot to slot.

    Attributes:
      blocks: Rows of each group side by side, so that they share one matrix product with its map;
        None if all rows are of one group.
      previous: Refined conditions of the slot before; None unless the term R is on.
    """

    blocks: blocks_lib.Blocks | None
    previous: Float[Array, "b d"] | None


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Stored:
    """Applies the entropic map of each row's slot and group; rows do not see each other.

    Attributes:
      maps: One map per slot and group, from `Calibrator.finish`.
      inverse: Operators of the term R, one per slot; needed if `options.inverse_weight` is not 0.
      options: The choices the maps were fitted with.
      grouping: What a group is.
    """

    maps: entropic.EntropicMap
    inverse: inverse_lib.Inverse | None = None
    options: options_lib.RefineOptions = flax.struct.field(pytree_node=False, default=_OPTIONS)
    grouping: Grouping = flax.struct.field(pytree_node=False, default="class")

    def init(self, label: Int[Array, " b"]) -> types.RefinerState:
        """Sorts the rows by group, once for all slots."""
        width, num_groups = self.maps.atoms.shape[-1], self.maps.valid.shape[1]
        blocks = None
        if self.grouping == "class":
            group, _ = _group_of(label, num_groups, self.grouping)
            blocks = blocks_lib.make(group, num_groups)
        previous = _init_previous(label, width, inverse=self.inverse, options=self.options)
        return StoredState(blocks=blocks, previous=previous)

    def __call__(
        self,
        cond: Float[Array, "b d"],
        state: types.RefinerState,
        *,
        slot: Int[Array, ""],
        label: Int[Array, " b"],
    ) -> tuple[Float[Array, "b d"], types.RefinerState]:
        """Refines the conditions of one slot."""
        group, known = _group_of(label, self.maps.valid.shape[1], self.grouping)
        maps = jax.tree.map(lambda leaf: leaf[slot], self.maps)
        refine = functools.partial(entropic.refine_rows, options=self.options)
        if state.blocks is None:
            refined = refine(cond, jax.tree.map(lambda leaf: leaf[0], maps))
        else:
            refined = blocks_lib.apply(refine, cond, maps, blocks=state.blocks)
        active = known & maps.valid[group]
        refined, previous = _settle(
            cond, refined, state.previous, slot=slot, active=active, refiner=self
        )
        return refined, state.replace(previous=previous)


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Bures:
    """Applies the Gaussian map of the slot; rows do not see each other.

    Attributes:
      maps: One map per slot, from `BuresCalibrator.finish`.
      inverse: Operators of the term R, one per slot; needed if `options.inverse_weight` is not 0.
      options: Static choices.
      grouping: What a group is.
    """

    maps: bures.GaussianMap
    inverse: inverse_lib.Inverse | None = None
    options: options_lib.RefineOptions = flax.struct.field(pytree_node=False, default=_OPTIONS)
    grouping: Grouping = flax.struct.field(pytree_node=False, default="class")

    def init(self, label: Int[Array, " b"]) -> types.RefinerState:
        """Carries the conditions of the slot before, if the term R is on."""
        width = self.maps.matrix.shape[-1]
        return _init_previous(label, width, inverse=self.inverse, options=self.options)

    def __call__(
        self,
        cond: Float[Array, "b d"],
        state: types.RefinerState,
        *,
        slot: Int[Array, ""],
        label: Int[Array, " b"],
    ) -> tuple[Float[Array, "b d"], types.RefinerState]:
        """Refines the conditions of one slot."""
        group, known = _group_of(label, self.maps.valid.shape[1], self.grouping)
        gaussian_map = jax.tree.map(lambda leaf: leaf[slot], self.maps)
        refined = bures.refine(cond, gaussian_map, group=group, options=self.options)
        active = known & gaussian_map.valid[group]
        return _settle(cond, refined, state, slot=slot, active=active, refiner=self)


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class WarmStart:
    """Solutions of the slot before, from which `InBatch` starts the next one.

    Attributes:
      target: Potentials batch to bank.
      h: Potential batch to batch; None without debiasing.
    """

    target: sinkhorn.Potentials
    h: Float[Array, "g n"] | None


@flax.struct.dataclass
class InBatch:
    """Solves transport between the batch and the bank inside the sampling loop.

    The literal reading of the paper (with `debias=False`), kept for comparison: samples depend on
    their batch, and a sharded batch communicates. The batch must be class-major with as many rows
    for every group of the bank, in the order of the groups. Potentials travel from slot to slot:
    a row keeps its prefix and an atom its image, so the last solution is a good start. Hence
    epsilon does not decay here, and `num_sinkhorn_iters` may be small (20).

    Attributes:
      bank: Reference conditions; one group means one problem for the whole batch.
      options: Static choices; the term R is not available here.
    """

    bank: bank_lib.Bank
    options: options_lib.RefineOptions = flax.struct.field(pytree_node=False, default=_OPTIONS)

    def init(self, label: Int[Array, " b"]) -> types.RefinerState:
        """Carries potentials, 0 at first."""
        _, num_groups, num_atoms, _ = self.bank.atoms.shape
        rows = jnp.zeros((num_groups, _rows_per_group(label.shape[0], num_groups)), jnp.float32)
        columns = jnp.zeros((num_groups, num_atoms), jnp.float32)
        target = sinkhorn.Potentials(f=rows, g=columns)
        return WarmStart(target=target, h=rows if self.options.debias else None)

    def __call__(
        self,
        cond: Float[Array, "b d"],
        state: types.RefinerState,
        *,
        slot: Int[Array, ""],
        label: Int[Array, " b"],
    ) -> tuple[Float[Array, "b d"], types.RefinerState]:
        """Refines the conditions of one slot together."""
        del label  # class-major: the place of a row tells its group
        blocks = _split(cond, self.bank.count.shape[1])
        refined, state = jax.vmap(functools.partial(_solve_batch, options=self.options))(
            blocks,
            state,
            atoms=self.bank.atoms[slot],
            count=self.bank.count[slot],
            radius=bank_lib.radius(self.bank)[slot],
        )
        return refined.reshape(cond.shape), state


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class CalibrationState:
    """What a calibrator has fitted so far.

    Attributes:
      maps: Maps of all slots; those of slots not yet decoded are 0 and not valid.
      previous: Refined conditions of the slot before; None unless the term R is on.
    """

    maps: Any
    previous: Float[Array, "b d"] | None


@flax.struct.dataclass
class Calibrator:
    """Fits entropic maps while it refines: one rollout with it calibrates all slots.

    The batch must be class-major with as many rows (100 or more serve well) for every group of the
    bank, in the order of the groups. Calibrate for the temperature, guidance and number of steps
    that are used later, since the conditions depend on them.

    Attributes:
      bank: Reference conditions.
      inverse: Operators of the term R, one per slot; needed if `options.inverse_weight` is not 0.
      options: Static choices.
      grouping: What a group is; handed on to `Stored`.
    """

    bank: bank_lib.Bank
    inverse: inverse_lib.Inverse | None = None
    options: options_lib.RefineOptions = flax.struct.field(pytree_node=False, default=_OPTIONS)
    grouping: Grouping = flax.struct.field(pytree_node=False, default="class")

    def init(self, label: Int[Array, " b"]) -> types.RefinerState:
        """Carries the maps of all slots, empty at first."""
        num_slots, num_groups, num_atoms, width = self.bank.atoms.shape
        num_rows = _rows_per_group(label.shape[0], num_groups)
        sizes = (num_slots, num_groups)
        debias = self.options.debias
        maps = entropic.EntropicMap(
            atoms=self.bank.atoms,
            g=jnp.zeros((*sizes, num_atoms), jnp.float32),
            source=jnp.zeros((*sizes, num_rows, width), jnp.float32) if debias else None,
            h=jnp.zeros((*sizes, num_rows), jnp.float32) if debias else None,
            epsilon=jnp.ones(sizes, jnp.float32),
            valid=jnp.zeros(sizes, bool),
        )
        previous = _init_previous(label, width, inverse=self.inverse, options=self.options)
        return CalibrationState(maps=maps, previous=previous)

    def __call__(
        self,
        cond: Float[Array, "b d"],
        state: types.RefinerState,
        *,
        slot: Int[Array, ""],
        label: Int[Array, " b"],
    ) -> tuple[Float[Array, "b d"], types.RefinerState]:
        """Fits the maps of one slot and refines with them, each row left out of its own map."""
        del label  # class-major: the place of a row tells its group
        blocks = _split(cond, self.bank.count.shape[1])
        maps = jax.vmap(functools.partial(entropic.fit, options=self.options))(
            self.bank.atoms[slot],
            blocks,
            count=self.bank.count[slot],
            radius=bank_lib.radius(self.bank)[slot],
        )
        refined = jax.vmap(functools.partial(entropic.refine_source, options=self.options))(
            blocks, maps
        ).reshape(cond.shape)
        active = jnp.repeat(maps.valid, blocks.shape[1])
        refined, previous = _settle(
            cond, refined, state.previous, slot=slot, active=active, refiner=self
        )
        return refined, CalibrationState(maps=_write(state.maps, slot, maps), previous=previous)

    def finish(self, state: types.RefinerState) -> Stored:
        """Turns the state after the last slot into a refiner for single rows."""
        return Stored(
            maps=state.maps, inverse=self.inverse, options=self.options, grouping=self.grouping
        )


@flax.struct.dataclass
class BuresCalibrator:
    """Fits Gaussian maps while it refines: one rollout with it calibrates all slots.

    The batch must be class-major, as for `Calibrator`.

    Attributes:
      bank: Reference conditions.
      inverse: Operators of the term R, one per slot; needed if `options.inverse_weight` is not 0.
      options: Static choices.
      grouping: What a group is; handed on to `Bures`.
    """

    bank: bank_lib.Bank
    inverse: inverse_lib.Inverse | None = None
    options: options_lib.RefineOptions = flax.struct.field(pytree_node=False, default=_OPTIONS)
    grouping: Grouping = flax.struct.field(pytree_node=False, default="class")
    # To jaxlib 0.10.2 trees are equal if only their class differs, and jit takes one for the other.
    kind: Literal["bures"] = flax.struct.field(pytree_node=False, default="bures")

    def init(self, label: Int[Array, " b"]) -> types.RefinerState:
        """Carries the maps of all slots, empty at first."""
        num_slots, num_groups, _, width = self.bank.atoms.shape
        means = jnp.zeros((num_slots, num_groups, width), jnp.float32)
        maps = bures.GaussianMap(
            source_mean=means,
            target_mean=means,
            matrix=jnp.zeros((num_slots, width, width), jnp.float32),
            valid=jnp.zeros((num_slots, num_groups), bool),
        )
        previous = _init_previous(label, width, inverse=self.inverse, options=self.options)
        return CalibrationState(maps=maps, previous=previous)

    def __call__(
        self,
        cond: Float[Array, "b d"],
        state: types.RefinerState,
        *,
        slot: Int[Array, ""],
        label: Int[Array, " b"],
    ) -> tuple[Float[Array, "b d"], types.RefinerState]:
        """Fits the map of one slot and refines with it."""
        del label  # class-major: the place of a row tells its group
        num_groups = self.bank.count.shape[1]
        blocks = _split(cond, num_groups)
        gaussian_map = bures.fit(
            self.bank.atoms[slot], blocks, count=self.bank.count[slot], options=self.options
        )
        group = jnp.repeat(jnp.arange(num_groups), blocks.shape[1])
        refined = bures.refine(cond, gaussian_map, group=group, options=self.options)
        refined, previous = _settle(
            cond, refined, state.previous, slot=slot, active=gaussian_map.valid[group], refiner=self
        )
        maps = _write(state.maps, slot, gaussian_map)
        return refined, CalibrationState(maps=maps, previous=previous)

    def finish(self, state: types.RefinerState) -> Bures:
        """Turns the state after the last slot into a refiner for single rows."""
        return Bures(
            maps=state.maps, inverse=self.inverse, options=self.options, grouping=self.grouping
        )


def _group_of(
    label: Int[Array, " b"], num_groups: int, grouping: Grouping
) -> tuple[Int[Array, " b"], Bool[Array, " b"]]:
    """Group of each row, and whether it has one at all (the null class has none)."""
    if grouping == "shared":
        return jnp.zeros_like(label), jnp.ones(label.shape, bool)
    return jnp.minimum(label, num_groups - 1), label < num_groups


def _rows_per_group(num_rows: int, num_groups: int) -> int:
    if num_rows % num_groups or num_rows < 2 * num_groups:
        raise ValueError(
            f"A batch of {num_rows} rows does not give each of {num_groups} groups the same number "
            f"of rows, at least 2; pass a class-major batch of n * {num_groups} rows."
        )
    return num_rows // num_groups


def _split(cond: Float[Array, "b d"], num_groups: int) -> Float[Array, "g n d"]:
    num_rows = _rows_per_group(cond.shape[0], num_groups)
    return cond.reshape(num_groups, num_rows, cond.shape[1])


def _write(maps: Any, slot: Int[Array, ""], new: Any) -> Any:
    return jax.tree.map(lambda leaf, one: leaf.at[slot].set(one), maps, new)


def _init_previous(
    label: Int[Array, " b"],
    width: int,
    *,
    inverse: inverse_lib.Inverse | None,
    options: options_lib.RefineOptions,
) -> Float[Array, "b d"] | None:
    if options.inverse_weight == 0.0:
        return None
    if inverse is None:
        raise ValueError(
            f"inverse_weight is {options.inverse_weight} but the refiner has no inverse; "
            "fit one with `fit_inverse` or set inverse_weight to 0."
        )
    return jnp.zeros((label.shape[0], width), jnp.float32)


def _settle(
    cond: Float[Array, "b d"],
    refined: Float[Array, "b d"],
    previous: Float[Array, "b d"] | None,
    *,
    slot: Int[Array, ""],
    active: Bool[Array, " b"],
    refiner: Stored | Bures | Calibrator | BuresCalibrator,
) -> tuple[Float[Array, "b d"], Float[Array, "b d"] | None]:
    """Adds the term R if it is on and gives rows that are not to be refined back as they came."""
    if previous is not None and refiner.options.step_size > 0.0:
        inverse = jax.tree.map(lambda leaf: leaf[slot], refiner.inverse)
        refined = inverse_lib.pull(refined, previous, inverse=inverse, options=refiner.options)
    refined = jnp.where(active[:, None], refined, cond)
    return refined, None if previous is None else refined.astype(jnp.float32)


def _solve_batch(
    cond: Float[Array, "n d"],
    warm: WarmStart,
    *,
    atoms: Float[Array, "m d"],
    count: Int[Array, ""],
    radius: Float[Array, ""],
    options: options_lib.RefineOptions,
) -> tuple[Float[Array, "n d"], WarmStart]:
    """Solves and applies transport for the rows of one group, from a warm start."""
    epsilon = entropic.entropy_weight(radius, options)
    target = sinkhorn.solve_target(
        sinkhorn.half_squared_distance(cond, atoms),
        epsilon=epsilon,
        weights=bank_lib.atom_weights(count, atoms.shape[0]),
        num_iters=options.num_sinkhorn_iters,
        init=warm.target,
    )
    h = None
    if options.debias:
        h = sinkhorn.solve_self(
            sinkhorn.exclude_self(sinkhorn.half_squared_distance(cond, cond)),
            epsilon=epsilon,
            num_iters=options.num_self_iters,
            init=warm.h,
        )
    batch_map = entropic.EntropicMap(
        atoms=atoms,
        g=target.g,
        source=cond.astype(jnp.float32) if options.debias else None,
        h=h,
        epsilon=epsilon,
        valid=count >= options.min_atoms,
    )
    refined = entropic.refine_source(cond, batch_map, options=options)
    return refined, WarmStart(target=target, h=h)
