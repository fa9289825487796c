"""Refinement map for many classes: their means apart, one map for what is left, few directions.

A map per slot and class keeps its own reference conditions, which at 1,000 classes, 256 slots and
width 1,024 are terabytes. Here a condition is its class's mean and a residual; the residuals of all
classes share one bank and one entropic map, within the principal directions of the conditions of a
slot. What lies outside the directions is left as it is.

Comes in: conditions of real and of sampled prefixes with their classes. Goes out: a map
cond -> cond per slot. A departure from "Condition Errors Refinement in Autoregressive Image
Generation with Diffusion Loss" (ICLR 2026), which says nothing on the size of its statistics.
"""

import dataclasses
import functools
from typing import no_type_check

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import entropic
from arcond_jax.transport import options as options_lib

# Rows of a class at which its own drift of the mean counts as much as that of all classes: the
# mean of few rows is mostly noise.
PRIOR_ROWS = 10.0
IMAGES_PER_MEAN = 200  # of each class, read for the moments of a bank, at most


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Moments:
    """Running sums over conditions of real prefixes, taken from `origin` to stay exact in float32.

    Attributes:
      origin: Mean of the first batch.
      count: Conditions seen of each class.
      total: Sum of the conditions of each class.
      square: Sum of outer products over all classes.
    """

    origin: Float[Array, "s d"]
    count: Int[Array, " g"]
    total: Float[Array, "s g d"]
    square: Float[Array, "s d d"]


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class ResidualBank:
    """Reference conditions of all classes in the directions of each slot.

    Attributes:
      basis: Orthonormal directions of most variance within classes.
      mean: Mean of each class in the directions.
      atoms: Residuals of single conditions from the mean of their class.
      radius: Mean of |residual|^2 / 2.
      count: Conditions that the mean of each class was taken over; 0 while the bank is empty.
    """

    basis: Float[Array, "*s d k"]
    mean: Float[Array, "*s g k"]
    atoms: Float[Array, "*s m k"]
    radius: Float[Array, "*s"]
    count: Int[Array, "*s g"]

    @property
    def width(self) -> int:
        """Width of a condition."""
        return self.basis.shape[-2]

    def fill(
        self, read: bank_lib.Read, compiled: bank_lib.Compiled, *, num_classes: int
    ) -> "ResidualBank":
        """Means and directions from many images, a batch in memory at a time; then the atoms."""
        (_, num_groups), num_atoms = self.count.shape, self.atoms.shape[1]
        add_batch = compiled(functools.partial(add, num_groups=num_groups))
        moments = None
        for cond, label, valid in read(IMAGES_PER_MEAN * num_classes):
            group = np.where(valid, 0 if num_groups == 1 else label, num_groups)
            moments = add_batch(moments, cond, group=group)
        cond, label = bank_lib.collect(read(num_atoms))
        again = np.arange(num_atoms) % len(cond)  # where there are fewer images than atoms
        num_directions = self.basis.shape[2]
        make = compiled(functools.partial(make_bank, num_directions=num_directions))
        return make(moments, jnp.asarray(cond[again]), group=label[again] * (num_groups > 1))


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class ResidualMap:
    """Moves the mean of a class by `-step_size * shift` and residuals by an entropic map.

    Attributes:
      basis: Orthonormal directions.
      target_mean: Mean of the reference conditions of each class, in the directions.
      shift: Mean of the sampled conditions of each class beyond that.
      entropic: Map of residuals of all classes, in the directions.
      valid: False where a class had too little to fit; its conditions stay.
    """

    basis: Float[Array, "*s d k"]
    target_mean: Float[Array, "*s g k"]
    shift: Float[Array, "*s g k"]
    entropic: entropic.EntropicMap
    valid: Bool[Array, "*s g"]

    @property
    def width(self) -> int:
        """Width of a condition."""
        return self.basis.shape[-2]


def add(
    moments: Moments | None,
    cond: Float[Array, "b s d"],
    *,
    group: Int[Array, " b"],
    num_groups: int,
) -> Moments:
    """Adds a batch to the sums; rows whose group is not below `num_groups` do not count."""
    member = (group[:, None] == jnp.arange(num_groups)[None, :]).astype(jnp.float32)
    is_in = member.sum(axis=1)
    cond = cond.astype(jnp.float32)
    if moments is None:
        num_slots, width = cond.shape[1:]
        moments = Moments(
            origin=jnp.einsum("b,bsd->sd", is_in / jnp.maximum(is_in.sum(), 1.0), cond),
            count=jnp.zeros(num_groups, jnp.int32),
            total=jnp.zeros((num_slots, num_groups, width), jnp.float32),
            square=jnp.zeros((num_slots, width, width), jnp.float32),
        )
    centred = (cond - moments.origin) * is_in[:, None, None]
    total = jnp.einsum("bg,bsd->sgd", member, centred, precision="highest")
    square = jnp.einsum("bsd,bse->sde", centred, centred, precision="highest")
    return dataclasses.replace(
        moments,
        count=moments.count + member.sum(axis=0).astype(jnp.int32),
        total=moments.total + total,
        square=moments.square + square,
    )


def init_bank(
    num_slots: int, num_groups: int, *, num_atoms: int, num_directions: int, width: int
) -> ResidualBank:
    """Makes an empty bank.

    Raises:
      ValueError: There are more directions than the conditions are wide.
    """
    if num_directions > width:
        raise ValueError(f"num_directions {num_directions} is more than the {width} there are")
    return ResidualBank(
        basis=jnp.zeros((num_slots, width, num_directions), jnp.float32),
        mean=jnp.zeros((num_slots, num_groups, num_directions), jnp.float32),
        atoms=jnp.zeros((num_slots, num_atoms, num_directions), jnp.float32),
        radius=jnp.zeros(num_slots, jnp.float32),
        count=jnp.zeros((num_slots, num_groups), jnp.int32),
    )


def make_bank(
    moments: Moments, cond: Float[Array, "m s d"], *, group: Int[Array, " m"], num_directions: int
) -> ResidualBank:
    """A bank of the given conditions, with the means and directions of all that were summed.

    Args:
      moments: Sums over conditions of real prefixes.
      cond: Those whose residuals become the atoms.
      group: Their classes, in range.
      num_directions: Directions to keep of each slot, at most the width.
    """
    size = jnp.maximum(moments.count, 1).astype(jnp.float32)
    mean = moments.total / size[None, :, None]  # from the origin
    within = moments.square - jnp.einsum(
        "sgd,sge,g->sde", mean, mean, moments.count.astype(jnp.float32), precision="highest"
    )
    basis = jnp.linalg.eigh(within)[1][:, :, ::-1][:, :, :num_directions]
    class_mean = _project(mean + moments.origin[:, None, :], basis)
    atoms = _project(cond.swapaxes(0, 1), basis) - class_mean[:, group, :]
    return ResidualBank(
        basis=basis,
        mean=class_mean,
        atoms=atoms,
        radius=0.5 * (atoms**2).sum(axis=2).mean(axis=1),
        count=jnp.broadcast_to(moments.count, (len(basis), len(moments.count))),
    )


def fit(
    bank: ResidualBank, source: Float[Array, "g n d"], *, options: options_lib.RefineOptions
) -> ResidualMap:
    """Fits the map from sampled to reference conditions of one slot.

    Args:
      bank: The bank's part for this slot.
      source: Conditions of sampled prefixes of each class.
      options: Static choices.

    Returns:
      The map. How far the mean of a class has drifted is drawn towards the drift of all classes,
      the more the fewer rows there are (`PRIOR_ROWS`), so two rows of each class may do. The
      entropic map is fitted on as many residuals as there are atoms, taken evenly.
    """
    inside = _project(source, bank.basis)
    drift = inside.mean(axis=1) - bank.mean
    common = drift.mean(axis=0, keepdims=True)
    num_rows = source.shape[1]
    shift = common + num_rows / (num_rows + PRIOR_ROWS) * (drift - common)
    residuals = (inside - (bank.mean + shift)[:, None, :]).reshape(-1, inside.shape[2])
    num_atoms = bank.atoms.shape[0]
    return ResidualMap(
        basis=bank.basis,
        target_mean=bank.mean,
        shift=shift,
        entropic=entropic.fit(
            bank.atoms,
            residuals[:: _stride(len(residuals), num_atoms)],
            count=jnp.where(bank.count.sum() > 0, num_atoms, 0),
            radius=bank.radius,
            options=options,
        ),
        valid=bank.count >= options.min_atoms,
    )


def refine(
    cond: Float[Array, "b d"],
    residual_map: ResidualMap,
    *,
    group: Int[Array, " b"],
    options: options_lib.RefineOptions,
    fitted_on: bool = False,
) -> Float[Array, "b d"]:
    """Moves conditions of one slot towards their ideal law, each row on its own.

    Args:
      cond: Any float dtype, which is kept; the arithmetic is float32.
      residual_map: The map of this slot.
      group: Class of each row, in range.
      options: The choices the map was fitted with.
      fitted_on: These are the rows of `fit`, class by class: each is left out of its own map.

    Returns:
      Refined conditions; bit for bit the given ones where the map is not valid or tau is 0.
    """
    if options.step_size == 0.0:
        return cond
    shift = residual_map.shift[group]
    residual = _project(cond, residual_map.basis) - residual_map.target_mean[group] - shift
    moved = entropic.refine_rows(residual, residual_map.entropic, options=options)
    if fitted_on and options.debias:
        stride = _stride(len(residual), residual_map.entropic.atoms.shape[0])
        own = entropic.refine_source(residual[::stride], residual_map.entropic, options=options)
        moved = moved.at[::stride].set(own)
    move = moved - residual - options.step_size * shift
    start = cond.astype(jnp.float32)
    refined = start + jnp.matmul(move, residual_map.basis.T, precision="highest")
    return jnp.where(residual_map.valid[group][:, None], refined, start).astype(cond.dtype)


@dataclasses.dataclass(frozen=True)
class Residual:
    """Means of every group and one map of the rest; the `refiners.Maps` of the kind "residual"."""

    def fit(
        self,
        bank: ResidualBank,
        source: Float[Array, "g n d"],
        *,
        options: options_lib.RefineOptions,
    ) -> ResidualMap:
        return fit(bank, source, options=options)

    def arrange(self, group: Int[Array, " b"], num_groups: int) -> None:
        """The map is the same for all rows."""
        del group, num_groups

    def refine(
        self,
        cond: Float[Array, "b d"],
        maps: ResidualMap,
        arranged: None,
        *,
        group: Int[Array, " b"],
        options: options_lib.RefineOptions,
    ) -> Float[Array, "b d"]:
        del arranged
        return refine(cond, maps, group=group, options=options)

    def refine_source(
        self,
        source: Float[Array, "g n d"],
        maps: ResidualMap,
        *,
        options: options_lib.RefineOptions,
    ) -> Float[Array, "g n d"]:
        """Leaves each of the rows that became residuals of the map out of it."""
        g, n, d = source.shape
        group = jnp.repeat(jnp.arange(g), n)
        rows = source.reshape(g * n, d)
        return refine(rows, maps, group=group, options=options, fitted_on=True).reshape(g, n, d)


def _project(cond: Float[Array, "*s n d"], basis: Float[Array, "*t d k"]) -> Float[Array, "*s n k"]:
    return jnp.matmul(cond.astype(jnp.float32), basis, precision="highest")


def _stride(num_rows: int, at_most: int) -> int:
    """Step at which rows are taken, so that there are at most so many."""
    return -(-num_rows // at_most)
