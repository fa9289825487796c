"""What windows cost in training: memory of their noise and of their loss, and time of a step.

    python benchmarks/windows.py

Memory is what the compiler lays out beyond arguments and results, at the batch of the recipes;
nothing of that size is run. A step is run at a small batch, its programs in turns.
"""

import argparse
import functools
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from arcond_jax import build, types
from arcond_jax.models import losses, windows

BATCH, LENGTH = 256, 256
NAME = "llamagen_b_256"


def temporaries(function: Any, *args: Any) -> int:
    """Bytes between arguments and results."""
    found = jax.jit(function).lower(*args).compile().memory_analysis()
    assert found is not None
    return found.temp_size_in_bytes


def noise(window: int, num_codes: int) -> dict[str, int]:
    """Of both kinds of noise, for windows over codes of one factor."""
    rng = jax.random.key(0)
    codes = jax.ShapeDtypeStruct((BATCH, LENGTH, 1), jnp.int32)
    codebook = jax.ShapeDtypeStruct((num_codes, 8), jnp.float32)
    levels = windows.noise_levels("sine", window)
    categorical = functools.partial(
        windows.categorical_noise, levels=levels, factor_sizes=(num_codes,), nested=False
    )

    def through_codebook(rng: Any, codes: Any, codebook: Any) -> Any:
        return windows.codebook_noise(rng, codes, levels=levels, codebook=codebook)

    return {
        f"categorical noise, window {window}, {num_codes} codes": temporaries(
            categorical, rng, codes
        ),
        f"codebook noise, window {window}, {num_codes} codes": temporaries(
            through_codebook, rng, codes, codebook
        ),
    }


def cross_entropy(window: int, batch: int) -> dict[str, int]:
    """Of the gradient of the loss of all entries in conditions and head."""
    settings = ["training.dtype=float32"] + [f"tensorar.window={window}"] * (window > 1)
    variant = ":tensorar_v1" if window > 1 else ""
    config = build.load_config(f"{NAME}{variant}", settings)
    network = build.network(config)
    params = nn.unbox(build.abstract_params(config))
    cond = jax.ShapeDtypeStruct((batch, LENGTH, config.model.width), jnp.float32)
    codes, rng = jax.ShapeDtypeStruct((batch, LENGTH, 1), jnp.int32), jax.random.key(0)

    def loss(params: Any, cond: Any, codes: Any) -> Any:
        model = losses.Bound(network, {"params": params})
        total, _ = losses.CodeLoss()(model, cond, jnp.arange(LENGTH), codes, None, rng)
        return total

    gradient = jax.grad(loss, argnums=(0, 1))
    return {f"loss, window {window}, batch {batch}": temporaries(gradient, params, cond, codes)}


def step_seconds(batch: int, num_runs: int) -> dict[str, float]:
    """Of the gradient alone, of a model and its variants; the fastest of some runs."""
    tokens = types.Tokens(codes=jnp.zeros((batch, LENGTH), jnp.int32))
    label, rng, programs = jnp.zeros(batch, jnp.int32), jax.random.key(0), {}
    for variant in ("", "tensorar_iclr", "tensorar_v1", "drafter"):
        name = f"{NAME}:{variant}" if variant else NAME
        settings = ["training.dtype=float32", "model.remat=none"]
        # The table of a tokenizer is read from weights; its noise is a small part of a step.
        settings += ["tensorar.noise=categorical"] * variant.startswith("tensorar")
        generator = build.generator(build.load_config(name, settings))
        params = nn.unbox(jax.jit(generator.init)(rng))
        gradient = jax.jit(jax.grad(generator.loss, has_aux=True))
        program = gradient.lower(params, tokens, label, rng).compile()
        programs[name] = functools.partial(program, params, tokens, label, rng)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(num_runs):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program())
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.min(x)) for name, x in seconds.items()}


def main() -> None:
    """Prints what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch_size", type=int, default=1, help="of the timed step")
    parser.add_argument("--num_runs", type=int, default=3)
    args = parser.parse_args()
    sizes = {}
    for window, num_codes in ((4, 16_384), (8, 16_384), (8, 262_144)):
        sizes |= noise(window, num_codes)
    for window in (1, 4, 8):
        sizes |= cross_entropy(window, batch=16)
    for name, size in sizes.items():
        print(f"{name:48} {size / 2**30:8.3f} GiB")
    seconds = step_seconds(args.batch_size, args.num_runs)
    for name, one in seconds.items():
        print(f"step of {name:40} {one:8.2f} s  {one / seconds[NAME]:5.2f}")


if __name__ == "__main__":
    main()
