"""The compiled sampling loop of a causal model: one scan over positions, classes in, tokens out.

At each position: the condition is refined, the code head draws the code (or the window), the
diffusion head draws the latent under the condition told the code, and both are fed back.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from arcond_jax import types
from arcond_jax.diffusion import solvers
from arcond_jax.models.joint import Joint
from arcond_jax.nn import attention, layout
from arcond_jax.sampling import filters, sampled

DRAFTS = ("off", "draw", "feed")


@dataclasses.dataclass(frozen=True, eq=False)
class CausalSampler:
    """Static choices of sampling from `Joint`.

    Attributes:
      network: The Linen module. On a CPU a backbone whose `unroll` is its depth is the faster one.
      solver: Chain of the diffusion head; None for a model of codes alone.
      warm: Start the chain from a draw of the code's Gaussian instead of pure noise.
      guidance_scale: 1.0 is none and costs nothing; otherwise the batch is doubled.
      guidance_schedule: "constant" or "linear" in the share of positions decoded.
      guided_positions: How many are guided, from the first on; None for all. LlamaGen's
        cfg_interval plus 2.
      code_temperature: Divides the logits of codes.
      top_k, top_p, min_p: Cuts of the law of codes; None leaves it whole.
      drafts: What is done with slots 1 and up of the window: "off" (not drawn), "draw" (drawn for
        inspection) or "feed" (fed back, which is TensorAR's Algorithm 1).
      trace: Also return the conditions before and after refinement.
    """

    network: Joint
    solver: solvers.Solver | None
    warm: bool = False
    guidance_scale: float = 1.0
    guidance_schedule: str = "constant"
    guided_positions: int | None = None
    code_temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    drafts: str = "off"
    trace: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("drafts", DRAFTS), ("guidance_schedule", filters.SCHEDULES)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
        if not self.code_temperature > 0:
            raise ValueError(f"code_temperature {self.code_temperature} must be positive")
        if self.warm and (self.network.num_codes is None or self.solver is None):
            raise ValueError("a warm start needs a model with both codes and latents")

    def __call__(
        self,
        params: types.Params,
        rng: Key[Array, ""],
        label: Int[Array, " b"],
        *,
        refiner: types.Refiner,
        code_law: types.CodeLaw | None = None,
        first_row: Int[Array, ""] | int = 0,
    ) -> sampled.Sampled:
        """Draws one token grid per label.

        Row i depends on (rng, first_row + i, its label) alone, whatever the batch or the mesh, if
        the refiner treats rows alone.

        Args:
          code_law: Needed for a warm start.
          first_row: Number of the first row, to continue a set of samples in another batch.
        """
        if self.warm and code_law is None:
            raise ValueError("a warm start needs code_law, the Gaussians behind the codes")
        rngs_of_rows = sampled.row_rngs(rng, label.shape[0], first_row)
        fed_label = self.fed_label(label)
        start = _Carry(
            x=self.apply(params, fed_label, method=Joint.class_token),
            cache=self.network.backbone.empty_cache(fed_label.shape[0]),
            refiner_state=refiner.init(label),
        )

        backbone = self.network.backbone
        unrolled = backbone.unroll >= backbone.depth
        weights = layout.for_rows(params, fed_label.shape[0])
        weights = layout.apart(weights) if unrolled else weights

        def body(carry: _Carry, position: Int[Array, ""]) -> tuple[_Carry, dict]:
            params = layout.together(weights)
            rngs = jax.vmap(jax.random.fold_in, (0, None))(rngs_of_rows, position)
            code_rngs, latent_rngs = jnp.moveaxis(jax.vmap(jax.random.split)(rngs), 1, 0)
            return self._step(
                params, carry, position, label, refiner, code_law, code_rngs, latent_rngs
            )

        carry, out = jax.lax.scan(body, start, jnp.arange(self.network.length))
        out = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out)
        windows = out.get("window")
        return sampled.Sampled(
            tokens=types.Tokens(
                latents=out.get("latents"), codes=None if windows is None else windows[..., 0]
            ),
            drafts=windows if self.drafts != "off" else None,
            cond=(out["cond_drawn"], out["cond_refined"]) if self.trace else None,
            refiner_state=carry.refiner_state,
        )

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0

    def fed_label(self, label: Int[Array, " b"]) -> Int[Array, " n"]:
        """The labels of all rows the network runs: under guidance, those without a class follow."""
        if not self.guided:
            return label
        return jnp.concatenate([label, jnp.full_like(label, self.network.num_classes)])

    def guidance_weight(self, position: Int[Array, ""]) -> Float[Array, ""] | None:
        if not self.guided:
            return None
        share = (position + 1) / self.network.length
        weight = filters.guidance_weight(self.guidance_scale, self.guidance_schedule, share)
        if self.guided_positions is None:
            return weight
        return jnp.where(position < self.guided_positions, weight, 1.0)

    def refine(
        self,
        cond: Float[Array, "n d"],
        refiner: types.Refiner,
        state: types.RefinerState,
        *,
        slot: Int[Array, ""],
        label: Int[Array, " b"],
    ) -> tuple[Float[Array, "n d"], types.RefinerState]:
        """Refines the conditional rows; the unconditional ones pass."""
        conditional, unconditional = cond[: label.shape[0]], cond[label.shape[0] :]
        refined, state = refiner(conditional, state, slot=slot, label=label)
        return jnp.concatenate([refined, unconditional]), state

    def apply(self, params: types.Params, *args: Any, method: Callable) -> Any:
        """Runs a method of the network."""
        return self.network.apply({"params": params}, *args, method=method)

    def both(self, x: Array) -> Array:
        """Duplicates rows for the unconditional stream, which shares what was drawn."""
        return jnp.concatenate([x, x]) if self.guided else x

    def _step(
        self,
        params: types.Params,
        carry: "_Carry",
        position: Int[Array, ""],
        label: Int[Array, " b"],
        refiner: types.Refiner,
        code_law: types.CodeLaw | None,
        code_rngs: Key[Array, " b"],
        latent_rngs: Key[Array, " b"],
    ) -> tuple["_Carry", dict]:
        weight = self.guidance_weight(position)
        drawn, cache = self.apply(
            params, carry.x, carry.cache, position[None], method=Joint.condition
        )
        drawn = drawn[:, 0]
        cond, refiner_state = self.refine(
            drawn, refiner, carry.refiner_state, slot=position, label=label
        )

        out, latents, fed_window = {}, None, None
        if self.network.num_codes is not None:
            window = self.draw_window(params, cond, weight, code_rngs)
            out["window"] = window
            fed_window = self._fed_window(window, position)
        if self.solver is not None:
            codes = None if fed_window is None else fed_window[:, 0]
            latents = self._draw_latents(
                params, self.solver, cond, codes, weight, latent_rngs, code_law
            )
            out["latents"] = latents
        if self.trace:
            num_rows = label.shape[0]
            out |= {"cond_drawn": drawn[:num_rows], "cond_refined": cond[:num_rows]}
        x = self.apply(
            params,
            None if latents is None else self.both(latents)[:, None],
            None if fed_window is None else self.both(fed_window)[:, None],
            method=Joint.embed,
        )
        return _Carry(x=x, cache=cache, refiner_state=refiner_state), out

    def draw_window(
        self,
        params: types.Params,
        cond: Float[Array, "n d"],
        weight: Float[Array, ""] | None,
        rngs: Key[Array, " b"],
    ) -> Int[Array, "b w"]:
        num_slots = 1 if self.drafts == "off" else self.network.window
        rows = self.apply(params, cond, num_slots, method=Joint.slots)
        logits = filters.guide(self.apply(params, rows, method=Joint.logits), weight)
        logits = filters.filter_logits(
            logits / self.code_temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )
        return jax.vmap(jax.random.categorical)(rngs, logits)

    def _fed_window(self, window: Int[Array, "b n"], position: Int[Array, ""]) -> Array:
        """The window as the model sees it next: unseen slots, and those beyond the end, padded."""
        width, pad = self.network.window, self.network.pad
        window = jnp.pad(window, ((0, 0), (0, width - window.shape[1])), constant_values=pad)
        slot = jnp.arange(width)
        seen = (slot < (width if self.drafts == "feed" else 1)) & (
            position + slot < self.network.length
        )
        return jnp.where(seen, window, pad)

    def _draw_latents(
        self,
        params: types.Params,
        solver: solvers.Solver,
        cond: Float[Array, "n d"],
        codes: Int[Array, " b"] | None,
        weight: Float[Array, ""] | None,
        rngs: Key[Array, " b"],
        code_law: types.CodeLaw | None,
    ) -> Float[Array, "b c"]:
        cond = self.apply(
            params, cond, None if codes is None else self.both(codes), method=Joint.latent_cond
        )
        channels, num_draws = self.network.channels, solver.num_evaluations + 2
        noise = jax.vmap(lambda rng: jax.random.normal(rng, (num_draws, channels)), out_axes=1)(
            rngs
        )
        x = noise[0]
        if self.warm and codes is not None and code_law is not None:
            spread = jnp.einsum("bij,bj->bi", code_law.cholesky[codes], noise[1])
            x = solver.noised(code_law.mean[codes] + spread, x)

        def denoise(x: Float[Array, "b c"], t: Int[Array, ""]) -> Float[Array, "b two_c"]:
            output = self.apply(params, self.both(x), t, cond, method=Joint.denoise)
            return filters.guide_noise(output, weight)

        return solver(denoise, x, noise[2:])


@no_type_check  # jax rebuilds pytrees around shapes, axes and None
@flax.struct.dataclass
class _Carry:
    """What one position hands to the next: the embedded token, and everything remembered."""

    x: Float[Array, "n 1 d"]
    cache: attention.Cache
    refiner_state: types.RefinerState
