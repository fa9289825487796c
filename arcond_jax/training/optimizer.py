"""AdamW with a learning-rate curve, gradient clipping, and a slower rate for what is tuned."""

import jax
import optax

DECAYS = ("constant", "linear", "cosine")

# By name: scanned blocks stack their vectors into matrices, so the number of axes says nothing.
NOT_DECAYED = ("bias", "gain", "scale")


def learning_rate(
    peak: float,
    *,
    num_train_steps: int,
    num_warmup_steps: int,
    decay: str,
    decay_to: float = 0.0,
) -> optax.Schedule:
    """Linear warm-up to `peak`, then constant, or down along a line or half a cosine.

    Args:
      decay_to: What is left at the end, as a share of the peak.

    Raises:
      ValueError: unknown decay, or a warm-up longer than the run.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay {decay!r} is not one of {', '.join(DECAYS)}")
    if num_warmup_steps > num_train_steps:
        raise ValueError(
            f"num_warmup_steps {num_warmup_steps} is more than num_train_steps {num_train_steps}"
        )
    left = max(1, num_train_steps - num_warmup_steps)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, decay_to * peak, left),
        "cosine": optax.cosine_decay_schedule(peak, left, alpha=decay_to),
    }[decay]
    # The first update already moves: step 0 has the rate of one warm-up step.
    warmup = optax.linear_schedule(peak / max(1, num_warmup_steps), peak, num_warmup_steps)
    return optax.join_schedules([warmup, after], [num_warmup_steps])


def adamw(
    rate: optax.Schedule,
    *,
    b1: float,
    b2: float,
    weight_decay: float,
    clip_norm: float | None,
    spared: tuple[str, ...] = (),
    own: tuple[str, ...] = (),
    base_rate: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW that decays matrices and tables only, after clipping the global gradient norm.

    Args:
      weight_decay: Times the learning rate; biases, and scales of norms and branches, are spared.
      clip_norm: Largest global norm of a gradient; None for no limit.
      spared: Names of parts that are not decayed at all.
      own: Top names of the parameters that learn at `rate` whatever the others do.
      base_rate: Share of it at which those others learn. At 0 they stay as they are and nothing is
        kept for them; at 1 there is one optimizer for all.
    """

    def is_decayed(path: tuple, _: jax.Array) -> bool:
        # The last names may belong to the boxes that carry axis names, so all are looked at.
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return not set(names) & {*NOT_DECAYED, *spared}

    def at(rate: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(
            rate,
            b1=b1,
            b2=b2,
            weight_decay=weight_decay,
            mask=lambda params: jax.tree_util.tree_map_with_path(is_decayed, params),
        )

    update = at(rate)
    if base_rate < 1:
        base = at(lambda step: base_rate * rate(step)) if base_rate else optax.set_to_zero()
        update = optax.multi_transform(
            {"own": update, "base": base},
            lambda params: {name: "own" if name in own else "base" for name in params},
        )
    if clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(clip_norm), update)
