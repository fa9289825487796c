"""Entropic refinement map of one slot and group, stored so that one condition can be refined alone.

Comes in: reference conditions (the ideal law) and conditions of sampled prefixes. Goes out: a map
cond -> cond. "Condition Errors Refinement in Autoregressive Image Generation with Diffusion Loss"
(ICLR 2026), section 4 and appendix L, with one repair: the entropic map of the source to itself is
subtracted (Feydy et al. 2019; Pooladian and Niles-Weed 2021), since the bare barycentric map
converges to a shrunken law.
"""

import dataclasses
import functools
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from arcond_jax import placement
from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import blocks as blocks_lib
from arcond_jax.transport import options as options_lib
from arcond_jax.transport import sinkhorn


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class EntropicMap:
    """Points and potentials of a map; leading axes slot and group when many are stored together.

    Attributes:
      atoms: Reference conditions.
      g: Potential of the atoms in the transport source to atoms.
      source: Conditions the map was fitted on; None without debiasing.
      h: Potential of the source in the transport to itself; None without debiasing.
      epsilon: Entropy weight in units of half a squared distance.
      valid: False where there was too little to fit; such a map is the identity.
    """

    atoms: Float[Array, "*s_g m d"]
    g: Float[Array, "*s_g m"]
    source: Float[Array, "*s_g n d"] | None
    h: Float[Array, "*s_g n"] | None
    epsilon: Float[Array, "*s_g"]
    valid: Bool[Array, "*s_g"]

    @property
    def width(self) -> int:
        """Width of a condition."""
        return self.atoms.shape[-1]


def entropy_weight(
    radius: Float[Array, "*s_g"], options: options_lib.RefineOptions
) -> Float[Array, "*s_g"]:
    """Entropy weight of a slot and group from its mean half squared radius."""
    return jnp.maximum(options.epsilon * radius.astype(jnp.float32), options.epsilon_min)


def fit(
    atoms: Float[Array, "m d"],
    source: Float[Array, "n d"],
    *,
    count: Int[Array, ""],
    radius: Float[Array, ""],
    options: options_lib.RefineOptions,
) -> EntropicMap:
    """Fits the map from sampled to reference conditions of one slot and group.

    Args:
      atoms: Ring buffer of reference conditions.
      source: Conditions of sampled prefixes, at least 2; what a sampler really meets here.
      count: Conditions seen by the ring buffer.
      radius: Mean half squared distance of the reference conditions to their mean.
      options: Static choices.

    Returns:
      The map; the self-potential is fitted leave-one-out, as an unseen condition meets it.
    """
    source = source.astype(jnp.float32)
    epsilon = entropy_weight(radius, options)
    target = sinkhorn.solve_target(
        sinkhorn.half_squared_distance(source, atoms),
        epsilon=epsilon,
        weights=bank_lib.atom_weights(count, atoms.shape[0]),
        num_iters=options.num_sinkhorn_iters,
    )
    h = None
    if options.debias:
        h = sinkhorn.solve_self(
            sinkhorn.exclude_self(sinkhorn.half_squared_distance(source, source)),
            epsilon=epsilon,
            num_iters=options.num_self_iters,
        )
    return EntropicMap(
        atoms=atoms,
        g=target.g,
        source=source if options.debias else None,
        h=h,
        epsilon=epsilon,
        valid=count >= options.min_atoms,
    )


def refine_rows(
    cond: Float[Array, "b d"], entropic_map: EntropicMap, *, options: options_lib.RefineOptions
) -> Float[Array, "b d"]:
    """`refine` for rows of one slot and group, in one matrix product."""
    if options.step_size == 0.0:
        return cond
    return _move(cond, entropic_map, leave_one_out=False, options=options)


def refine(
    cond: Float[Array, " d"], entropic_map: EntropicMap, *, options: options_lib.RefineOptions
) -> Float[Array, " d"]:
    """Moves one condition towards the ideal law of its slot and group.

    Returns `cond + step_size * (T(cond) - T_self(cond))` with the move clipped, or
    `cond + step_size * (T(cond) - cond)` without debiasing. Depends on this condition alone, so
    samples do not depend on their batch and a sharded batch needs no communication.

    Args:
      cond: Any float dtype, which is kept; the arithmetic is float32.
      entropic_map: The map of its slot and group.
      options: The choices the map was fitted with; tau, num_jko_steps and max_move may differ.

    Returns:
      The refined condition; bit for bit the given one if the map is not valid or tau is 0.
    """
    return refine_rows(cond[None, :], entropic_map, options=options)[0]


def refine_source(
    source: Float[Array, "n d"], entropic_map: EntropicMap, *, options: options_lib.RefineOptions
) -> Float[Array, "n d"]:
    """Refines the very conditions the map was fitted on, leaving each out of its own self-map."""
    if options.step_size == 0.0:
        return source
    return _move(source, entropic_map, leave_one_out=True, options=options)


def _move(
    cond: Float[Array, "b d"],
    entropic_map: EntropicMap,
    *,
    leave_one_out: bool,
    options: options_lib.RefineOptions,
) -> Float[Array, "b d"]:
    """Applies the map to rows, each on its own."""
    start = cond.astype(jnp.float32)
    epsilon = entropic_map.epsilon
    end = sinkhorn.barycenter(
        sinkhorn.half_squared_distance(start, entropic_map.atoms),
        entropic_map.atoms,
        potential=entropic_map.g,
        epsilon=epsilon,
    )
    origin = start
    if entropic_map.source is not None and entropic_map.h is not None:
        cost = sinkhorn.half_squared_distance(start, entropic_map.source)
        origin = sinkhorn.barycenter(
            sinkhorn.exclude_self(cost) if leave_one_out else cost,
            entropic_map.source,
            potential=entropic_map.h,
            epsilon=epsilon,
        )
    shift = end - origin
    if options.max_move is not None:
        # epsilon / options.epsilon is the half squared radius, floored where the law is a point.
        reach = options.max_move * jnp.sqrt(2.0 * epsilon / options.epsilon)
        # The floor under the square keeps the gradient finite where nothing moves.
        square = jnp.maximum((shift**2).sum(axis=1, keepdims=True), 1e-24)
        shift = shift * jnp.minimum(1.0, reach / jnp.sqrt(square))
    refined = start + options.step_size * shift
    return jnp.where(entropic_map.valid, refined, start).astype(cond.dtype)


@dataclasses.dataclass(frozen=True)
class PerGroup:
    """A map of its own for every group; the `refiners.Maps` of the kind "stored"."""

    def fit(
        self,
        bank: bank_lib.Bank,
        source: Float[Array, "g n d"],
        *,
        options: options_lib.RefineOptions,
    ) -> EntropicMap:
        """Fits each group's."""
        return jax.vmap(functools.partial(fit, options=options))(
            bank.atoms, source, count=bank.count, radius=bank_lib.radius(bank)
        )

    def arrange(self, group: Int[Array, " b"], num_groups: int) -> blocks_lib.Blocks | None:
        """Rows of each group on a device side by side: they share one product with its map.

        None where there is one group, or one row.
        """
        if 1 in (num_groups, group.shape[0]):
            return None
        num_pieces = placement.num_pieces(group.shape[0])
        return blocks_lib.make(group, num_groups, num_pieces=num_pieces)

    def refine(
        self,
        cond: Float[Array, "b d"],
        maps: EntropicMap,
        arranged: blocks_lib.Blocks | None,
        *,
        group: Int[Array, " b"],
        options: options_lib.RefineOptions,
    ) -> Float[Array, "b d"]:
        """Moves each row by the map of its group."""
        one_group = functools.partial(refine_rows, options=options)
        if arranged is None:
            return one_group(cond, jax.tree.map(lambda leaf: leaf[group[0]], maps))
        return blocks_lib.apply(one_group, cond, maps, blocks=arranged)

    def refine_source(
        self,
        source: Float[Array, "g n d"],
        maps: EntropicMap,
        *,
        options: options_lib.RefineOptions,
    ) -> Float[Array, "g n d"]:
        """Moves each row by the map of its group, without itself."""
        return jax.vmap(functools.partial(refine_source, options=options))(source, maps)
