"""A backbone of one's own: the next code from the mean of the codes so far, class and position."""

import flax.linen as nn
import flax.struct
import jax.numpy as jnp

from arcond_jax.nn import linear, parameter


@flax.struct.dataclass
class Cache:
    total: jnp.ndarray
    count: jnp.ndarray


class Bag(nn.Module):
    """The network, a `types.CausalModel` of codes."""

    length: int
    num_codes: int
    num_classes: int
    width: int

    window = 1
    channels = None
    unrolled = True
    normalised = True

    def setup(self):
        self.class_embed = linear.Embed(self.num_classes + 1, self.width)
        self.code_embed = linear.Embed(self.num_codes, self.width)
        self.position = parameter.parameter(
            self, "position", parameter.normal_init, (self.length, self.width), (None, "embed")
        )
        self.hidden = linear.Linear((self.width,), ("embed", "mlp"), True)
        self.code_head = linear.Linear((self.num_codes,), ("embed", "vocab"))

    @property
    def factor_sizes(self):
        return (self.num_codes,)

    def no_prompt(self, num_rows):
        return jnp.full((num_rows,), self.num_classes, jnp.int32)

    def null(self, prompt):
        return jnp.full_like(prompt, self.num_classes)

    def empty_cache(self, prompt, spare=0):
        return Cache(jnp.zeros((prompt.shape[0], 1, self.width)), jnp.zeros(()))

    def prefix(self, prompt, at):
        return self.class_embed(prompt)[:, None], at

    def embed(self, token, at):
        return self.code_vectors(token.codes[..., 0, :])

    def code_vectors(self, codes):
        return self.code_embed(codes[..., 0])

    def advance(self, x, about, prompt, cache):
        before = Cache(jnp.zeros_like(x[:, :1]), jnp.zeros(())) if cache is None else cache
        total = before.total + jnp.cumsum(x, axis=1)
        count = before.count + 1 + jnp.arange(x.shape[1])
        mean = total / count[:, None]
        cond = jnp.tanh(self.hidden(mean + self.position[about]))
        return cond, cache and Cache(total[:, -1:], count[-1])

    def rows(self, cond, at):
        return cond[..., None, :]

    def where(self, at):
        return None

    def factor_logits(self, row, factors):
        return self.code_head(row)

    def all_factor_logits(self, row, factors):
        return [self.code_head(row)]
