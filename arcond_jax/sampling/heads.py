"""What is drawn from the condition of a position: its code, and then its latent.

Each head is the counterpart of a loss of `models.losses`. Comes in: refined conditions and what
earlier heads drew. Goes out: the token as it is fed back, and what is kept of it.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from arcond_jax import types
from arcond_jax.diffusion import solvers
from arcond_jax.models import windows
from arcond_jax.nn import factors as factors_lib
from arcond_jax.sampling import filters, guidance

DRAFTS = ("off", "draw", "feed")
NOISE = 2**31 - 1  # the stream of noise on drafts, behind those of all positions


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the loop is: the network with its parameters, and the position.

    One position of all rows, or one for each condition of each row.

    `row_rngs` and `codebook`, the vectors of the codes, are for noise on drafts.
    """

    network: types.CausalModel
    params: types.Params
    guidance: guidance.Guidance
    position: Int[Array, "*at"]
    code_law: types.CodeLaw | None = None
    row_rngs: Key[Array, " b"] | None = None
    codebook: Float[Array, "v c"] | None = None

    def apply(self, *args: Any, method: str) -> Any:
        """Runs a method of the network."""
        return self.network.apply({"params": self.params}, *args, method=method)

    def ahead(self, count: int) -> Int[Array, "*at count"]:
        """This position and those after it; beyond the end the last stands again."""
        ahead = self.position[..., None] + jnp.arange(count)
        return jnp.minimum(ahead, self.network.length - 1)

    def weight(self, factor: int = 0) -> Float[Array, "*at"] | None:
        """Guidance at this position."""
        length = self.network.length
        return self.guidance.weight(self.position, self.position + 1, length, factor=factor)


@runtime_checkable  # annotations are checked at run time in the tests
class Head(Protocol):
    """Draws a part of the token."""

    def check(self, network: types.CausalModel) -> None:
        """Raises ValueError if there is nothing for it to draw from."""
        ...

    def draw(
        self,
        place: Place,
        cond: Float[Array, "rows d"],
        token: types.Token,
        rngs: Key[Array, " b"],
    ) -> tuple[types.Token, dict[str, Array]]: ...


@dataclasses.dataclass(frozen=True)
class Codes:
    """Draws the code, or a window of codes, factor by factor.

    Attributes:
      temperature: Divides the guided logits.
      later_temperature: Of a code's factors after the first; None for that of the first.
      top_k, top_p, min_p: Cuts, as in `filters.filter_logits`; None leaves all.
      drafts: What is done with entries 1 and up of the window: "off" (not drawn), "draw" (drawn for
        inspection) or "feed" (fed back, which is TensorAR's Algorithm 1).
      renoise: Noise that is put on drafts before they are fed back, as they had in training. What
        is kept of them is without it.

    Raises:
      ValueError: A choice that does not exist, a temperature that is not positive, or noise on
        drafts that are not fed back.
    """

    temperature: float = 1.0
    later_temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    drafts: str = "off"
    renoise: windows.Noise | None = None

    def __post_init__(self) -> None:
        if self.drafts not in DRAFTS:
            raise ValueError(f"drafts {self.drafts!r} is not one of {', '.join(DRAFTS)}")
        if self.renoise is not None and self.drafts != "feed":
            raise ValueError(f"drafts {self.drafts!r} are not fed back, so no noise is put on them")
        for name in ("temperature", "later_temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"code_{name} {value} must be positive")

    def check(self, network: types.CausalModel) -> None:
        """Raises ValueError if the network has no codes."""
        if not network.factor_sizes:
            raise ValueError("this network has no codes to draw")

    def draw(
        self,
        place: Place,
        cond: Float[Array, "rows d"],
        token: types.Token,
        rngs: Key[Array, " b"],
    ) -> tuple[types.Token, dict[str, Array]]:
        """The window as the model is fed it next; "codes" [b, w], all that was drawn."""
        network = place.network
        window = self.draw_window(
            place, cond, rngs, num_entries=1 if self.drafts == "off" else network.window
        )
        missing = network.window - window.shape[1]
        entry = jnp.arange(network.window)
        seen = entry < (network.window if self.drafts == "feed" else 1)
        seen = seen & (place.position + entry < network.length)
        token = dataclasses.replace(
            token,
            codes=jnp.pad(self.noised(place, window), ((0, 0), (0, missing), (0, 0)))[:, None],
            seen=jnp.broadcast_to(seen, (window.shape[0], 1, network.window)),
        )
        return token, {"codes": factors_lib.join(window, network.factor_sizes)}

    def noised(self, place: Place, window: Int[Array, "b w factors"]) -> Int[Array, "b w factors"]:
        """The window as it is fed back."""
        if self.renoise is None:
            return window
        assert place.row_rngs is not None
        rngs = jax.vmap(jax.random.fold_in, (0, None))(place.row_rngs, NOISE)
        sizes = place.network.factor_sizes
        return self.renoise(
            window, rngs, place.position, factor_sizes=sizes, codebook=place.codebook
        )

    def draw_window(
        self,
        place: Place,
        cond: Float[Array, "rows d"],
        rngs: Key[Array, " b"],
        *,
        num_entries: int,
    ) -> Int[Array, "b w factors"]:
        """The first entries of the window, each factor given those before it."""
        rows = place.apply(cond, place.ahead(num_entries), method="rows")
        return self.draw_rows(place, rows, rngs)[0]

    def draw_rows(
        self, place: Place, rows: Float[Array, "rows *n d"], rngs: Key[Array, " b"]
    ) -> tuple[Int[Array, "b *n factors"], list[Float[Array, "b *n v"]]]:
        """A code from each row, each factor given those before it; and the logits drawn from."""
        num_rows, laws = rngs.shape[0], []
        factors = jnp.zeros((num_rows, *rows.shape[1:-1], 0), jnp.int32)
        for i in range(len(place.network.factor_sizes)):
            logits = place.apply(rows, place.guidance.both(factors), method="factor_logits")
            laws.append(self.law(place, logits, i))
            factor_rngs = jax.vmap(jax.random.fold_in, (0, None))(rngs, i)
            factor = jax.vmap(filters.categorical)(factor_rngs, laws[i])
            factors = jnp.concatenate([factors, factor[..., None]], axis=-1)
        return factors, laws

    def law(
        self, place: Place, logits: Float[Array, "rows *n v"], factor: int
    ) -> Float[Array, "b *n v"]:
        """Logits of what a factor is drawn from: guided, tempered and cut."""
        logits = place.guidance.combine(logits, place.weight(factor))
        temperature = self.temperature
        if factor and self.later_temperature is not None:
            temperature = self.later_temperature
        return filters.filter_logits(
            logits / temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )


@dataclasses.dataclass(frozen=True)
class Latents:
    """Draws the latent along a reverse chain, told the code if there is one.

    Attributes:
      solver: The chain.
      warm: Start it from a draw of the code's Gaussian instead of pure noise.
    """

    solver: solvers.Solver
    warm: bool = False

    def check(self, network: types.CausalModel) -> None:
        """Raises ValueError if the network has no latents, or none to start warm from."""
        if network.channels is None:
            raise ValueError("this network has no latents to draw")
        if self.warm and not network.factor_sizes:
            raise ValueError("a warm start needs a model with both codes and latents")

    def draw(
        self,
        place: Place,
        cond: Float[Array, "rows d"],
        token: types.Token,
        rngs: Key[Array, " b"],
    ) -> tuple[types.Token, dict[str, Array]]:
        """The token with its latent; "latents" [b, c], the same."""
        codes = None if token.codes is None else token.codes[:, 0, 0, 0]
        told = None if codes is None else place.guidance.both(codes)
        cond = place.apply(cond, told, method="latent_cond")

        # After the streams of the factors; where there are none their first stays unused.
        stream = max(1, len(place.network.factor_sizes))
        rngs = jax.vmap(jax.random.fold_in, (0, None))(rngs, stream)
        channels = place.network.channels
        assert channels is not None
        shape = (self.solver.num_evaluations + 2, channels)
        noise = jax.vmap(lambda rng: jax.random.normal(rng, shape), out_axes=1)(rngs)
        x = noise[0]
        if self.warm:
            law = place.code_law
            if law is None:
                raise ValueError("a warm start needs code_law, the Gaussians behind the codes")
            spread = jnp.einsum("bij,bj->bi", law.cholesky[codes], noise[1])
            x = self.solver.noised(law.mean[codes] + spread, x)

        def denoise(x: Float[Array, "b c"], t: Int[Array, ""]) -> Float[Array, "b two_c"]:
            output = place.apply(place.guidance.both(x), t, cond, method="denoise")
            return place.guidance.combine_noise(output, place.weight())

        latents = self.solver(denoise, x, noise[2:])
        return dataclasses.replace(token, latents=latents[:, None]), {"latents": latents}
