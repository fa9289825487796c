"""The compiled sampling loop of every causal model: a scan over positions, prompts to tokens.

At each position the condition is refined, the heads draw from it one after another, and what they
drew is fed back.
"""

import dataclasses
import functools
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int, Key

from arcond_jax import types
from arcond_jax.nn import layout
from arcond_jax.sampling import guidance as guidance_lib
from arcond_jax.sampling import heads as heads_lib
from arcond_jax.sampling import sampled


@dataclasses.dataclass(frozen=True, eq=False)
class Raster:
    """Static choices of sampling from a `types.CausalModel`.

    Attributes:
      network: The Linen module. On a CPU a backbone whose `unroll` is its depth is the faster one.
      heads: What draws the token, in this order.
      guidance: Classifier-free guidance.
      trace: Also return the conditions before and after refinement.
      dtype: What the network computes in.

    Raises:
      ValueError: A head has nothing to draw from.
    """

    network: types.CausalModel
    heads: tuple[heads_lib.Head, ...]
    guidance: guidance_lib.Guidance = dataclasses.field(default_factory=guidance_lib.Guidance)
    trace: bool = False
    dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        for head in self.heads:
            head.check(self.network)

    def __call__(
        self,
        params: types.Params,
        rng: Key[Array, ""],
        prompt: types.Prompt,
        *,
        refiner: types.Refiner,
        code_law: types.CodeLaw | None = None,
        first_row: Int[Array, ""] | int = 0,
        codebook: Float[Array, "v c"] | None = None,
    ) -> sampled.Sampled:
        """Draws one token grid per prompt.

        Row i depends on (rng, first_row + i, its prompt) alone, whatever the batch or the mesh, if
        the refiner treats rows alone.

        Args:
          code_law: Needed for a warm start.
          first_row: Number of the first row, to continue a set of samples in another batch.
          codebook: Vectors of the codes, needed for noise on drafts that goes through them.
        """
        label = types.group_of(prompt)
        rngs_of_rows = sampled.row_rngs(rng, label.shape[0], first_row)
        prompts = self.guidance.prompts(self.network, prompt)
        weights = self.laid_out(params, types.num_rows(prompts))
        x, cache = self.start(params, prompts)
        start = Carry(x=x, cache=cache, refiner_state=refiner.init(label))

        def body(carry: Carry, position: Int[Array, ""]) -> tuple[Carry, dict[str, Array]]:
            place = heads_lib.Place(
                self.network,
                layout.together(weights),
                self.guidance,
                position,
                code_law,
                rngs_of_rows,
                codebook,
            )
            drawn, cache = place.apply(
                carry.x, position[None], prompts, carry.cache, method="advance"
            )
            refine = functools.partial(
                refiner, state=carry.refiner_state, slot=position, label=label
            )
            cond, state = self.guidance.refine(refine, drawn[:, 0])
            rngs = jax.vmap(jax.random.fold_in, (0, None))(rngs_of_rows, position)
            token, out = types.Token(), {}
            for head in self.heads:
                token, kept = head.draw(place, cond, token, rngs)
                out |= kept
            if self.trace:
                pair = (self.guidance.conditional(c) for c in (drawn[:, 0], cond))
                out |= dict(zip(("cond_drawn", "cond_refined"), pair, strict=True))
            both = jax.tree.map(self.guidance.both, token)
            x = place.apply(both, place.ahead(1 + self.network.window), method="embed")
            return Carry(x=x, cache=cache, refiner_state=state), out

        carry, out = jax.lax.scan(body, start, jnp.arange(self.network.length))
        out = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out)
        windows = out.get("codes")
        return sampled.Sampled(
            tokens=types.Tokens(
                latents=out.get("latents"), codes=None if windows is None else windows[..., 0]
            ),
            drafts=None if windows is None or windows.shape[-1] == 1 else windows,
            cond=(out["cond_drawn"], out["cond_refined"]) if self.trace else None,
            refiner_state=carry.refiner_state,
        )

    def laid_out(self, params: types.Params, num_rows: int) -> types.Params:
        """The parameters as the loop reads them fastest; inside it `layout.together` undoes it."""
        weights = layout.for_rows(layout.rounded(params, self.dtype), num_rows)
        return layout.apart(weights) if self.network.unrolled else weights

    def start(
        self, params: types.Params, prompts: types.Prompt, spare: int = 0
    ) -> tuple[Float[Array, "rows 1 d"], types.Cache]:
        """The last token of the prompt, which is fed first, and the cache of those before it.

        The cache has room for `spare` tokens beyond the end.
        """

        def run(network: Any) -> tuple[Float[Array, "rows 1 d"], types.Cache]:
            x, about = network.prefix(prompts, jnp.zeros(1, jnp.int32))
            cache = network.empty_cache(prompts, spare)
            if x.shape[1] > 1:
                _, cache = network.advance(x[:, :-1], about[:-1], prompts, cache)
            return x[:, -1:], cache

        return self.network.apply({"params": params}, method=run)


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class Carry:
    """What one position hands to the next: the embedded token, and everything remembered."""

    x: Float[Array, "rows 1 d"]
    cache: types.Cache
    refiner_state: types.RefinerState
