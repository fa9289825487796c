"""Gaussian refinement map: the closed form of transport between two normal laws.

Comes in: reference and sampled conditions of one slot, all groups. Goes out: a map cond -> cond of
class means and one matrix per slot, with no reference condition inside. Dowson and Landau (1982);
for normal laws it is the exact step of Jordan, Kinderlehrer and Otto (1998).
"""

import dataclasses
from collections.abc import Callable
from typing import no_type_check

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import options as options_lib

# Ridge on both covariances in units of their mean eigenvalue: with few samples the small
# eigenvalues are noise, and the map divides by them.
RIDGE = 0.01


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class GaussianMap:
    """The map `target_mean + matrix @ (cond - source_mean)`; leading axis slot when stored.

    Attributes:
      source_mean: Mean of the sampled conditions of each group.
      target_mean: Mean of the reference conditions of each group.
      matrix: Symmetric positive map between the pooled within-group covariances.
      valid: False where a group had too little to fit; such a group keeps its conditions.
    """

    source_mean: Float[Array, "*s g d"]
    target_mean: Float[Array, "*s g d"]
    matrix: Float[Array, "*s d d"]
    valid: Bool[Array, "*s g"]

    @property
    def width(self) -> int:
        """Width of a condition."""
        return self.matrix.shape[-1]


def transport_matrix(
    source_cov: Float[Array, "d d"], target_cov: Float[Array, "d d"]
) -> Float[Array, "d d"]:
    """Optimal linear map A between centred normal laws: A S A = T, A symmetric and positive.

    A = S^-1/2 (S^1/2 T S^1/2)^1/2 S^-1/2 (Dowson and Landau 1982); S must be positive definite.
    """
    root = _spectral(source_cov, jnp.sqrt)
    inverse_root = _spectral(source_cov, lambda values: 1.0 / jnp.sqrt(values))
    middle = _spectral(_product(root, target_cov, root), jnp.sqrt)
    matrix = _product(inverse_root, middle, inverse_root)
    return 0.5 * (matrix + matrix.T)


def fit(
    atoms: Float[Array, "g m d"],
    source: Float[Array, "g n d"],
    *,
    count: Int[Array, " g"],
    options: options_lib.RefineOptions,
) -> GaussianMap:
    """Fits the map from sampled to reference conditions of one slot.

    Args:
      atoms: Ring buffers of reference conditions.
      source: Conditions of sampled prefixes, at least 2 a group.
      count: Conditions seen by each ring buffer.
      options: Static choices; of them only min_atoms matters here.

    Returns:
      The map; covariances are pooled within groups and get a ridge of 1 % of their mean eigenvalue.
    """
    present = bank_lib.atom_weights(count, atoms.shape[1]) > 0.0
    present = present & (count > 0)[:, None]
    target_mean, target_cov = _moments(atoms, present)
    source_mean, source_cov = _moments(source, jnp.ones(source.shape[:2], bool))
    return GaussianMap(
        source_mean=source_mean,
        target_mean=target_mean,
        matrix=transport_matrix(source_cov, target_cov),
        valid=count >= options.min_atoms,
    )


def refine(
    cond: Float[Array, "b d"],
    gaussian_map: GaussianMap,
    *,
    group: Int[Array, " b"],
    options: options_lib.RefineOptions,
) -> Float[Array, "b d"]:
    """Moves conditions of one slot towards their ideal normal law, each row on its own.

    Args:
      cond: Any float dtype, which is kept; the arithmetic is float32.
      gaussian_map: The map of this slot.
      group: Group of each row, in range.
      options: Static choices.

    Returns:
      Refined conditions; bit for bit the given ones where the map is not valid or tau is 0.
    """
    if options.step_size == 0.0:
        return cond
    start = cond.astype(jnp.float32)
    centred = start - gaussian_map.source_mean[group]
    end = gaussian_map.target_mean[group]
    end = end + jnp.matmul(centred, gaussian_map.matrix, precision="highest")
    refined = start + options.step_size * (end - start)
    return jnp.where(gaussian_map.valid[group][:, None], refined, start).astype(cond.dtype)


def _moments(
    cond: Float[Array, "g n d"], present: Bool[Array, "g n"]
) -> tuple[Float[Array, "g d"], Float[Array, "d d"]]:
    """Mean of each group and ridged covariance within groups of the rows that are present."""
    weight = present.astype(jnp.float32)[..., None]
    size = weight.sum(axis=1)
    mean = (weight * cond.astype(jnp.float32)).sum(axis=1) / jnp.maximum(size, 1.0)
    centred = weight * (cond.astype(jnp.float32) - mean[:, None, :])
    freedom = jnp.maximum(size.sum() - (size > 0).sum(), 1.0)
    cov = jnp.einsum("gnd,gne->de", centred, centred, precision="highest") / freedom
    width = cond.shape[-1]
    # The absolute floor makes a law that is a single point map onto itself.
    return mean, cov + (RIDGE * jnp.trace(cov) / width + 1e-6) * jnp.eye(width)


def _spectral(
    matrix: Float[Array, "d d"], function: Callable[[Float[Array, " d"]], Float[Array, " d"]]
) -> Float[Array, "d d"]:
    """Applies a function to the eigenvalues of a symmetric positive matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    # Rounding can push an eigenvalue below 0.
    values = jnp.maximum(values, jnp.finfo(matrix.dtype).tiny)
    return jnp.matmul(vectors * function(values)[None, :], vectors.T, precision="highest")


def _product(*matrices: Float[Array, "d d"]) -> Float[Array, "d d"]:
    return jnp.linalg.multi_dot(matrices, precision="highest")


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Means of every group and one normal map; the `refiners.Maps` of the kind "bures"."""

    def fit(
        self,
        bank: bank_lib.Bank,
        source: Float[Array, "g n d"],
        *,
        options: options_lib.RefineOptions,
    ) -> GaussianMap:
        return fit(bank.atoms, source, count=bank.count, options=options)

    def arrange(self, group: Int[Array, " b"], num_groups: int) -> None:
        """The map is looked up by the row."""
        del group, num_groups

    def refine(
        self,
        cond: Float[Array, "b d"],
        maps: GaussianMap,
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
        maps: GaussianMap,
        *,
        options: options_lib.RefineOptions,
    ) -> Float[Array, "g n d"]:
        """As any other rows: a row is but a little of a mean and a covariance."""
        g, n, d = source.shape
        group = jnp.repeat(jnp.arange(g), n)
        moved = refine(source.reshape(g * n, d), maps, group=group, options=options)
        return moved.reshape(source.shape)
