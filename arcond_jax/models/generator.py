"""What the trainable models of all families share: initial values, prompts dropped, streams."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from arcond_jax import types


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """A network with its training loss; the part of `types.Generator` that is the same for all.

    Attributes:
      network: The Linen module. It has `no_prompt`, `null` and `touch_all`.
      label_dropout: Chance that a sample is trained without its label or caption.
    """

    network: Any
    label_dropout: float = dataclasses.field(default=0.1, kw_only=True)

    # What is random in a step, in an order that never changes: a run goes on with its numbers.
    streams: ClassVar[tuple[str, ...]] = ("prompt",)

    def init(self, rng: Key[Array, ""]) -> types.Params:
        """Parameters, boxed with their logical axis names."""
        prompt = self.network.no_prompt(1)
        return self.network.init(rng, prompt, method="touch_all")["params"]

    def apply(self, params: types.Params, *args: Any, **options: Any) -> Any:
        """Runs the network, or the method of it that `method` says."""
        return self.network.apply({"params": params}, *args, **options)

    def rngs(self, rng: Key[Array, ""]) -> dict[str, Key[Array, ""]]:
        """One key for each stream."""
        return dict(zip(self.streams, jax.random.split(rng, len(self.streams)), strict=True))

    def with_prompts_dropped(self, prompt: types.Prompt, rng: Key[Array, ""]) -> Any:
        """Some rows ask for nothing."""
        dropped = jax.random.bernoulli(rng, self.label_dropout, (types.num_rows(prompt),))

        def choose(null: Array, given: Array) -> Array:
            return jnp.where(dropped.reshape(-1, *[1] * (given.ndim - 1)), null, given)

        return jax.tree.map(choose, self.network.null(prompt), prompt)


def wanted(tokens: types.Tokens, kind: str) -> Array:
    """The "codes" or "latents" of tokens.

    Raises:
      ValueError: They hold none.
    """
    found = getattr(tokens, kind)
    if found is None:
        raise ValueError(f"the model predicts {kind}, and these tokens hold none")
    return found
