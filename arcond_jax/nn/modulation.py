"""Shift, scale and gate by a condition (adaLN): what DiT, RAR and the diffusion head share.

Source: Peebles and Xie (2023), "Scalable Diffusion Models with Transformers", section 3.2.
"""

from jaxtyping import Array, DTypeLike, Float

from arcond_jax.nn import linear, parameter


def modulation(
    num: int, width: int, dtype: DTypeLike, name: str | None = "modulation"
) -> linear.Linear:
    """Map of a condition to `num` vectors, zero at first (adaLN-zero).

    In a block its output must be constrained to the batch axes. Left cut over a tensor axis it is
    multiplied with the wrong pieces on meshes that cut the batch too (seen with jaxlib 0.10.2).
    """
    axes = ("embed", None, "mlp")
    return linear.Linear((num, width), axes, True, parameter.zeros_init, dtype, name=name)


def parts(vectors: Float[Array, "*n num d"]) -> list[Float[Array, "*n d"]]:
    """The vectors that `modulation` gave, one by one."""
    return [vectors[..., i, :] for i in range(vectors.shape[-2])]


def modulate(
    x: Float[Array, "*n d"], shift: Float[Array, "*m d"], scale: Float[Array, "*m d"]
) -> Float[Array, "*n d"]:
    """Shifts and scales what was normalised; one row of shift and scale may serve several of x."""
    return x * (1.0 + scale) + shift
