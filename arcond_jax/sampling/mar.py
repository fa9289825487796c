"""The compiled sampling loop of MAR: a few tokens at each step, in a random order of their own.

Which tokens are there is known before anything runs, only not where they lie. So tokens are kept
in generation order, what is visible is a prefix, and the steps fall into a few buckets of static
shape: in a bucket the encoder runs on as many slots as its last step needs, and the head on as many
tokens as its largest step draws. One scan a bucket, nothing leaves the device.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from arcond_jax import types
from arcond_jax.diffusion import solvers
from arcond_jax.models import mar
from arcond_jax.nn import layout
from arcond_jax.sampling import guidance as guidance_lib
from arcond_jax.sampling import sampled

# Chain noise of the tokens with the given generation numbers: one draw to start from, then one for
# every evaluation of the head.
NoiseOf = Callable[[Int[Array, " k"]], Float[Array, "draws b k c"]]


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Known:
    """Tokens that are given and stay as they are; every row has the same number of them."""

    latents: Float[Array, "b l c"]
    given: Bool[Array, "b l"]


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Steps that share their static shapes.

    Attributes:
      start, stop: Steps, first and last + 1.
      num_slots: Tokens the encoder sees, visible or not.
      num_drawn: Tokens the head draws in each step; those not yet due are drawn again later.
    """

    start: int
    stop: int
    num_slots: int
    num_drawn: int


@dataclasses.dataclass(frozen=True, eq=False)
class MARSampler:
    """Static choices of sampling from `MAR`.

    Attributes:
      network: The Linen module.
      solver: Chain of the diffusion head.
      num_ar_steps: Decoding steps, 1 to the number of tokens to draw.
      guidance: Classifier-free guidance.
      num_buckets: Groups of steps; more of them waste less work and compile longer.
      num_known: Tokens given beforehand in every row.
      trace: Also return conditions before and after refinement, of one token of each step.

    Raises:
      ValueError: a choice that does not exist, or steps out of range.

    Source: MAR (Li et al., 2024), models/mar.py, `sample_tokens`.
    """

    network: mar.MAR
    solver: solvers.Solver
    num_ar_steps: int
    guidance: guidance_lib.Guidance = dataclasses.field(default_factory=guidance_lib.Guidance)
    num_buckets: int = 8
    num_known: int = 0
    trace: bool = False

    def __post_init__(self) -> None:
        if self.num_buckets < 1:
            raise ValueError(f"num_buckets {self.num_buckets} must be at least 1")
        step_ends(self.network.length, self.num_ar_steps, num_known=self.num_known)

    def __call__(
        self,
        params: types.Params,
        rng: Key[Array, ""],
        prompt: Int[Array, " b"],
        *,
        refiner: types.Refiner,
        code_law: types.CodeLaw | None = None,
        known: Known | None = None,
        first_row: Int[Array, ""] | int = 0,
    ) -> sampled.Sampled:
        """Draws one token grid per label; rows as in `raster.Raster`.

        Args:
          code_law: Not looked at: it is about codes.
          known: Tokens to keep, `num_known` in every row.
        """
        if (known is None) != (self.num_known == 0):
            raise ValueError(
                f"num_known is {self.num_known}: pass `known` if and only if it is not 0"
            )
        rngs = jax.vmap(jax.random.split)(sampled.row_rngs(rng, prompt.shape[0], first_row))
        length, channels = self.network.length, self.network.channels
        rank = jax.vmap(lambda rng: jax.random.uniform(rng, (length,)))(rngs[:, 0])
        if known is not None:
            rank = jnp.where(known.given, rank - 1.0, rank)  # given tokens come first
        order = jnp.argsort(rank, axis=-1)

        def noise_of(numbers: Int[Array, " k"]) -> Float[Array, "draws b k c"]:
            def one(rng: Key[Array, ""], number: Int[Array, ""]) -> Float[Array, "draws c"]:
                shape = (self.solver.num_evaluations + 1, channels)
                return jax.random.normal(jax.random.fold_in(rng, number), shape)

            drawn = jax.vmap(jax.vmap(one, (None, 0)), (0, None))(rngs[:, 1], numbers)
            return jnp.moveaxis(drawn, 2, 0)

        latents = jnp.zeros((*order.shape, channels))
        if known is not None:
            latents = mar.in_order(known.latents, order)
        return self.run(params, latents, order, prompt, noise_of, refiner=refiner)

    def run(
        self,
        params: types.Params,
        latents: Float[Array, "b l c"],
        order: Int[Array, "b l"],
        label: Int[Array, " b"],
        noise_of: NoiseOf,
        *,
        refiner: types.Refiner,
    ) -> sampled.Sampled:
        """The loop itself, with the order and the noise given.

        Args:
          latents: In generation order; only those known beforehand are looked at.
          order: Grid position of the i-th token drawn.
        """
        ends = step_ends(self.network.length, self.num_ar_steps, num_known=self.num_known)
        starts = step_starts(self.network.length, self.num_ar_steps, num_known=self.num_known)
        # For guidance the official code counts the last step as if it left one token.
        stops = np.minimum(ends, self.network.length - 1)
        num_rows = self.guidance.both(label).shape[0]

        params = layout.rounded(params, self.network.dtype)
        carry, traces = (latents, refiner.init(label)), []
        for bucket in self.buckets():
            steps = np.arange(bucket.start, bucket.stop)
            weights = self.laid_out(params, bucket, num_rows=num_rows)

            def body(
                carry: tuple, step: tuple, bucket: Bucket = bucket, weights: types.Params = weights
            ) -> tuple[tuple, Any]:
                return self._step(weights, carry, step, order, label, noise_of, refiner, bucket)

            inputs = tuple(jnp.asarray(x) for x in (steps, starts[steps], stops[steps]))
            carry, trace = jax.lax.scan(body, carry, inputs)
            traces.append(trace)
        latents, refiner_state = carry
        cond = None
        if self.trace:
            drawn, refined = (jnp.concatenate(x) for x in zip(*traces, strict=True))
            cond = (jnp.moveaxis(drawn, 0, 1), jnp.moveaxis(refined, 0, 1))
        latents = mar.in_grid(latents, order)
        return sampled.Sampled(
            types.Tokens(latents=latents), cond=cond, refiner_state=refiner_state
        )

    def buckets(self) -> list[Bucket]:
        """The steps in groups, so that the least work is wasted on padding."""
        network, head = self.network, self.network.head
        encoder = 12 * network.encoder_depth * network.encoder_width**2
        denoiser = 5 * head.depth * head.width**2 * self.solver.num_evaluations
        return fewest_padded(
            step_ends(network.length, self.num_ar_steps, num_known=self.num_known),
            num_known=self.num_known,
            num_buckets=self.num_buckets,
            slot_cost=encoder,
            drawn_cost=denoiser,
        )

    def laid_out(self, params: types.Params, bucket: Bucket, *, num_rows: int) -> types.Params:
        """The parameters for the steps of a bucket: the head runs on a few tokens, often."""
        return {
            **params,
            "denoiser": layout.for_rows(params["denoiser"], num_rows * bucket.num_drawn),
        }

    def apply(self, params: types.Params, *args: Any, method: Callable) -> Any:
        """Runs a method of the network."""
        return self.network.apply({"params": params}, *args, method=method)

    def _step(
        self,
        params: types.Params,
        carry: tuple[Float[Array, "b l c"], types.RefinerState],
        step: tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]],
        order: Int[Array, "b l"],
        label: Int[Array, " b"],
        noise_of: NoiseOf,
        refiner: types.Refiner,
        bucket: Bucket,
    ) -> tuple[tuple, Any]:
        (latents, state), (slot, start, stop) = carry, step
        prompts = self.guidance.prompts(self.network, label)
        both = self.guidance.both
        cond = self._condition(params, both(latents), both(order), prompts, start, bucket)
        refine = functools.partial(
            refine_columns, refiner=refiner, state=state, slot=slot, label=label
        )
        refined, state = self.guidance.refine(refine, cond)
        drawn = self.draw(params, refined, start, stop, noise_of, bucket)
        latents = jax.lax.dynamic_update_slice_in_dim(latents, drawn, start, axis=1)
        trace = None
        if self.trace:
            trace = tuple(self.guidance.conditional(x)[:, 0] for x in (cond, refined))
        return (latents, state), trace

    def _condition(
        self,
        params: types.Params,
        latents: Float[Array, "n l c"],
        order: Int[Array, "n l"],
        label: Int[Array, " n"],
        start: Int[Array, ""],
        bucket: Bucket,
    ) -> Float[Array, "n k d"]:
        """Conditions of the tokens from number `start` on, which is also how many are visible."""
        slots = slice(bucket.num_slots)

        def run(network: mar.MAR) -> Float[Array, "n k d"]:
            encoded = network.encode(latents[:, slots], order[:, slots], label, start)
            return network.decode(encoded, order, start, start, bucket.num_drawn)

        return self.apply(params, method=run)

    def draw(
        self,
        params: types.Params,
        cond: Float[Array, "n k d"],
        start: Int[Array, ""],
        stop: Int[Array, ""],
        noise_of: NoiseOf,
        bucket: Bucket,
    ) -> Float[Array, "b k c"]:
        """Latents of the tokens from number `start` on, of which those to `stop` are due."""
        weight = self.guidance.weight(start, stop, self.network.length)
        noise = noise_of(start + jnp.arange(bucket.num_drawn))

        def denoise(x: Float[Array, "b k c"], t: Int[Array, ""]) -> Float[Array, "b k two_c"]:
            x = self.guidance.both(x)
            output = self.apply(params, x, t, cond, method=mar.MAR.denoise)
            return self.guidance.combine_noise(output, weight)

        return self.solver(denoise, noise[0], noise[1:])


def refine_columns(
    cond: Float[Array, "b k d"],
    refiner: types.Refiner,
    state: types.RefinerState,
    *,
    slot: Int[Array, ""],
    label: Int[Array, " b"],
) -> tuple[Float[Array, "b k d"], types.RefinerState]:
    """Refines the tokens of one step, one token of every row at a time.

    The order is random, so all tokens of a step have one law; a refiner is called once for each and
    sees as many rows as ever.
    """

    def body(state: types.RefinerState, column: Float[Array, "b d"]) -> tuple:
        refined, state = refiner(column, state, slot=slot, label=label)
        return state, refined

    state, refined = jax.lax.scan(body, state, jnp.moveaxis(cond, 1, 0))
    return jnp.moveaxis(refined, 0, 1), state


def step_ends(length: int, num_steps: int, *, num_known: int = 0) -> Int[np.ndarray, " steps"]:
    """How many tokens are there after each step, those known beforehand included.

    The share still masked falls along a cosine, every step draws at least one token and the last
    step the rest.

    Raises:
      ValueError: no step, or more steps than tokens to draw.

    Source: MaskGIT (Chang et al., 2022), section 3.3; MAR, models/mar.py, `sample_tokens`.
    """
    total = length - num_known
    if not 0 <= num_known < length:
        raise ValueError(f"{num_known} of {length} tokens are known: leave at least one to draw")
    if not 1 <= num_steps <= total:
        raise ValueError(
            f"num_ar_steps {num_steps} is out of range: there are {total} tokens to draw, so use "
            f"1 to {total}"
        )
    left, masked = total, []
    for step in range(num_steps):
        cosine = int(np.floor(total * np.cos(np.pi / 2 * (step + 1) / num_steps)))
        left = max(1, min(left - 1, cosine))
        masked.append(left)
    masked[-1] = 0
    return length - np.array(masked)


def step_starts(length: int, num_steps: int, *, num_known: int = 0) -> Int[np.ndarray, " steps"]:
    """How many tokens are there before each step; arguments and errors as of `step_ends`."""
    return np.append(num_known, step_ends(length, num_steps, num_known=num_known)[:-1])


def fewest_padded(
    ends: Int[np.ndarray, " steps"],
    *,
    num_known: int,
    num_buckets: int,
    slot_cost: int,
    drawn_cost: int,
) -> list[Bucket]:
    """Cuts the steps into at most `num_buckets` runs whose padded work is least.

    A step sees the tokens of the steps before it and draws up to its end. Dynamic programming over
    the place of the last cut. The tokens a step draws beyond those due must exist, which can ask
    for more buckets than wanted; then it gets as many as needed.

    Args:
      slot_cost: Of a token in the encoder for one step, in any unit.
      drawn_cost: Of drawing a token, in the same.
    """
    num_steps, length = len(ends), int(ends[-1])
    starts = np.append(num_known, ends[:-1])
    due = ends - starts

    def cost(start: int, stop: int) -> float:
        widest = due[start:stop].max()
        if starts[stop - 1] + widest > length:
            return math.inf
        return float((stop - start) * (starts[stop - 1] * slot_cost + widest * drawn_cost))

    costs = {(i, j): cost(i, j) for j in range(1, num_steps + 1) for i in range(j)}
    least = [0.0] + [math.inf] * num_steps  # cost of the first j steps
    edges: list[list[int]] = [[0]] + [[]] * num_steps  # where they are cut
    for count in range(1, num_steps + 1):
        for j in range(
            num_steps, 0, -1
        ):  # downwards, so that the entries before j are of count - 1
            i = min(range(j), key=lambda i: least[i] + costs[i, j])
            if least[i] + costs[i, j] < least[j]:
                least[j], edges[j] = least[i] + costs[i, j], [*edges[i], j]
        if count >= num_buckets and math.isfinite(least[-1]):
            break
    return [
        Bucket(i, j, num_slots=int(starts[j - 1]), num_drawn=int(due[i:j].max()))
        for i, j in itertools.pairwise(edges[-1])
    ]
