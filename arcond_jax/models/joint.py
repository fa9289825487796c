"""One causal backbone, a code plan and a continuous latent per position.

The condition at a position (normalised hidden state plus a learned position) is what refinement
moves. From it the code head draws the code, or with a window the next codes; then, told the code,
the diffusion head draws the latent. Without codes this is autoregression with diffusion loss, and
without latents LlamaGen (window 1) or TensorAR on it.

The combination is this library's own. Its parts: MAR (Li et al., 2024) for the diffusion loss,
TensorAR (2025) for the window, LlamaGen (Sun et al., 2024) for the backbone.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from arcond_jax import types
from arcond_jax.diffusion import gaussian
from arcond_jax.diffusion import schedule as schedule_lib
from arcond_jax.models import diffusion_head, gpt, tensorar
from arcond_jax.nn import attention, linear, norm, parameter

wide_init = nn.initializers.normal(0.1)


class Joint(nn.Module):
    """The network; its losses are in `Generator`, its sampling loop in `sampling/`.

    Attributes:
      backbone: Unbound stack of causal blocks with a prefix of one, the class.
      num_classes: Classes; id `num_classes` means none.
      head: Unbound denoising MLP, or None for a model of codes alone.
      num_codes: Size of the codebook, or None for a model of latents alone. With a window or a
        head, id `num_codes` is the pad of windows and stands for an unknown code.
      window: Codes predicted at each position; 1 has no window parameters.
      window_depth: Query blocks on each side (2 in arXiv v1, 1 in the ICLR version).
      window_mlp_ratio: Of the MLP in query blocks; 0 for attention only (ICLR version).
      token_dropout: In training, of what the backbone is fed, the class included. LlamaGen trains
        with 0.1 (`--token-dropout-p` of train_c2i.py).
    """

    backbone: gpt.GPT
    num_classes: int
    head: diffusion_head.DiffusionHead | None = None
    num_codes: int | None = None
    window: int = 1
    window_depth: int = 2
    window_mlp_ratio: int = 4
    token_dropout: float = 0.0

    def setup(self) -> None:
        width, dtype = self.backbone.width, self.backbone.dtype
        self.drop = nn.Dropout(self.token_dropout)
        self.trunk = self.backbone.clone()
        self.class_embed = linear.Embed(self.num_classes + 1, width, dtype=dtype)
        self.final_norm = norm.RMSNorm()
        if self.head is not None:
            self.denoiser = self.head.clone()
            self.latent_in = linear.Linear((width,), (None, "embed"), True, dtype=dtype)
            self.head_position = parameter.parameter(
                self,
                "head_position",
                parameter.normal_init,
                (self.length, width),
                (None, "embed"),
            )
        if self.num_codes is not None:
            # A model of codes alone, one at a time, never meets the pad: LlamaGen's table lacks it.
            rows = self.num_codes + int(self.window > 1 or self.head is not None)
            self.code_embed = linear.Embed(rows, width, wide_init, dtype)
            self.code_head = linear.Linear(
                (self.num_codes,), ("embed", "vocab"), kernel_init=parameter.zeros_init, dtype=dtype
            )
            if self.head is not None:
                self.code_cond = linear.Embed(rows, width, parameter.zeros_init, dtype)
        if self.window > 1:
            heads, mlp_ratio = self.backbone.num_heads, self.window_mlp_ratio
            self.window_encoder = tensorar.InputEncoder(self.window_depth, heads, mlp_ratio, dtype)
            self.window_decoder = tensorar.OutputDecoder(
                self.window_depth, heads, self.window, mlp_ratio, dtype
            )

    @property
    def length(self) -> int:
        return self.backbone.grid[0] * self.backbone.grid[1]

    @property
    def pad(self) -> int:
        """The id after the last code: beyond the end, or not told."""
        if self.num_codes is None:
            raise ValueError("a model of latents alone has no codes")
        return self.num_codes

    @property
    def channels(self) -> int:
        """Numbers in a latent."""
        if self.head is None:
            raise ValueError("a model of codes alone has no latents")
        return self.head.channels

    def embed(
        self, latents: Float[Array, "b l c"] | None, window_codes: Int[Array, "b l w"] | None
    ) -> Float[Array, "b l d"]:
        """What a position tells the next: its latent, its code, drafts of the codes after it."""
        parts = []
        if latents is not None:
            parts.append(self.latent_in(latents))
        if window_codes is not None:
            slots = self.code_embed(window_codes)
            parts.append(slots[..., 0, :])
            if self.window > 1:
                parts.append(self.window_encoder(slots))
        return sum(parts[1:], start=parts[0])

    def class_token(self, label: Int[Array, " b"]) -> Float[Array, "b 1 d"]:
        return self.class_embed(label)[:, None]

    def condition(
        self,
        x: Float[Array, "b l d"],
        cache: attention.Cache | None,
        position: Int[Array, " l"],
    ) -> tuple[Float[Array, "b l d"], attention.Cache | None]:
        """Embedded tokens to conditions; `position` says which tokens they are about."""
        h, cache = self.trunk(x, cache)
        cond = self.final_norm(h)
        if self.head is not None:
            cond = cond + self.head_position[position].astype(cond.dtype)
        return cond, cache

    def teacher_forced(
        self,
        latents: Float[Array, "b l c"] | None,
        window_codes: Int[Array, "b l w"] | None,
        label: Int[Array, " b"],
    ) -> Float[Array, "b l d"]:
        """Conditions for every position from real prefixes; dropout where its rng is given."""
        embedded = self.embed(
            None if latents is None else latents[:, :-1],
            None if window_codes is None else window_codes[:, :-1],
        )
        x = jnp.concatenate([self.class_token(label), embedded], axis=1)
        x = self.drop(x, deterministic=not self.has_rng("dropout"))
        return self.condition(x, None, jnp.arange(self.length))[0]

    def slots(
        self, cond: Float[Array, "*n d"], num_slots: int | None = None
    ) -> Float[Array, "*n w d"]:
        """One row per slot of the window; slot 0 is about the position itself."""
        if self.window == 1:
            return cond[..., None, :]
        return self.window_decoder(cond, num_slots)

    def logits(self, row: Float[Array, "*n d"]) -> Float[Array, "*n v"]:
        return self.code_head(row).astype(jnp.float32)

    def latent_cond(
        self, cond: Float[Array, "*n d"], codes: Int[Array, "*n"] | None
    ) -> Float[Array, "*n d"]:
        """The diffusion head's condition: the refined one, told the code."""
        return cond if codes is None else cond + self.code_cond(codes)

    def denoise(
        self, x: Float[Array, "*n c"], t: Int[Array, "..."], cond: Float[Array, "*n d"]
    ) -> Float[Array, "*n two_c"]:
        return self.denoiser(x, t, cond)

    def touch_all(self, label: Int[Array, " b"]) -> None:
        """Runs every part once, for initialisation."""
        shape = (label.shape[0], self.length)
        latents = codes = windows = None
        if self.head is not None:
            latents = jnp.zeros((*shape, self.channels))
        if self.num_codes is not None:
            codes = jnp.zeros(shape, jnp.int32)
            windows = tensorar.windows(codes, self.window, pad=0)
        cond = self.teacher_forced(latents, windows, label)
        if codes is not None:
            self.logits(self.slots(cond))
        if latents is not None:
            told = self.latent_cond(cond, codes)
            self.denoise(latents, jnp.zeros(shape, jnp.int32), told)


@dataclasses.dataclass(frozen=True, eq=False)
class Generator:
    """Initialisation and training losses of `Joint`; implements `types.Generator`.

    Attributes:
      network: The Linen module.
      schedule: Noise process of the diffusion loss.
      w_diffusion, w_tensor: Weights of the two losses.
      draft_weight: Weight of the mean cross-entropy of slots 1 and up against slot 0's.
      label_dropout: Chance that a sample is trained without its class.
      code_dropout: Chance that the diffusion head is not told a position's code.
      num_copies: Times each position is noised anew per step (MAR's diffusion_batch_mul).
      drafts: What the windows fed in show beyond their first code: "masked" nothing, "noised" all
        of it noised, "random" the first few slots, a number drawn per position.
      noise: "categorical", "codebook", "self" (drafts the model would draw itself) or "none".
      noise_schedule: Name of the curve of noise over slots.
      nested: Whether windows share one draw of noise per token.
      codebook: The tokenizer's vectors, centred; only noise "codebook" needs them.

    Raises:
      ValueError: a choice that does not exist, or noise "codebook" without a codebook.
    """

    network: Joint
    schedule: schedule_lib.Schedule
    w_diffusion: float = 1.0
    w_tensor: float = 0.3
    draft_weight: float = 1.0
    label_dropout: float = 0.1
    code_dropout: float = 0.0
    num_copies: int = 1
    drafts: str = "masked"
    noise: str = "categorical"
    noise_schedule: str = "exponential"
    nested: bool = True
    codebook: Float[np.ndarray, "v c"] | None = None

    def __post_init__(self) -> None:
        choices = {
            "drafts": ("masked", "noised", "random"),
            "noise": ("categorical", "codebook", "self", "none"),
            "noise_schedule": tuple(tensorar.SCHEDULES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not one of {', '.join(allowed)}"
                )
        if self.noise == "codebook" and self.codebook is None:
            raise ValueError("noise 'codebook' needs the tokenizer's codebook")

    @property
    def pad(self) -> int:
        """The code that stands for none."""
        return self.network.pad

    def init(self, rng: Key[Array, ""]) -> types.Params:
        """Parameters, boxed with their logical axis names."""
        label = jnp.zeros((1,), jnp.int32)
        return self.network.init(rng, label, method=Joint.touch_all)["params"]

    def apply(self, params: types.Params, *args: Any, method: Callable, **options: Any) -> Any:
        """Runs a method of the network."""
        return self.network.apply({"params": params}, *args, method=method, **options)

    def conditions(
        self,
        params: types.Params,
        tokens: types.Tokens,
        label: Int[Array, " b"],
        rng: Key[Array, ""] | None = None,
    ) -> Float[Array, "b l d"]:
        """Teacher-forced conditions as sampling without drafts sees them; nothing is drawn."""
        del rng
        tokens = self._own(tokens)
        windows = None if tokens.codes is None else self._masked_windows(tokens.codes)
        return self.apply(params, tokens.latents, windows, label, method=Joint.teacher_forced)

    def loss(
        self,
        params: types.Params,
        tokens: types.Tokens,
        label: Int[Array, " b"],
        rng: Key[Array, ""],
        *,
        step: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, ""], types.Metrics]:
        """w_diffusion * diffusion loss + w_tensor * cross-entropy, and their parts."""
        del step
        tokens = self._own(tokens)
        drop_rng, window_rng, diffusion_rng = jax.random.split(rng, 3)
        dropout_rng = jax.random.fold_in(rng, 3)  # the split may hold the folds 0 to 2
        dropped = jax.random.bernoulli(drop_rng, self.label_dropout, label.shape)
        label = jnp.where(dropped, self.network.num_classes, label)

        windows = None
        if tokens.codes is not None:
            windows = self._input_windows(params, tokens.latents, tokens.codes, label, window_rng)
        cond = self.apply(
            params,
            tokens.latents,
            windows,
            label,
            method=Joint.teacher_forced,
            rngs={"dropout": dropout_rng},
        )

        total, metrics = jnp.zeros(()), {}
        if tokens.codes is not None:
            cross_entropy = self._cross_entropy(params, cond, tokens.codes)
            metrics |= {f"cross_entropy/slot_{j}": c for j, c in enumerate(cross_entropy)}
            loss = cross_entropy[0]
            if self.network.window > 1:
                loss = loss + self.draft_weight * jnp.mean(cross_entropy[1:])
            metrics["loss_tensor"] = loss
            total = total + self.w_tensor * loss
        if tokens.latents is not None:
            mse, vb = self._diffusion_loss(
                params, cond, tokens.latents, tokens.codes, diffusion_rng
            )
            metrics |= {"diffusion/mse": mse, "diffusion/vb": vb, "loss_diffusion": mse + vb}
            total = total + self.w_diffusion * (mse + vb)
        return total, {"loss": total} | metrics

    def _own(self, tokens: types.Tokens) -> types.Tokens:
        """The kinds of token this model has; a tokenizer may offer more."""
        return types.Tokens(
            latents=None if self.network.head is None else tokens.latents,
            codes=None if self.network.num_codes is None else tokens.codes,
        )

    def _diffusion_loss(
        self,
        params: types.Params,
        cond: Float[Array, "b l d"],
        latents: Float[Array, "b l c"],
        codes: Int[Array, "b l"] | None,
        rng: Key[Array, ""],
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        time_rng, noise_rng, code_rng = jax.random.split(rng, 3)
        if codes is not None:
            unknown = jax.random.bernoulli(code_rng, self.code_dropout, codes.shape)
            codes = jnp.where(unknown, self.pad, codes)
        cond = self.apply(params, cond, codes, method=Joint.latent_cond)

        def tile(x: Array) -> Array:
            return jnp.broadcast_to(x[None], (self.num_copies, *x.shape))

        x0, cond = tile(latents), tile(cond)
        t = jax.random.randint(time_rng, x0.shape[:-1], 0, len(self.schedule.betas))
        noise = jax.random.normal(noise_rng, x0.shape)
        x = gaussian.q_sample(x0, t, noise, schedule=self.schedule)
        output = self.apply(params, x, t, cond, method=Joint.denoise)
        mse, vb = gaussian.loss(output, x0, x, t, noise, schedule=self.schedule)
        return jnp.mean(mse), jnp.mean(vb)

    def _cross_entropy(
        self, params: types.Params, cond: Float[Array, "b l d"], codes: Int[Array, "b l"]
    ) -> Float[Array, " w"]:
        """Mean cross-entropy of each slot in nats, padding left out.

        Slot after slot with rematerialisation: the logits of all slots are never held at once.
        """
        rows = self.apply(params, cond, method=Joint.slots)
        length, window = codes.shape[1], self.network.window
        targets = tensorar.windows(codes, window, pad=0)
        inside = jnp.asarray(tensorar.slot_mask(length, window), jnp.float32)

        @jax.checkpoint
        def slot_loss(
            row: Float[Array, "b l d"], target: Int[Array, "b l"], weight: Float[Array, " l"]
        ) -> Float[Array, ""]:
            logits = self.apply(params, row, method=Joint.logits)
            log_p = jax.nn.log_softmax(logits)
            picked = jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
            return -jnp.sum(picked * weight) / (jnp.sum(weight) * codes.shape[0])

        def body(_, slot):
            return None, slot_loss(*slot)

        slots = (jnp.moveaxis(rows, 2, 0), jnp.moveaxis(targets, 2, 0), inside.T)
        return jax.lax.scan(body, None, slots)[1]

    def _masked_windows(self, codes: Int[Array, "b l"]) -> Int[Array, "b l w"]:
        windows = tensorar.windows(codes, self.network.window, pad=self.pad)
        return tensorar.mask_slots(windows, jnp.array(1), pad=self.pad)

    def _input_windows(
        self,
        params: types.Params,
        latents: Float[Array, "b l c"] | None,
        codes: Int[Array, "b l"],
        label: Int[Array, " b"],
        rng: Key[Array, ""],
    ) -> Int[Array, "b l w"]:
        """The windows fed in: noised, and cut to the slots that are to be seen."""
        window = self.network.window
        if self.drafts == "masked" or window == 1:
            return self._masked_windows(codes)
        levels = tensorar.noise_levels(self.noise_schedule, window)
        noise_rng, valid_rng = jax.random.split(rng)
        if self.noise == "categorical":
            windows = tensorar.categorical_noise(
                noise_rng, codes, levels=levels, num_codes=self.pad, nested=self.nested
            )
        elif self.noise == "codebook":
            windows = tensorar.codebook_noise(
                noise_rng,
                codes,
                levels=levels,
                codebook=jnp.asarray(self.codebook),
                nested=self.nested,
            )
        elif self.noise == "self":
            windows = self._self_noise(params, latents, codes, label, noise_rng, levels)
        else:
            windows = tensorar.windows(codes, window, pad=self.pad)
        if self.drafts == "random":
            valid = jax.random.randint(valid_rng, codes.shape, 1, window + 1)
            windows = tensorar.mask_slots(windows, valid, pad=self.pad)
        return windows

    def _self_noise(
        self,
        params: types.Params,
        latents: Float[Array, "b l c"] | None,
        codes: Int[Array, "b l"],
        label: Int[Array, " b"],
        rng: Key[Array, ""],
        levels: Float[np.ndarray, " w"],
    ) -> Int[Array, "b l w"]:
        """Replaces slot j with probability b_j by what the model, its drafts masked, would draw.

        The window fed in at a position starts at that position's own token, so its slot j is slot
        j of the window predicted there.
        """
        draw_rng, keep_rng = jax.random.split(rng)
        cond = self.apply(
            params,
            latents,
            self._masked_windows(codes),
            label,
            method=Joint.teacher_forced,
        )
        rows = self.apply(params, cond, method=Joint.slots)
        logits = self.apply(params, rows, method=Joint.logits)
        drawn = jax.random.categorical(draw_rng, jax.lax.stop_gradient(logits))
        clean = tensorar.windows(codes, self.network.window, pad=self.pad)
        noised = jax.random.uniform(keep_rng, clean.shape) < levels
        return jnp.where(noised & (clean != self.pad), drawn, clean)
