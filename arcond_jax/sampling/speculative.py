"""Several codes a call of the network: drafts are guessed, verified together, and kept while right.

Each call is fed the last code and the drafts of those after it. Its conditions give the law that
the raster loop would draw each of them from. How many drafts are kept is drawn by chances that
leave this law exactly as it is, and the code behind them from what remains of it. So the images
are those of `raster.Raster` in law, whatever the drafts, and better drafts take fewer calls. Rows
advance each at its own pace. Models of codes alone.

A code in several factors is verified factor by factor, each given those before it.

Source: Leviathan et al. (2023), "Fast Inference from Transformers via Speculative Decoding"; Chen
et al. (2023), "Accelerating Large Language Model Decoding with Speculative Sampling"; Sun et al.
(2024), "Block Verification Accelerates Speculative Decoding". That the drafts come from the
verified model's own conditions is of Stern et al. (2018), "Blockwise Parallel Decoding". Relaxed
acceptance, which has every draft pass on its own, is this library's own.
"""

import dataclasses
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from arcond_jax import types
from arcond_jax.nn import attention, layout
from arcond_jax.nn import factors as factors_lib
from arcond_jax.sampling import filters, heads, raster, sampled

DRAFT, ACCEPT, DRAW = range(3)  # streams of random numbers at each position

Laws = tuple[Float[Array, "b _ _"], ...]  # probabilities of each factor, by entry and value


def residual(p: Float[Array, "*n v"], q: Float[Array, "*n v"]) -> Float[Array, "*n v"]:
    """What is left of the law p where a draft from q was refused: max(p - q, 0), normalised.

    p may be weighed, of a sum of at most 1. Where nothing is left, which has no chance but by
    rounding, p stands.
    """
    left = jnp.maximum(p - q, 0.0)
    total = jnp.sum(left, axis=-1, keepdims=True)
    return jnp.where(total > 0, left / jnp.where(total > 0, total, 1.0), p)


def relaxed_law(
    p: Float[Array, "*n v"], q: Float[Array, "*n v"], relaxed: float
) -> tuple[Float[Array, "*n v"], Float[Array, "*n"]]:
    """The law of one factor drafted from q, verified against p; its total variation from p.

    A draft is accepted with probability min(1, relaxed p / q) and else drawn again from `residual`.
    For relaxed = 1 this is p.
    """
    accepted = jnp.minimum(q, relaxed * p)
    refused = 1.0 - jnp.sum(accepted, axis=-1, keepdims=True)
    law = accepted + jnp.maximum(refused, 0.0) * residual(p, q)
    return law, jnp.sum(jnp.abs(law - p), axis=-1) / 2


def block_weights(log_ratio: Float[Array, "b n"]) -> Float[Array, "b n_plus_1"]:
    """w_i = min(1, w_{i-1} p_i / q_i) behind i drafts, from w_0 = 1.

    Args:
      log_ratio: log p_i - log q_i of each draft.

    Source: as `block_chances`. Of log w, a walk that is kept below 0, in closed form.
    """
    walk = jnp.cumsum(jnp.pad(log_ratio, ((0, 0), (1, 0))), axis=-1)
    return jnp.exp(walk - jax.lax.cummax(walk, axis=1))


def block_chances(
    weights: Float[Array, "b n_plus_1"], left: Float[Array, "b n"]
) -> Float[Array, "b n"]:
    """The chances to accept the first 1 to n drafts together.

    Each is tried apart, and the longest that is accepted stands: the first i with chance
    m / (m + 1 - w_i), where m is what is left of the law that follows them, and all n with w_n. So
    more drafts stand than if each had to on its own, and what is drawn follows the law as exactly:
    behind i drafts from `residual` of w_i p.

    Args:
      weights: Of `block_weights`.
      left: m of each draft and the weight before it: the sum of max(w_{i-1} p_i - q_i, 0).

    Source: Sun et al. (2024), "Block Verification Accelerates Speculative Decoding", algorithm 2.
    """
    behind, left = weights[:, 1:-1], left[:, 1:]
    whole = behind >= 1.0  # where nothing may be left, as both laws are the same
    some = jnp.where(whole, 1.0, left / jnp.where(whole, 1.0, left + 1.0 - behind))
    return jnp.concatenate([some, weights[:, -1:]], axis=-1)


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Carry:
    """What one call hands to the next.

    Attributes:
      codes: Those that are final, and behind them anything.
      position: How many are final.
      cache: Of the prompt and all final codes but the last.
      drafts: Guesses of those that come next.
      laws: The probabilities they were drawn with.
      emitted: Calls that gave 1 to w codes.
      variation: Sum of total variations over verified codes; their number.
    """

    codes: Int[Array, "b l factors"]
    position: Int[Array, " b"]
    cache: attention.Cache
    drafts: Int[Array, "b drafts factors"]
    laws: Laws
    emitted: Int[Array, "b w"]
    variation: tuple[Float[Array, " b"], Int[Array, " b"]]


@no_type_check  # holds keys and trees
@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same over one run."""

    weights: types.Params
    prompts: types.Prompt
    label: Int[Array, " b"]
    refiner: types.Refiner
    row_rngs: Key[Array, " b"]
    prefix: Int[Array, ""]  # tokens of the prompt

    def rngs(self, position: Int[Array, " b"], stream: int) -> Key[Array, " b"]:
        """Of each row at its position, whatever the others do."""
        fold = jax.vmap(jax.random.fold_in)
        return jax.vmap(jax.random.fold_in, (0, None))(fold(self.row_rngs, position), stream)


@dataclasses.dataclass(frozen=True, eq=False)
class Speculative:
    """Emits the drafts that the network itself would have drawn, and one code more.

    Attributes:
      base: Everything but the drafts, which its head leaves "off".
      relaxed: Accepts drafts this many times as often as their law allows; 1 or more. Above 1
        every draft has to pass on its own, images no longer follow the law of `base`, and
        `Sampled.variation` says by how much.

    Raises:
      ValueError: A base for which this makes no sense, or `relaxed` below 1.
    """

    base: raster.Raster
    relaxed: float = 1.0

    def __post_init__(self) -> None:
        if len(self.base.heads) != 1 or not isinstance(self.base.heads[0], heads.Codes):
            raise ValueError("speculative sampling needs a model of codes alone")
        if self.head.drafts != "off" or self.base.trace:
            raise ValueError("speculative sampling shows no drafts and traces no conditions")
        if not hasattr(self.network, "draft_rows"):
            raise ValueError("speculative sampling needs a network that drafts, as in windows")
        if not self.relaxed >= 1.0:
            raise ValueError(f"relaxed {self.relaxed} must be at least 1")

    @property
    def head(self) -> heads.Codes:
        """What draws codes and drafts."""
        head = self.base.heads[0]
        assert isinstance(head, heads.Codes)
        return head

    @property
    def network(self) -> Any:
        return self.base.network

    @property
    def num_drafts(self) -> int:
        return self.network.num_drafts

    def __call__(
        self,
        params: types.Params,
        rng: Key[Array, ""],
        prompt: types.Prompt,
        *,
        refiner: types.Refiner,
        code_law: types.CodeLaw | None = None,
        first_row: Int[Array, ""] | int = 0,
    ) -> sampled.Sampled:
        """Draws one code grid per prompt; rows as in `raster.Raster`.

        `code_law` is not looked at: it is about latents. Rows are refined one by one, for which
        each has the maps of its slot copied.

        Raises:
          ValueError: The refiner carries something from slot to slot or row to row, or the cache of
            the network cannot take drafts back.
        """
        label = types.group_of(prompt)
        check_refiner(refiner, label)
        prompts = self.base.guidance.prompts(self.network, prompt)
        x, cache = self.base.start(params, prompts, spare=self.num_drafts)
        if not isinstance(cache, attention.Cache):
            raise ValueError("speculative sampling needs a network whose cache is attention.Cache")
        num_tokens = types.num_rows(prompts) * (1 + self.num_drafts)
        run = Run(
            weights=self.base.laid_out(params, num_tokens),
            prompts=prompts,
            label=label,
            refiner=refiner,
            row_rngs=sampled.row_rngs(rng, label.shape[0], first_row),
            prefix=cache.index + 1,
        )
        once = dataclasses.replace(run, weights=params)  # too few products to lay weights out for
        carry = jax.lax.while_loop(
            lambda carry: jnp.any(carry.position < self.network.length),
            lambda carry: self._call(run, carry),
            self._first(once, x, cache),
        )
        codes = factors_lib.join(carry.codes, self.network.factor_sizes)
        total, count = carry.variation
        return sampled.Sampled(
            tokens=types.Tokens(codes=codes[:, : self.network.length]),
            emitted=carry.emitted,
            variation=total / jnp.maximum(count, 1) if self.relaxed > 1.0 else None,
        )

    def _first(self, run: Run, x: Float[Array, "rows 1 d"], cache: attention.Cache) -> Carry:
        """After the end of the prompt: one code, in one call, and the first drafts."""
        position = jnp.zeros(run.label.shape, jnp.int32)
        place = self._place(run, position[:, None])
        cond, cache = self._advance(run, place, x, cache)
        rows = place.apply(cond, self._at(place, place.ahead(1)), method="rows")[..., 0, :]
        code = self.head.draw_rows(place, rows, run.rngs(position, DRAW))[0]
        beyond = self.network.length + self.num_drafts
        drafts, laws = self._draft(run, cond[:, 0], code[:, 0], position + 1)
        return Carry(
            codes=jnp.pad(code, ((0, 0), (0, beyond), (0, 0))),
            position=position + 1,
            cache=self._taken_back(run, cache, position + 1),
            drafts=drafts,
            laws=laws,
            emitted=jnp.zeros((code.shape[0], 1 + self.num_drafts), jnp.int32).at[:, 0].set(1),
            variation=(jnp.zeros(code.shape[0]), jnp.zeros(code.shape[0], jnp.int32)),
        )

    def _call(self, run: Run, carry: Carry) -> Carry:
        """One call of the network: verifies the drafts, draws one code, and drafts anew."""
        network, position = self.network, carry.position
        entries = jnp.arange(1 + self.num_drafts)
        last = jnp.take_along_axis(carry.codes, position[:, None, None] - 1, axis=1)
        fed = jnp.concatenate([last, carry.drafts], axis=1)
        place = self._place(run, position[:, None] + entries)
        x = self._embed(run, fed, position - 1)
        cond, cache = self._advance(run, place, x, carry.cache)
        rows = place.apply(cond, self._at(place, place.ahead(1)), method="rows")[..., 0, :]

        laws = self._laws(place, rows, carry.drafts)
        passed, weight, variation = self._verified(run, carry, laws)
        stop, factor = jnp.divmod(passed, len(laws))
        final = self._final(run, carry, rows, laws, stop, factor, weight)
        drafts = jnp.pad(carry.drafts, ((0, 0), (0, 1), (0, 0)))
        codes = jnp.where((entries == stop[:, None])[..., None], final[:, None], drafts)

        count = jnp.minimum(stop + 1, network.length - position)  # 0 in a row that is done
        position = position + count
        drawn_from = _pick(cond, self.base.guidance.both(stop))
        new, new_laws = self._draft(run, drawn_from, final, position)
        write = jax.vmap(lambda into, x, at: jax.lax.dynamic_update_slice(into, x, (at, 0)))
        return Carry(
            codes=write(carry.codes, codes, carry.position),
            position=position,
            cache=self._taken_back(run, cache, position),
            drafts=new,
            laws=new_laws,
            emitted=carry.emitted + (entries + 1 == count[:, None]),
            variation=variation,
        )

    def _place(self, run: Run, position: Int[Array, "b *n"]) -> heads.Place:
        """Where each condition of each row is; beyond the end as at the last position."""
        position = jnp.minimum(position, self.network.length - 1)
        params = layout.together(run.weights)
        return heads.Place(self.network, params, self.base.guidance, position)

    def _at(self, place: heads.Place, at: Int[Array, "b *n"]) -> Int[Array, "rows *n"]:
        return place.guidance.both(at)

    def _embed(
        self, run: Run, codes: Int[Array, "b n factors"], start: Int[Array, " b"]
    ) -> Float[Array, "rows n d"]:
        """Codes of the positions from `start` on, each in a window that shows nothing else."""
        width, n = self.network.window, codes.shape[1]
        held = jnp.pad(codes[:, :, None], ((0, 0), (0, 0), (0, width - 1), (0, 0)))
        seen = jnp.broadcast_to(jnp.arange(width) < 1, held.shape[:-1])
        place = self._place(run, start)
        token = types.Token(codes=held, seen=seen)
        both = jax.tree.map(place.guidance.both, (token, place.ahead(n + width)))
        return place.apply(*both, method="embed")

    def _advance(
        self, run: Run, place: heads.Place, x: Float[Array, "rows n d"], cache: attention.Cache
    ) -> tuple[Float[Array, "rows n d"], attention.Cache]:
        """Refined conditions about the positions of `place`."""
        about = self._at(place, place.position)
        cond, cache = place.apply(x, about, run.prompts, cache, method="advance")

        def alone(cond: Array, slot: Array, label: Array) -> Array:
            label = label[None]
            state = run.refiner.init(label)
            return run.refiner(cond[None], state, slot=slot, label=label)[0][0]

        each = jax.vmap(jax.vmap(alone, (0, 0, None)))
        refined, _ = place.guidance.refine(
            lambda cond: (each(cond, place.position, run.label), None), cond
        )
        return refined, cache

    def _taken_back(
        self, run: Run, cache: attention.Cache, position: Int[Array, " b"]
    ) -> attention.Cache:
        """The cache without what is not final, and without the last code that is."""
        index = run.prefix + position - 1
        return dataclasses.replace(cache, index=self.base.guidance.both(index))

    def _draft(
        self,
        run: Run,
        cond: Float[Array, "rows d"],
        code: Int[Array, "b factors"],
        position: Int[Array, " b"],
    ) -> tuple[Int[Array, "b drafts factors"], Laws]:
        """Guesses from `position` on, after a code and from the condition it was drawn from."""
        place = self._place(run, position[:, None] + jnp.arange(self.num_drafts))
        at = self._place(run, position - 1).ahead(1 + self.num_drafts)
        both = place.guidance.both
        rows = place.apply(cond, both(code), both(at), method="draft_rows")
        drafts, laws = self.head.draw_rows(place, rows, run.rngs(position, DRAFT))
        return drafts, tuple(_probabilities(law) for law in laws)

    def _laws(
        self,
        place: heads.Place,
        rows: Float[Array, "rows w d"],
        drafts: Int[Array, "b drafts factors"],
    ) -> Laws:
        """Of every factor at every position, given the drafted factors before it."""
        told = place.guidance.both(jnp.pad(drafts, ((0, 0), (0, 1), (0, 0))))
        logits = place.apply(rows, told, method="all_factor_logits")
        return tuple(_probabilities(self.head.law(place, x, i)) for i, x in enumerate(logits))

    def _verified(
        self, run: Run, carry: Carry, laws: Laws
    ) -> tuple[Int[Array, " b"], Float[Array, " b"], tuple[Float[Array, " b"], Int[Array, " b"]]]:
        """How many factors of the drafts pass, the weight of the law behind them, the variation."""
        num_rows, num_drafts, num_factors = carry.drafts.shape
        rngs = run.rngs(carry.position, ACCEPT)
        uniform = jax.vmap(lambda rng: jax.random.uniform(rng, (num_drafts, num_factors)))(rngs)

        def of_drafts(laws: Laws) -> Float[Array, "b drafts factors"]:
            chosen = (
                jnp.take_along_axis(law[:, :num_drafts], carry.drafts[..., i, None], axis=-1)
                for i, law in enumerate(laws)
            )
            return jnp.concatenate(list(chosen), axis=-1)

        p, q = of_drafts(laws), of_drafts(carry.laws)
        if self.relaxed > 1.0:
            accepted = uniform * q < self.relaxed * p
            passed = jnp.sum(jnp.cumprod(accepted.reshape(num_rows, -1), axis=-1), axis=-1)
            return passed, jnp.ones(num_rows), self._variation(carry, laws, accepted)

        weights = block_weights((jnp.log(p) - jnp.log(q)).reshape(num_rows, -1))
        before = weights[:, :-1].reshape(p.shape)
        left = [
            jnp.sum(jnp.maximum(before[..., i, None] * p[:, :num_drafts] - q, 0.0), axis=-1)
            for i, (p, q) in enumerate(zip(laws, carry.laws, strict=True))
        ]
        left = jnp.stack(left, axis=-1).reshape(num_rows, -1)
        accepted = uniform.reshape(num_rows, -1) < block_chances(weights, left)
        passed = jnp.max(jnp.where(accepted, jnp.arange(1, accepted.shape[1] + 1), 0), axis=-1)
        return passed, _pick(weights, passed), carry.variation

    def _final(
        self,
        run: Run,
        carry: Carry,
        rows: Float[Array, "rows w d"],
        laws: Laws,
        stop: Int[Array, " b"],
        factor: Int[Array, " b"],
        weight: Float[Array, " b"],
    ) -> Int[Array, "b factors"]:
        """The code at `stop`: accepted factors, then from the residual, then from the law."""
        place = self._place(run, (carry.position + stop)[:, None])
        row = _pick(rows, place.guidance.both(stop))[:, None]
        draft = _pick(jnp.pad(carry.drafts, ((0, 0), (0, 1), (0, 0))), stop)
        rngs = run.rngs(carry.position, DRAW)
        factors = jnp.zeros((stop.shape[0], 0), jnp.int32)
        for i in range(len(laws)):
            law = _pick(laws[i], stop)
            if i:  # factors before it may be others than those of the draft
                told = place.guidance.both(factors[:, None])
                logits = place.apply(row, told, method="factor_logits")
                law = _probabilities(self.head.law(place, logits, i))[:, 0]
            drafted = _pick(jnp.pad(carry.laws[i], ((0, 0), (0, 1), (0, 0))), stop)  # 0 behind them
            refused = (factor == i)[:, None]
            chosen = jnp.log(jnp.where(refused, residual(weight[:, None] * law, drafted), law))
            factor_rngs = jax.vmap(jax.random.fold_in, (0, None))(rngs, i)
            drawn = jax.vmap(filters.categorical)(factor_rngs, chosen)
            drawn = jnp.where(i < factor, draft[:, i], drawn)
            factors = jnp.concatenate([factors, drawn[:, None]], axis=-1)
        return factors

    def _variation(
        self, carry: Carry, laws: Laws, accepted: Bool[Array, "b drafts factors"]
    ) -> tuple[Float[Array, " b"], Int[Array, " b"]]:
        """With the total variation of what was verified in this call, each draft on its own.

        Of a code in factors those of its verified factors are added, which bounds its own.
        """
        num_rows, num_drafts, _ = accepted.shape
        flat = accepted.reshape(num_rows, -1)
        reached = jnp.cumprod(jnp.pad(flat, ((0, 0), (1, 0)), constant_values=1)[:, :-1], axis=-1)
        inside = carry.position[:, None] + jnp.arange(num_drafts) < self.network.length
        verified = reached.reshape(accepted.shape) * inside[..., None]
        apart = [
            relaxed_law(p[:, :num_drafts], q, self.relaxed)[1]
            for p, q in zip(laws, carry.laws, strict=True)
        ]
        total, count = carry.variation
        total = total + jnp.sum(verified * jnp.stack(apart, axis=-1), axis=(1, 2))
        return total, count + jnp.sum(verified[..., 0], axis=1)


def check_refiner(refiner: types.Refiner, label: Int[Array, " b"]) -> None:
    """Raises ValueError for a refiner that carries something from slot to slot or row to row."""
    try:
        carried = jax.tree.leaves(jax.eval_shape(refiner.init, label[:1]))
    except ValueError:  # it cannot do with one row
        carried = [None]
    if carried:
        raise ValueError(
            "speculative sampling has rows at different positions: refinement in the batch, its "
            "calibration and the term R need them at the same"
        )


def _probabilities(logits: Float[Array, "*n v"]) -> Float[Array, "*n v"]:
    return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


def _pick(x: Array, entry: Int[Array, " b"]) -> Array:
    """Of each row [b, n, *m] one entry: [b, *m]."""
    return jnp.take_along_axis(x, entry.reshape(-1, *[1] * (x.ndim - 1)), axis=1)[:, 0]
