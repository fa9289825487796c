"""Bank of reference conditions: what the condition of a slot looks like after a real prefix.

Comes in: conditions of teacher-forced prefixes with their groups. Goes out: per slot and group a
ring buffer of the last conditions and bias-corrected moving moments. It stands for the ideal law of
"Condition Errors Refinement in Autoregressive Image Generation with Diffusion Loss" (ICLR 2026).
The paper averages vectors; a moving average of vectors collapses a law to its mean, so here the
average is on moments and the law itself is kept as samples.
"""

from collections.abc import Callable, Iterator
from typing import no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

IMAGES_PER_ATOM = 8  # read to fill a bank, at most: a group's ring is then full whatever the order

# Conditions of real prefixes of at most so many images, spread over all there are: batches of
# conditions on the device, labels, and which rows count.
Batch = tuple[Float[Array, "b s d"], Int[np.ndarray, " b"], Bool[np.ndarray, " b"]]
Read = Callable[[int], Iterator[Batch]]
Compiled = Callable[[Callable], Callable]  # jit, on whatever mesh the conditions are on


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Bank:
    """Reference conditions of every slot and group; one static shape for life.

    Attributes:
      atoms: Ring buffer of the last conditions; those not yet written are 0.
      count: Conditions seen so far, more than fit.
      ema_mean: Moving mean, not yet corrected for its start at 0.
      ema_radius: Moving mean of |cond - mean|^2 / 2, not yet corrected.
      ema_weight: Total weight of both averages, in [0, 1].
    """

    atoms: Float[Array, "s g m d"]
    count: Int[Array, "s g"]
    ema_mean: Float[Array, "s g d"]
    ema_radius: Float[Array, "s g"]
    ema_weight: Float[Array, "s g"]

    @property
    def width(self) -> int:
        """Width of a condition."""
        return self.atoms.shape[-1]

    def fill(self, read: Read, compiled: Compiled, *, num_classes: int) -> "Bank":
        """The bank with conditions of real prefixes in it."""
        del num_classes
        _, num_groups, num_atoms, _ = self.atoms.shape
        cond, label = collect(read(IMAGES_PER_ATOM * num_atoms * num_groups))
        group = jnp.asarray(label) if num_groups > 1 else jnp.zeros_like(label)
        return compiled(update_bank)(self, jnp.asarray(cond), group=group)


def collect(
    batches: Iterator[Batch],
) -> tuple[Float[np.ndarray, "n s d"], Int[np.ndarray, " n"]]:
    """All conditions that count, on the host, and their labels."""
    conds, labels = [], []
    for cond, label, valid in batches:
        conds.append(np.asarray(cond)[valid])
        labels.append(label[valid])
    return np.concatenate(conds), np.concatenate(labels)


def init_bank(
    num_slots: int, num_groups: int, *, num_atoms: int, width: int, dtype: DTypeLike = jnp.float32
) -> Bank:
    """Makes an empty bank; `dtype` is that of the atoms (bfloat16 halves the memory)."""
    sizes = (num_slots, num_groups)
    return Bank(
        atoms=jnp.zeros((*sizes, num_atoms, width), dtype),
        count=jnp.zeros(sizes, jnp.int32),
        ema_mean=jnp.zeros((*sizes, width), jnp.float32),
        ema_radius=jnp.zeros(sizes, jnp.float32),
        ema_weight=jnp.zeros(sizes, jnp.float32),
    )


def update_bank(
    bank: Bank, cond: Float[Array, "b s d"], *, group: Int[Array, " b"], decay: float = 0.99
) -> Bank:
    """Writes one batch of teacher-forced conditions; the oldest of each group give way.

    Args:
      bank: The bank so far.
      cond: Conditions of all slots; no gradient flows back. If one group brings more rows than fit,
        its last ones stay.
      group: Group of each row, at least 0; rows at or above the number of groups (the null class)
        are dropped.
      decay: Decay of the moving moments per row, in [0, 1).

    Returns:
      The bank with the batch in it.
    """
    num_slots, num_groups, num_atoms, _ = bank.atoms.shape
    cond = jax.lax.stop_gradient(cond).astype(jnp.float32).swapaxes(0, 1)
    member = group[:, None] == jnp.arange(num_groups)[None, :]
    num_new = member.sum(axis=0, dtype=jnp.int32)

    arrival = jnp.where(member, jnp.cumsum(member, axis=0) - 1, 0).sum(axis=1)
    is_kept = arrival >= (member * num_new[None, :]).sum(axis=1) - num_atoms
    place = (bank.count[:, group] + arrival[None, :]) % num_atoms
    place = jnp.where(is_kept[None, :], place, num_atoms)  # out of range, hence dropped below
    slot = jnp.arange(num_slots)[:, None]
    atoms = bank.atoms.at[slot, group[None, :], place].set(
        cond.astype(bank.atoms.dtype), mode="drop"
    )

    rate = 1.0 - decay ** num_new.astype(jnp.float32)[None, :]
    share = member / jnp.maximum(num_new, 1)[None, :]
    weight = (1.0 - rate) * bank.ema_weight + rate
    new_mean = jnp.einsum("bg,sbd->sgd", share, cond, precision="highest")
    ema_mean = (1.0 - rate[..., None]) * bank.ema_mean + rate[..., None] * new_mean
    center = _unbiased(ema_mean, weight[..., None])
    half_square = 0.5 * ((cond[:, :, None, :] - center[:, None, :, :]) ** 2).sum(axis=-1)
    new_radius = jnp.einsum("bg,sbg->sg", share, half_square, precision="highest")
    return Bank(
        atoms=atoms,
        count=bank.count + num_new[None, :],
        ema_mean=ema_mean,
        ema_radius=(1.0 - rate) * bank.ema_radius + rate * new_radius,
        ema_weight=weight,
    )


def mean(bank: Bank) -> Float[Array, "*s g d"]:
    """Bias-corrected moving mean; 0 for an empty slot and group."""
    return _unbiased(bank.ema_mean, bank.ema_weight[..., None])


def radius(bank: Bank) -> Float[Array, "*s g"]:
    """Bias-corrected moving mean of |cond - mean|^2 / 2; 0 for an empty slot and group."""
    return _unbiased(bank.ema_radius, bank.ema_weight)


def atom_weights(count: Int[Array, "*s_g"], num_atoms: int) -> Float[Array, "*s_g m"]:
    """Gives each written atom the same probability and the others 0.

    An empty ring gets uniform weights: its atoms mean nothing, but the numbers stay finite and the
    caller drops them.
    """
    filled = jnp.where(count == 0, num_atoms, jnp.minimum(count, num_atoms))[..., None]
    place = jnp.arange(num_atoms).reshape((1,) * count.ndim + (num_atoms,))
    return jnp.where(place < filled, 1.0 / filled, 0.0)


def _unbiased(average: Float[Array, "..."], weight: Float[Array, "..."]) -> Float[Array, "..."]:
    """Divides a moving average by its total weight (Kingma and Ba 2015, section 3)."""
    return jnp.where(weight > 0.0, average / jnp.where(weight > 0.0, weight, 1.0), 0.0)
