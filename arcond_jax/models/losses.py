"""What is trained from a condition: the code by cross-entropy, the latent by the diffusion loss.

Each is the counterpart of a head of the sampling loop. Comes in: conditions of all positions and
the real tokens there, in the order they are visited. Goes out: a weighted loss and its parts.

Source: MAR (Li et al., 2024), models/diffloss.py, for the diffusion loss; TensorAR (2025) for
windows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from arcond_jax import placement, types
from arcond_jax.diffusion import gaussian
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.models import tensorar, windows

# Runs the method of the network that `method` names, with its parameters.
Apply = Callable[..., Any]
RowsOf = Callable[[Array, Array, Array], Array]
# Whose windows a device unfolds at a time: more, where it gathers weights for them each time.
ROWS, ROWS_A_GATHER = 512, 2048


@runtime_checkable  # annotations are checked at run time in the tests
class Loss(Protocol):
    """A part of a model's training loss."""

    def __call__(
        self,
        network: types.CausalModel,
        apply: Apply,
        cond: Float[Array, "b l d"],
        at: Int[Array, "*b l"],
        factors: Int[Array, "b l factors"] | None,
        latents: Float[Array, "b l c"] | None,
        rng: Key[Array, ""],
    ) -> tuple[Float[Array, ""], types.Metrics]: ...


@dataclasses.dataclass(frozen=True)
class CodeLoss:
    """Cross-entropy of codes in nats, summed over their factors.

    Attributes:
      weight: Of this loss in the whole.
      draft_weight: Of the mean cross-entropy of entries 1 and up of a window against entry 0's.
      draft_weights: Of each entry from 1 on against the others, in that mean; None for the same.
    """

    weight: float = 1.0
    draft_weight: float = 1.0
    draft_weights: tuple[float, ...] | None = None

    def __call__(
        self,
        network: types.CausalModel,
        apply: Apply,
        cond: Float[Array, "b l d"],
        at: Int[Array, "*b l"],
        factors: Int[Array, "b l factors"] | None,
        latents: Float[Array, "b l c"] | None,
        rng: Key[Array, ""],
    ) -> tuple[Float[Array, ""], types.Metrics]:
        """Mean over positions; what of a window lies beyond the end is left out."""
        del latents, rng
        assert factors is not None
        entries = cross_entropy(
            apply,
            lambda cond, codes, at: apply(cond, at, method="rows"),
            cond,
            at,
            factors,
            entries=range(network.window),
        )
        first, drafts = jnp.sum(entries[0]), jnp.sum(entries[1:], axis=-1)
        metrics = {"cross_entropy": first}
        if entries.shape[1] > 1:
            metrics |= {f"cross_entropy/factor_{i}": x for i, x in enumerate(entries[0])}
        loss = first
        if network.window > 1:
            metrics |= {f"cross_entropy/draft_{j}": x for j, x in enumerate(drafts, 1)}
            loss = loss + self.draft_weight * weighted(drafts, self.draft_weights)
        return self.weight * loss, metrics | {"loss_tensor": loss}


@dataclasses.dataclass(frozen=True)
class DraftLoss:
    """Cross-entropy of what a `tensorar.Drafter` guesses; the model inside learns nothing from it.

    Attributes:
      draft_weights: As in `CodeLoss`.
    """

    draft_weights: tuple[float, ...] | None = None

    def __call__(
        self,
        network: types.CausalModel,
        apply: Apply,
        cond: Float[Array, "b l d"],
        at: Int[Array, "*b l"],
        factors: Int[Array, "b l factors"] | None,
        latents: Float[Array, "b l c"] | None,
        rng: Key[Array, ""],
    ) -> tuple[Float[Array, ""], types.Metrics]:
        """Mean over positions; guesses about what lies beyond the end are left out."""
        del latents, rng
        assert factors is not None and isinstance(network, tensorar.Drafter)
        window = network.num_drafts + 1
        cond = jax.lax.stop_gradient(cond)
        drafts = cross_entropy(
            apply,
            lambda cond, codes, at: apply(cond, codes, at, method="draft_rows"),
            cond,
            at,
            factors,
            entries=range(1, window),
        )
        drafts = jnp.sum(drafts, axis=-1)
        loss = weighted(drafts, self.draft_weights)
        return loss, {f"cross_entropy/draft_{j}": x for j, x in enumerate(drafts, 1)}


def weighted(
    losses: Float[Array, " drafts"], weights: tuple[float, ...] | None
) -> Float[Array, ""]:
    """Their mean, under weights if there are any."""
    if weights is None:
        return jnp.mean(losses)
    return jnp.sum(losses * jnp.asarray(weights)) / sum(weights)


@dataclasses.dataclass(frozen=True)
class LatentLoss:
    """MAR's diffusion loss: mse of the noise, and the variational term that trains its variance.

    Attributes:
      schedule: The noise process.
      weight: Of this loss in the whole.
      num_copies: Times each position is noised anew per step (MAR's diffusion_batch_mul).
      code_dropout: Chance that the head is not told a position's code.
    """

    schedule: schedule_lib.Schedule
    weight: float = 1.0
    num_copies: int = 1
    code_dropout: float = 0.0

    def __call__(
        self,
        network: types.CausalModel,
        apply: Apply,
        cond: Float[Array, "b l d"],
        at: Int[Array, "*b l"],
        factors: Int[Array, "b l factors"] | None,
        latents: Float[Array, "b l c"] | None,
        rng: Key[Array, ""],
    ) -> tuple[Float[Array, ""], types.Metrics]:
        """Mean over positions and copies."""
        del at
        assert latents is not None
        time_rng, noise_rng, code_rng = jax.random.split(rng, 3)
        codes = None
        if factors is not None:
            untold = jax.random.bernoulli(code_rng, self.code_dropout, latents.shape[:-1])
            codes = jnp.where(untold, network.factor_sizes[0], factors[..., 0])
        cond = apply(cond, codes, method="latent_cond")
        t, noise = drawn(time_rng, noise_rng, latents, self.num_copies, schedule=self.schedule)
        mse, vb = diffusion_losses(apply, cond, latents, t, noise, schedule=self.schedule)
        mse, vb = jnp.mean(mse), jnp.mean(vb)
        metrics = {"diffusion/mse": mse, "diffusion/vb": vb, "loss_diffusion": mse + vb}
        return self.weight * (mse + vb), metrics


def drawn(
    time_rng: Key[Array, ""],
    noise_rng: Key[Array, ""],
    latents: Float[Array, "b l c"],
    num_copies: int,
    *,
    schedule: schedule_lib.Schedule,
) -> tuple[Int[Array, "b copies l"], Float[Array, "b copies l c"]]:
    """Times and noise of every copy of the latents."""
    shape = (num_copies, *latents.shape)
    t = jax.random.randint(time_rng, shape[:-1], 0, len(schedule.betas))
    noise = jax.random.normal(noise_rng, shape)
    return jnp.swapaxes(t, 0, 1), jnp.swapaxes(noise, 0, 1)


def diffusion_losses(
    apply: Apply,
    cond: Float[Array, "b l d"],
    latents: Float[Array, "b l c"],
    t: Int[Array, "b copies l"],
    noise: Float[Array, "b copies l c"],
    *,
    schedule: schedule_lib.Schedule,
) -> tuple[Float[Array, "b copies l"], Float[Array, "b copies l"]]:
    """Squared error of the noise and variational term of every position and copy."""
    x0 = jnp.broadcast_to(latents[:, None], noise.shape)
    x = gaussian.q_sample(x0, t, noise, schedule=schedule)
    cond = jnp.broadcast_to(cond[:, None], (*noise.shape[:-1], cond.shape[-1]))
    output = apply(x, t, cond, method="denoise")
    return gaussian.loss(output, x0, x, t, noise, schedule=schedule)


def cross_entropy(
    apply: Apply,
    rows_of: RowsOf,
    cond: Float[Array, "b l d"],
    at: Int[Array, "*b l"],
    factors: Int[Array, "b l factors"],
    *,
    entries: range,
) -> Float[Array, "entries factors"]:
    """Mean cross-entropy of the given entries of the window and each factor, in nats.

    A few positions after another, and entry after entry there, with rematerialisation: neither the
    rows of all windows nor the logits of all entries are ever held at once.

    Args:
      rows_of: Rows of these entries from conditions, their codes, and where windows lie.
    """
    (num_rows, length, _), window = factors.shape, entries.stop
    chosen = slice(entries.start, entries.stop)
    targets = windows.of(factors, window)[:, :, chosen]
    counted = jnp.asarray(windows.inside(length, window)[:, chosen], jnp.float32)

    @jax.checkpoint
    def of_entry(
        row: Float[Array, "b n d"], target: Int[Array, "b n factors"], weight: Float[Array, " n"]
    ) -> Float[Array, " factors"]:
        logits = apply(row, target, method="all_factor_logits")
        log_p = [jax.nn.log_softmax(x) for x in logits]
        picked = [
            jnp.take_along_axis(x, target[..., i, None], axis=-1)[..., 0]
            for i, x in enumerate(log_p)
        ]
        return jnp.stack([-jnp.sum(x * weight) for x in picked])

    def of_positions(cond, factors, where, targets, counted) -> Float[Array, "entries factors"]:
        rows = rows_of(cond, factors, where)
        scanned = (jnp.moveaxis(rows, 2, 0), jnp.moveaxis(targets, 2, 0), counted.T)
        return jax.lax.scan(lambda _, entry: (None, of_entry(*entry)), None, scanned)[1]

    held = (cond, factors, windows.ahead(at, window), targets, counted)
    count = _positions(num_rows, length) if window > 1 else length
    if count == length:
        total = of_positions(*held)
    else:
        axes = (1, 1, at.ndim - 1, 1, 0)  # of positions
        pieces = [_pieces(x, axis, count) for x, axis in zip(held, axes, strict=True)]
        checkpointed = jax.checkpoint(of_positions)
        total = jnp.sum(jax.lax.map(lambda piece: checkpointed(*piece), pieces), axis=0)
    return total / (jnp.sum(counted, axis=0)[:, None] * num_rows)


def _positions(num_rows: int, length: int) -> int:
    """How many positions are unfolded at a time: a divisor of all."""
    rows = ROWS_A_GATHER if placement.is_gathering() else ROWS
    at_most = max(1, rows * placement.num_batch_shards() // num_rows)
    return max(n for n in range(1, min(at_most, length) + 1) if length % n == 0)


def _pieces(x: Shaped[Array, "..."], axis: int, count: int) -> Shaped[Array, "pieces ..."]:
    """Pieces of `count` along an axis."""
    cut = x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)
