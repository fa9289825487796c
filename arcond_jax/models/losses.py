"""What is trained from a condition: the code by cross-entropy, the latent by the diffusion loss.

Each is the counterpart of a head of the sampling loop. Comes in: conditions of all positions and
the real tokens there, in the order they are visited. Goes out: a weighted loss and its parts.

Source: MAR (Li et al., 2024), models/diffloss.py, for the diffusion loss; TensorAR (2025) for
windows.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from arcond_jax import placement, types
from arcond_jax.diffusion import gaussian
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.models import tensorar, windows
from arcond_jax.nn import parameter

# Rows of a window's entries: from the network, conditions, their codes, and where windows lie.
RowsOf = Callable[[Any, Array, Array, Array], Array]
# Whose windows a device unfolds at a time. Each time it adds up the gradient of the weights, which
# takes an accelerator as long as many products.
ROWS, ACCELERATOR_ROWS = 512, 2048


@dataclasses.dataclass(frozen=True, eq=False)
class Bound:
    """A network with its parameters; a call runs the method of it that `method` is or names.

    Attributes:
      variables: "params", and those that were gathered before under `parameter.WHOLE`.
      rngs: Of what is random; None where nothing is dropped out.
    """

    network: Any
    variables: Mapping[str, Any]
    rngs: Mapping[str, Key[Array, ""]] | None = None

    def __call__(self, *args: Any, method: Callable | str) -> Any:
        return self.network.apply(self.variables, *args, method=method, rngs=self.rngs)

    def whole(self, *args: Any, method: Callable | str) -> Any:
        """Variables of which calls that read what this one does gather nothing."""
        mutable = [parameter.WHOLE]
        whole = self.network.apply(self.variables, *args, method=method, mutable=mutable)[1]
        return {**self.variables, **whole}


@runtime_checkable  # annotations are checked at run time in the tests
class Loss(Protocol):
    """A part of a model's training loss."""

    def __call__(
        self,
        model: Bound,
        cond: Float[Array, "b l d"],
        at: Int[Array, "*b l"],
        factors: Int[Array, "b l factors"] | None,
        latents: Float[Array, "b l c"] | None,
        rng: Key[Array, ""],
    ) -> tuple[Float[Array, ""], types.Metrics]: ...


@dataclasses.dataclass(frozen=True)
class CodeLoss:
    """Cross-entropy of codes in nats, summed over their factors; no dropout in windows.

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
        model: Bound,
        cond: Float[Array, "b l d"],
        at: Int[Array, "*b l"],
        factors: Int[Array, "b l factors"] | None,
        latents: Float[Array, "b l c"] | None,
        rng: Key[Array, ""],
    ) -> tuple[Float[Array, ""], types.Metrics]:
        """Mean over positions; what of a window lies beyond the end is left out."""
        del latents, rng
        assert factors is not None
        window = model.network.window
        entries = cross_entropy(model, plain_rows, cond, at, factors, entries=range(window))
        first, drafts = jnp.sum(entries[0]), jnp.sum(entries[1:], axis=-1)
        metrics = {"cross_entropy": first}
        if entries.shape[1] > 1:
            metrics |= {f"cross_entropy/factor_{i}": x for i, x in enumerate(entries[0])}
        loss = first
        if window > 1:
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
        model: Bound,
        cond: Float[Array, "b l d"],
        at: Int[Array, "*b l"],
        factors: Int[Array, "b l factors"] | None,
        latents: Float[Array, "b l c"] | None,
        rng: Key[Array, ""],
    ) -> tuple[Float[Array, ""], types.Metrics]:
        """Mean over positions; guesses about what lies beyond the end are left out."""
        del latents, rng
        assert factors is not None and isinstance(model.network, tensorar.Drafter)

        def rows(network: Any, cond: Array, codes: Array, at: Array) -> Array:
            return network.draft_rows(cond, codes, at)

        entries = range(1, model.network.num_drafts + 1)
        cond = jax.lax.stop_gradient(cond)
        drafts = cross_entropy(model, rows, cond, at, factors, entries=entries)
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
        model: Bound,
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
            codes = jnp.where(untold, model.network.factor_sizes[0], factors[..., 0])
        cond = model(cond, codes, method="latent_cond")
        t, noise = drawn(time_rng, noise_rng, latents, self.num_copies, schedule=self.schedule)
        mse, vb = diffusion_losses(model, cond, latents, t, noise, schedule=self.schedule)
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
    model: Bound,
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
    output = model(x, t, cond, method="denoise")
    return gaussian.loss(output, x0, x, t, noise, schedule=schedule)


def plain_rows(network: Any, cond: Array, codes: Array, at: Array) -> Array:
    """The rows that codes are drawn from, which are told no codes; `RowsOf`."""
    del codes
    return network.rows(cond, at)


def cross_entropy(
    model: Bound,
    rows_of: RowsOf,
    cond: Float[Array, "b l d"],
    at: Int[Array, "*b l"],
    factors: Int[Array, "b l factors"],
    *,
    entries: range,
) -> Float[Array, "entries factors"]:
    """Mean cross-entropy of the given entries of the window and each factor, in nats.

    A few positions after another, and entry after entry there, with rematerialisation: neither the
    rows of all windows nor the logits of all entries are ever held at once. Weights are gathered
    before that and their gradient is summed over devices after it, however many rows there are.
    Nothing is dropped out of windows.
    """
    (num_rows, length, _), window = factors.shape, entries.stop
    chosen = slice(entries.start, entries.stop)
    targets = windows.of(factors, window)[:, :, chosen]
    counted = jnp.asarray(windows.inside(length, window)[:, chosen], jnp.float32)
    where = jnp.broadcast_to(windows.ahead(at, window), (num_rows, length, window))
    rows = (cond, factors, where, targets)
    if window == 1:
        total = _summed(model, rows_of, counted, *rows)
    else:

        def read(network: Any, cond: Array, factors: Array, where: Array) -> Any:
            row = rows_of(network, cond, factors, where)[..., 0, :]
            return network.all_factor_logits(row, factors)

        def of_shard(variables: Any, *rows: Array) -> Array:
            # Without rngs: what is dropped would depend on how many rows a device has.
            return _summed(Bound(model.network, variables), rows_of, counted, *rows)

        one = [jnp.zeros((1, 1, *x.shape[2:]), x.dtype) for x in rows[:-1]]
        total = placement.sum_over_shards(of_shard, model.whole(*one, method=read), *rows)
    return total / (jnp.sum(counted, axis=0)[:, None] * num_rows)


def _summed(
    model: Bound,
    rows_of: RowsOf,
    counted: Float[Array, "l entries"],
    cond: Float[Array, "b l d"],
    factors: Int[Array, "b l factors"],
    where: Int[Array, "b l w"],
    targets: Int[Array, "b l entries factors"],
) -> Float[Array, "entries factors"]:
    """Cross-entropy, summed over rows and positions that are counted."""

    @jax.checkpoint
    def of_entry(
        row: Float[Array, "b n d"], target: Int[Array, "b n factors"], weight: Float[Array, " n"]
    ) -> Float[Array, " factors"]:
        logits = model(row, target, method="all_factor_logits")
        log_p = [jax.nn.log_softmax(x) for x in logits]
        picked = [
            jnp.take_along_axis(x, target[..., i, None], axis=-1)[..., 0]
            for i, x in enumerate(log_p)
        ]
        return jnp.stack([-jnp.sum(x * weight) for x in picked])

    def of_positions(cond, factors, where, targets, counted) -> Float[Array, "entries factors"]:
        rows = model(cond, factors, where, method=rows_of)
        scanned = (jnp.moveaxis(rows, 2, 0), jnp.moveaxis(targets, 2, 0), counted.T)
        return jax.lax.scan(lambda _, entry: (None, of_entry(*entry)), None, scanned)[1]

    held = (cond, factors, where, targets, counted)
    (num_rows, length, window) = where.shape
    count = _positions(num_rows, length) if window > 1 else length
    if count == length:
        return of_positions(*held)
    axes = (1, 1, 1, 1, 0)  # of positions
    pieces = [_pieces(x, axis, count) for x, axis in zip(held, axes, strict=True)]
    checkpointed = jax.checkpoint(of_positions)
    return jnp.sum(jax.lax.map(lambda piece: checkpointed(*piece), pieces), axis=0)


def _positions(num_rows: int, length: int) -> int:
    """How many positions are unfolded at a time: a divisor of all."""
    rows = ROWS if placement.platform() == "cpu" else ACCELERATOR_ROWS
    at_most = max(1, rows // num_rows)
    return max(n for n in range(1, min(at_most, length) + 1) if length % n == 0)


def _pieces(x: Shaped[Array, "..."], axis: int, count: int) -> Shaped[Array, "pieces ..."]:
    """Pieces of `count` along an axis."""
    cut = x.reshape(*x.shape[:axis], -1, count, *x.shape[axis + 1 :])
    return jnp.moveaxis(cut, axis, 0)
