"""Refiners for the sampling loop: conditions in, conditions out, one slot at a time.

All keep the contract `arcond_jax.types.Refiner` and are pytrees, so they pass through jit as
arguments. `Stored` and `Pooled` hold maps fitted beforehand and treat every row on its own;
`InBatch` solves transport for the batch at hand, as "Condition Errors Refinement in Autoregressive
Image Generation with Diffusion Loss" (ICLR 2026) reads literally; `Calibrator` fits maps in one
rollout, slot by slot, because the conditions of a slot depend on how earlier slots were refined.
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
from arcond_jax.transport import bures, entropic, residual, sinkhorn
from arcond_jax.transport import inverse as inverse_lib
from arcond_jax.transport import options as options_lib

# "class": the group of a row is its label, and rows of the null class stay as they are.
# "shared": all rows are of group 0, whatever their label.
Grouping = Literal["class", "shared"]

# "stored": an entropic map for every group. "bures": means of every group and one normal map.
# "residual": means of every group and one entropic map of the rest, in few directions.
Fitted = Literal["stored", "bures", "residual"]

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
class Pooled:
    """Applies the one map of the slot, with the means of each row's group; rows do not mix.

    Attributes:
      maps: One map per slot, from `Calibrator.finish`.
      inverse: Operators of the term R, one per slot; needed if `options.inverse_weight` is not 0.
      options: The choices the maps were fitted with.
      grouping: What a group is.
    """

    maps: bures.GaussianMap | residual.ResidualMap
    inverse: inverse_lib.Inverse | None = None
    options: options_lib.RefineOptions = flax.struct.field(pytree_node=False, default=_OPTIONS)
    grouping: Grouping = flax.struct.field(pytree_node=False, default="class")

    def init(self, label: Int[Array, " b"]) -> types.RefinerState:
        """Carries the conditions of the slot before, if the term R is on."""
        width = self.maps.width
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
        pooled = jax.tree.map(lambda leaf: leaf[slot], self.maps)
        if isinstance(pooled, bures.GaussianMap):
            refined = bures.refine(cond, pooled, group=group, options=self.options)
        else:
            refined = residual.refine(cond, pooled, group=group, options=self.options)
        active = known & pooled.valid[group]
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


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Calibrator:
    """Fits maps while it refines: one rollout with it calibrates all slots.

    The batch must be class-major with as many rows for every group of the bank, in the order of the
    groups: 100 or more serve well, and a few are enough for "residual" with many groups. Calibrate
    for the temperature, guidance and number of steps that are used later, since the conditions
    depend on them.

    Attributes:
      bank: Reference conditions, a `residual.ResidualBank` for the kind "residual".
      inverse: Operators of the term R, one per slot; needed if `options.inverse_weight` is not 0.
      options: Static choices.
      grouping: What a group is; handed on to what `finish` gives.
      kind: Which maps.
    """

    bank: bank_lib.Bank | residual.ResidualBank
    inverse: inverse_lib.Inverse | None = None
    options: options_lib.RefineOptions = flax.struct.field(pytree_node=False, default=_OPTIONS)
    grouping: Grouping = flax.struct.field(pytree_node=False, default="class")
    kind: Fitted = flax.struct.field(pytree_node=False, default="stored")

    def init(self, label: Int[Array, " b"]) -> types.RefinerState:
        """Carries the maps of all slots, empty at first."""
        num_slots, num_groups = self.bank.count.shape
        num_rows = _rows_per_group(label.shape[0], num_groups)
        blocks = jax.ShapeDtypeStruct((num_groups, num_rows, self.bank.width), jnp.float32)
        shapes = jax.eval_shape(lambda rows: self._fit(rows, jnp.array(0)), blocks)
        maps = jax.tree.map(lambda x: jnp.zeros((num_slots, *x.shape), x.dtype), shapes)
        previous = _init_previous(
            label, self.bank.width, inverse=self.inverse, options=self.options
        )
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
        maps = self._fit(blocks, slot)
        num_groups, num_rows, _ = blocks.shape
        group = jnp.repeat(jnp.arange(num_groups), num_rows)
        if self.kind == "bures":
            refined = bures.refine(cond, maps, group=group, options=self.options)
        elif self.kind == "residual":
            refined = residual.refine(cond, maps, group=group, options=self.options, fitted_on=True)
        else:
            refine = functools.partial(entropic.refine_source, options=self.options)
            refined = jax.vmap(refine)(blocks, maps).reshape(cond.shape)
        refined, previous = _settle(
            cond, refined, state.previous, slot=slot, active=maps.valid[group], refiner=self
        )
        maps = jax.tree.map(lambda leaf, one: leaf.at[slot].set(one), state.maps, maps)
        return refined, CalibrationState(maps=maps, previous=previous)

    def finish(self, state: types.RefinerState) -> Stored | Pooled:
        """Turns the state after the last slot into a refiner for single rows."""
        make = Stored if self.kind == "stored" else Pooled
        return make(
            maps=state.maps, inverse=self.inverse, options=self.options, grouping=self.grouping
        )

    def _fit(self, blocks: Float[Array, "g n d"], slot: Int[Array, ""]) -> Any:
        """The maps of one slot."""
        bank = jax.tree.map(lambda leaf: leaf[slot], self.bank)
        if self.kind == "residual":
            return residual.fit(bank, blocks, options=self.options)
        if self.kind == "bures":
            return bures.fit(bank.atoms, blocks, count=bank.count, options=self.options)
        return jax.vmap(functools.partial(entropic.fit, options=self.options))(
            bank.atoms, blocks, count=bank.count, radius=bank_lib.radius(bank)
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
    refiner: Stored | Pooled | Calibrator,
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
