"""What attention takes of a TPU's memory as an einsum and as a kernel: docs/pods.md.

    python benchmarks/attention.py

A block with its projections is compiled with its gradient, its inputs alone kept, for one device of
the topology. Needs 'arcond_jax[tpu]' and no TPU; a line takes a minute or two.
"""

import argparse

import jax
import jax.numpy as jnp

from arcond_jax.nn import attention, kernels
from arcond_jax.parallel import compiled, topology
from arcond_jax.parallel import mesh as mesh_lib

# Images of a device, positions, heads, their width, whether causal; what trains so.
SHAPES = {
    (128, 128, 12, 64, True): "–",
    (32, 256, 20, 64, True): "`ar_xl`, `llamagen_xl_256`",
    (32, 256, 16, 72, False): "DiT-XL",
    (32, 257, 16, 80, True): "RAR-XL without dropout of weights",
    (32, 320, 16, 80, False): "MAR-H's decoder without dropout of weights",
    (16, 576, 24, 64, True): "`llamagen_xxl_384`",
    (16, 1024, 16, 72, False): "DiT-XL on 32x32 tokens",
    (8, 1144, 20, 64, True): "`llamagen_t2i_xl_512`",
}
MIB = 2**20


def einsum(*qkv: jax.Array, is_causal: bool) -> jax.Array:
    """As `attention.attend` where weights are dropped, which none are."""
    return attention.attend(*qkv, is_causal=is_causal, dropout=lambda weights: weights)


def temporary(mesh, attend, b: int, length: int, heads: int, head_dim: int, is_causal: bool) -> int:
    """Bytes beside inputs and gradients while the gradient of a block is computed."""

    @jax.checkpoint
    def block(x, inner, outer):
        qkv = jnp.einsum("bld,dchk->cblhk", x, inner)
        return x + jnp.einsum("blhk,hkd->bld", attend(*qkv, is_causal=is_causal), outer)

    def loss(*args):
        return jnp.sum(block(*args).astype(jnp.float32) ** 2)

    width = heads * head_dim
    shapes = (b, length, width), (width, 3, heads, head_dim), (heads, head_dim, width)
    whole = mesh_lib.replicated(mesh)
    args = [jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=whole) for x in shapes]
    made = compiled.Compiled(jax.grad(loss, argnums=(0, 1, 2)), mesh).lower(*args).compile()
    return made.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", default="v5e:2x2")
    args = parser.parse_args()
    devices = topology.named(args.topology).devices[:1]
    mesh = mesh_lib.make_mesh(devices=devices)
    print("| images x positions | heads | causal | einsum | kernel | trains so |")
    print("|---|---|---|---|---|---|")
    for shape, name in SHAPES.items():
        b, length, heads, head_dim, is_causal = shape
        sizes = [temporary(mesh, x, *shape) / MIB for x in (einsum, kernels.splash)]
        cells = [f"{b} x {length}", f"{heads} x {head_dim}", "yes" if is_causal else "no"]
        cells += [f"{x:.0f} MiB" for x in sizes]
        print("| " + " | ".join([*cells, name]) + " |", flush=True)


if __name__ == "__main__":
    main()
