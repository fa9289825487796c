"""Refiners for the sampling loop: conditions in, conditions out, one slot at a time.

All keep the contract `arcond_jax.types.Refiner` and are pytrees, so they pass through jit as
arguments. `Fitted` holds maps fitted beforehand and treats every row on its own; `InBatch` solves
transport for the batch at hand, as "Condition Errors Refinement in Autoregressive Image Generation
with Diffusion Loss" (ICLR 2026) reads literally; `Calibrator` fits maps in one rollout, slot by
slot, because the conditions of a slot depend on how earlier slots were refined.

What a map is, is a `Maps` of `entropic`, `bures` or `residual`.
"""

import functools
from typing import Any, Literal, Protocol, no_type_check, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from arcond_jax import types
from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import entropic, sinkhorn
from arcond_jax.transport import inverse as inverse_lib
from arcond_jax.transport import options as options_lib

# "class": the group of a row is its label, and rows of the null class stay as they are.
# "shared": all rows are of group 0, whatever their label.
Grouping = Literal["class", "shared"]

_OPTIONS = options_lib.RefineOptions()


@runtime_checkable  # annotations are checked at run time in the tests
class Maps(Protocol):
    """One way to map sampled conditions to real ones, for all groups of a slot at a time.

    Hashable, since it is static under jit. The maps themselves are a tree whose leaf `valid` [g]
    says which groups had enough to fit.
    """

    def fit(
        self, bank: Any, source: Float[Array, "g n d"], *, options: options_lib.RefineOptions
    ) -> Any:
        """Fits the maps of one slot, given its part of the bank and sampled conditions."""
        ...

    def arrange(self, group: Int[Array, " b"], num_groups: int) -> Any:
        """What `refine` wants to know of the rows, computed once for all slots."""
        ...

    def refine(
        self,
        cond: Float[Array, "b d"],
        maps: Any,
        arranged: Any,
        *,
        group: Int[Array, " b"],
        options: options_lib.RefineOptions,
    ) -> Float[Array, "b d"]:
        """Moves the conditions of one slot, each row on its own."""
        ...

    def refine_source(
        self, source: Float[Array, "g n d"], maps: Any, *, options: options_lib.RefineOptions
    ) -> Float[Array, "g n d"]:
        """Moves the conditions the maps were fitted on, leaving each out of its own map."""
        ...


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
class FittedState:
    """What `Fitted` carries from slot to slot.

    Attributes:
      arranged: The rows as its maps want them.
      previous: Refined conditions of the slot before; None unless the term R is on.
    """

    arranged: Any
    previous: Float[Array, "b d"] | None


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Fitted:
    """Applies the maps of each slot; rows do not see each other.

    Attributes:
      maps: Of all slots, from `Calibrator.finish`.
      inverse: Operators of the term R, one per slot; needed if `options.inverse_weight` is not 0.
      options: The choices the maps were fitted with.
      grouping: What a group is.
      kind: What the maps are.
    """

    maps: Any
    inverse: inverse_lib.Inverse | None = None
    options: options_lib.RefineOptions = flax.struct.field(pytree_node=False, default=_OPTIONS)
    grouping: Grouping = flax.struct.field(pytree_node=False, default="class")
    kind: Maps = flax.struct.field(pytree_node=False, default=entropic.PerGroup())

    def init(self, label: Int[Array, " b"]) -> types.RefinerState:
        """Arranges the rows, once for all slots."""
        num_groups, width = self.maps.valid.shape[1], self.maps.width
        group, _ = _group_of(label, num_groups, self.grouping)
        return FittedState(
            arranged=self.kind.arrange(group, num_groups),
            previous=_init_previous(label, width, inverse=self.inverse, options=self.options),
        )

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
        refined = self.kind.refine(cond, maps, state.arranged, group=group, options=self.options)
        refined, previous = _settle(
            cond,
            refined,
            state.previous,
            slot=slot,
            active=known & maps.valid[group],
            refiner=self,
        )
        return refined, state.replace(previous=previous)


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
    groups: 100 or more serve well, and a few are enough for residual maps with many groups.
    Calibrate for the temperature, guidance and number of steps that are used later, since the
    conditions depend on them.

    Attributes:
      bank: Reference conditions.
      inverse: Operators of the term R, one per slot; needed if `options.inverse_weight` is not 0.
      options: Static choices.
      grouping: What a group is; handed on to what `finish` gives.
      kind: What the maps are.
    """

    bank: Any
    inverse: inverse_lib.Inverse | None = None
    options: options_lib.RefineOptions = flax.struct.field(pytree_node=False, default=_OPTIONS)
    grouping: Grouping = flax.struct.field(pytree_node=False, default="class")
    kind: Maps = flax.struct.field(pytree_node=False, default=entropic.PerGroup())

    def init(self, label: Int[Array, " b"]) -> types.RefinerState:
        """Carries the maps of all slots, empty at first."""
        num_slots, num_groups = self.bank.count.shape
        num_rows = _rows_per_group(label.shape[0], num_groups)
        source = jax.ShapeDtypeStruct((num_groups, num_rows, self.bank.width), jnp.float32)
        shapes = jax.eval_shape(lambda source: self._fit(source, jnp.array(0)), source)
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
        source = _split(cond, self.bank.count.shape[1])
        maps = self._fit(source, slot)
        num_groups, num_rows, _ = source.shape
        group = jnp.repeat(jnp.arange(num_groups), num_rows)
        refined = self.kind.refine_source(source, maps, options=self.options).reshape(cond.shape)
        refined, previous = _settle(
            cond, refined, state.previous, slot=slot, active=maps.valid[group], refiner=self
        )
        maps = jax.tree.map(lambda leaf, one: leaf.at[slot].set(one), state.maps, maps)
        return refined, CalibrationState(maps=maps, previous=previous)

    def finish(self, state: types.RefinerState) -> Fitted:
        """Turns the state after the last slot into a refiner for single rows."""
        return Fitted(
            maps=state.maps,
            inverse=self.inverse,
            options=self.options,
            grouping=self.grouping,
            kind=self.kind,
        )

    def _fit(self, source: Float[Array, "g n d"], slot: Int[Array, ""]) -> Any:
        """The maps of one slot."""
        bank = jax.tree.map(lambda leaf: leaf[slot], self.bank)
        return self.kind.fit(bank, source, options=self.options)


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
    refiner: Fitted | Calibrator,
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
