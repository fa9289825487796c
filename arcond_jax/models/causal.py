"""Training a causal model: conditions from real prefixes, and a loss for each thing drawn there.

Whatever the model, the same few calls of `types.CausalModel` serve: the prompt and the tokens
before a position are embedded, the conditions of all positions come from one pass, and the losses
of codes and latents are taken there, as the sampling loop draws codes and latents there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from arcond_jax import types
from arcond_jax.models import generator, losses, measures, tensorar, windows
from arcond_jax.nn import factors as factors_lib


def teacher_forced(
    network: types.CausalModel,
    token: types.Token,
    prompt: types.Prompt,
    at: Int[Array, "*b l"],
) -> Float[Array, "b l d"]:
    """Conditions of all positions; a method for `apply`.

    Args:
      token: All but the last of those visited, in that order.
      at: Positions in the order they are visited.
    """
    prefix, about = network.prefix(prompt, at[..., :1])
    beyond = jnp.repeat(at[..., -1:], network.window - 1, axis=-1)
    ahead = jnp.concatenate([at, beyond], axis=-1)
    x = jnp.concatenate([prefix, network.embed(token, ahead)], axis=1)
    about = jnp.concatenate([about, at[..., 1:]], axis=-1)
    return network.advance(x, about, prompt, None)[0][:, prefix.shape[1] - 1 :]


def touch_all(network: Any, prompt: types.Prompt) -> None:
    """Runs every part once, for initialisation; a method for `init`."""
    shape = (types.num_rows(prompt), network.length)
    codes = latents = None
    if network.factor_sizes:
        codes = jnp.zeros((*shape, len(network.factor_sizes)), jnp.int32)
    if network.channels is not None:
        latents = jnp.zeros((*shape, network.channels))
    token = given(codes, latents, network.window)
    cond = teacher_forced(network, token, prompt, jnp.arange(network.length))
    if codes is not None:
        rows = network.rows(cond, jnp.zeros((1, network.window), jnp.int32))
        network.all_factor_logits(rows[..., 0, :], codes)
        if isinstance(network, tensorar.Drafter):
            network.draft_rows(cond, codes, jnp.zeros((1, network.num_drafts + 1), jnp.int32))
    if latents is not None:
        told = network.latent_cond(cond, None if codes is None else codes[..., 0])
        network.denoise(latents, jnp.zeros(shape, jnp.int32), told)


def given(
    codes: Int[Array, "b l factors"] | None, latents: Float[Array, "b l c"] | None, window: int
) -> types.Token:
    """All tokens but the last as sampling without drafts feeds them."""
    token = types.Token(latents=None if latents is None else latents[:, :-1])
    if codes is None:
        return token
    seen = jnp.broadcast_to(jnp.arange(window) < 1, (*codes[:, :-1].shape[:-1], window))
    return dataclasses.replace(token, codes=windows.of(codes, window)[:, :-1], seen=seen)


@dataclasses.dataclass(frozen=True, eq=False)
class Fed:
    """A batch as a step of training sees it, in the order positions are visited.

    Attributes:
      prompt: With some rows asking for nothing.
      at: The positions in that order.
      codes, latents: The real tokens.
      plain, token: What is fed, without drafts and with those of training.
      metrics: What to log of the order.
    """

    prompt: types.Prompt
    at: Int[Array, "*b l"]
    codes: Int[Array, "b l factors"] | None
    latents: Float[Array, "b l c"] | None
    plain: types.Token
    token: types.Token
    metrics: types.Metrics


@dataclasses.dataclass(frozen=True, eq=False)
class Generator(generator.Generator):
    """Initialisation and training loss of a `types.CausalModel`; a `types.Generator`.

    Attributes:
      losses: What is trained from the conditions.
      drafts: What the windows fed in show beyond their first code.
      frozen: Whether the model inside windows stays as it is.
    """

    losses: tuple[losses.Loss, ...]
    drafts: windows.Drafts = dataclasses.field(default_factory=windows.Drafts)
    frozen: bool = dataclasses.field(default=False, kw_only=True)

    streams = ("prompt", "windows", "latents", "dropout")

    def init(self, rng: Key[Array, ""]) -> types.Params:
        """Parameters, boxed with their logical axis names."""
        return self.network.init(rng, self.network.no_prompt(1), method=touch_all)["params"]

    def conditions(
        self,
        params: types.Params,
        tokens: types.Tokens,
        prompt: types.Prompt,
        rng: Key[Array, ""] | None = None,
    ) -> Float[Array, "b l d"]:
        """Conditions in raster order from real prefixes, as sampling without drafts sees them.

        Nothing is drawn.
        """
        del rng
        codes, latents = self.own(tokens)
        token, at = given(codes, latents, self.network.window), jnp.arange(self.network.length)
        return self.apply(params, token, prompt, at, method=teacher_forced)

    def loss(
        self,
        params: types.Params,
        tokens: types.Tokens,
        prompt: types.Prompt,
        rng: Key[Array, ""],
        *,
        step: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, ""], types.Metrics]:
        """The weighted sum of the losses, and their parts."""
        rngs = self.rngs(rng)
        if self.frozen:
            params = tensorar.frozen(params)
        fed = self._fed(params, tokens, prompt, rngs, step)

        model = losses.Bound(self.network, {"params": params}, {"dropout": rngs["dropout"]})
        cond = model(fed.token, fed.prompt, fed.at, method=teacher_forced)
        total, metrics = jnp.zeros(()), fed.metrics
        told = (cond, fed.at, fed.codes, fed.latents, rngs["latents"])
        for part in self.losses:
            loss, parts = part(model, *told)
            total, metrics = total + loss, metrics | parts
        return total, {"loss": total} | metrics

    def window_metrics(
        self,
        params: types.Params,
        tokens: types.Tokens,
        prompt: types.Prompt,
        rng: Key[Array, ""],
        *,
        step: Int[Array, ""] | int = 0,
    ) -> types.Metrics:
        """What the drafts of training tell, and how often drafts would be accepted; no dropout.

        Arguments are those of `loss`, so that the drafts are those of that step.
        """
        fed = self._fed(params, tokens, prompt, self.rngs(rng), step)
        assert fed.codes is not None

        model = losses.Bound(self.network, {"params": params})
        cond = model(fed.plain, fed.prompt, fed.at, method=teacher_forced)
        masked = measures.next_cross_entropy(model, cond, fed.at, fed.codes)
        accepted = measures.acceptance(model, cond, fed.at, fed.codes)
        metrics = {f"windows/acceptance_{j}": x for j, x in enumerate(accepted, 1)}
        metrics |= {"windows/masked": masked}
        if fed.token is fed.plain:
            return metrics
        cond = model(fed.token, fed.prompt, fed.at, method=teacher_forced)
        noised = measures.next_cross_entropy(model, cond, fed.at, fed.codes)
        same = measures.unchanged(fed.token, fed.codes)[1:]
        metrics |= {f"windows/unchanged_{j}": x for j, x in enumerate(same, 1)}
        return metrics | {"windows/noised": noised, "windows/leak": masked - noised}

    def _fed(
        self,
        params: types.Params,
        tokens: types.Tokens,
        prompt: types.Prompt,
        rngs: dict[str, Key[Array, ""]],
        step: Int[Array, ""] | int,
    ) -> Fed:
        prompt = self.with_prompts_dropped(prompt, rngs["prompt"])
        codes, latents = self.own(tokens)
        at, metrics = self.visited(types.num_rows(prompt), rngs, step)
        if at.ndim > 1:
            codes, latents = jax.tree.map(
                lambda x: jnp.take_along_axis(x, at[..., None], axis=1), (codes, latents)
            )
        token = plain = given(codes, latents, self.network.window)
        if codes is not None and self.network.window > 1:
            token = self.drafts(
                plain,
                codes,
                rngs["windows"],
                factor_sizes=self.network.factor_sizes,
                draw=lambda rng: self._drawn(params, plain, prompt, at, rng),
            )
        return Fed(prompt, at, codes, latents, plain, token, metrics)

    def visited(
        self, num_rows: int, rngs: dict[str, Key[Array, ""]], step: Int[Array, ""] | int
    ) -> tuple[Int[Array, "*b l"], types.Metrics]:
        """Positions in the order they are visited, for all rows or for each; and what to log."""
        del num_rows, rngs, step
        return jnp.arange(self.network.length), {}

    def _drawn(
        self,
        params: types.Params,
        token: types.Token,
        prompt: types.Prompt,
        at: Int[Array, "*b l"],
        rng: Key[Array, ""],
    ) -> Int[Array, "b l w factors"]:
        """The windows that the model draws at all positions after what is fed."""
        cond = self.apply(params, token, prompt, at, method=teacher_forced)
        entries = windows.ahead(at, self.network.window)
        rows = self.apply(params, cond, entries, method="rows")
        factors = jnp.zeros((*rows.shape[:-1], 0), jnp.int32)
        for i in range(len(self.network.factor_sizes)):
            logits = self.apply(params, rows, factors, method="factor_logits")
            factor = jax.random.categorical(rng if i == 0 else jax.random.fold_in(rng, i), logits)
            factors = jnp.concatenate([factors, factor[..., None]], axis=-1)
        return factors

    def own(
        self, tokens: types.Tokens
    ) -> tuple[Int[Array, "b l factors"] | None, Float[Array, "b l c"] | None]:
        """Codes in factors and latents, of which the tokenizer may offer more than the model has.

        Raises:
          ValueError: It offers less.
        """
        network, codes, latents = self.network, None, None
        if network.factor_sizes:
            codes = factors_lib.split(generator.wanted(tokens, "codes"), network.factor_sizes)
        if network.channels is not None:
            latents = generator.wanted(tokens, "latents")
        return codes, latents
