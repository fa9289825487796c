"""How long sampling takes, where the time goes, and how much work that is at least.

Programs are compiled first and then run in turns, so that a busy moment of the machine does not
fall on one of them. Only ratios of one run mean something. Work is counted from shapes.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from arcond_jax import build, types
from arcond_jax.models import llamagen, mar, tensorar
from arcond_jax.nn import mlp
from arcond_jax.parallel import compiled as compiled_lib
from arcond_jax.sampling import heads, raster
from arcond_jax.sampling import mar as mar_sampling
from arcond_jax.transport import refiners


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program has to do at least.

    Attributes:
      operations: Multiplications and additions of matrix products, padding included.
      bytes_read: Weights and caches, read once for every step that needs them; None if not counted.
    """

    operations: float
    bytes_read: float | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
    """One program, timed.

    Attributes:
      name: Of the sampler, or of a part of it.
      batch_size: Images at once.
      seconds: Of each run.
      peak_bytes: Arguments, results and everything between them, as the compiler lays them out.
      work: None if not counted.
    """

    name: str
    batch_size: int
    seconds: tuple[float, ...]
    peak_bytes: int
    work: Work | None

    @property
    def seconds_per_image(self) -> float:
        return min(self.seconds) / self.batch_size

    @property
    def gflops(self) -> float | None:
        """Billions of operations a second."""
        return None if self.work is None else self.work.operations / min(self.seconds) / 1e9

    @property
    def gigabytes_per_second(self) -> float | None:
        """Of weights and caches read."""
        if self.work is None or self.work.bytes_read is None:
            return None
        return self.work.bytes_read / min(self.seconds) / 1e9


def measure(
    configs: dict[str, build.Config],
    *,
    batch_sizes: Sequence[int],
    num_runs: int = 1,
    split: bool = True,
) -> list[Timing]:
    """Times the samplers of configs of one model, with random weights.

    Args:
      configs: By name; they may differ in the sections `sampling` and `tensorar` alone.
      num_runs: Of every program; the fastest counts.
      split: Also time the parts of the first sampler alone: encoder, decoder and head of MAR, and
        the tokenizer's decoder.
    """
    first = next(iter(configs.values()))
    mesh = build.mesh(first)
    params = _initial_params(configs, mesh)
    prompt_of = build.network(first).no_prompt
    gives = "latents" if "latents" in build.family_of(first).draws else "codes"
    decoded = build.part(first, gives)
    timings, rng = [], jax.random.key(1)
    for batch_size in batch_sizes:
        programs: dict[str, Program] = {}
        for name, config in configs.items():
            loop, args = build.sampler(config), (params[name], rng, prompt_of(batch_size))
            work = sampling_work(loop, batch_size)
            programs[name] = Program(_sampler(config), args, work)
            if split and config is first and isinstance(loop, mar_sampling.MARSampler):
                counts = mar_operations(loop, batch_size)
                for part, function in mar_parts(loop).items():
                    programs[f"{name}: {part}"] = Program(function, args, Work(counts[part]))
        timings += _in_turns(programs, batch_size, mesh, num_runs=num_runs)
        if split and "path" in decoded.tokenizer:
            timings.append(_decoding(decoded, gives, batch_size, mesh, num_runs=num_runs))
    return timings


@dataclasses.dataclass(frozen=True)
class Program:
    """A function to compile, what it is given, and what it has to do."""

    function: Callable[..., Any]
    args: tuple
    work: Work | None = None


def _initial_params(configs: dict[str, build.Config], mesh: Mesh) -> dict[str, types.Params]:
    """Random weights for each config; those of the same parameters share them."""
    made: list[tuple[Any, types.Params]] = []
    params = {}
    for name, config in configs.items():
        shapes = jax.tree.map(jnp.shape, nn.unbox(build.abstract_params(config)))
        same = [held for there, held in made if there == shapes]
        if not same:
            init = compiled_lib.Compiled(build.generator(config).init, mesh)
            same = [nn.unbox(init(jax.random.key(0)))]
            made.append((shapes, same[0]))
        params[name] = same[0]
    return params


def _sampler(config: build.Config) -> Callable[..., Any]:
    """Without refinement; a warm start is from white noise, whatever the code."""
    loop, law = build.sampler(config), None
    if config.sampling.get("warm_start") is not None:
        v, c = build.num_codes(config), build.token_channels(config)
        law = types.CodeLaw(jnp.zeros((v, c)), jnp.broadcast_to(jnp.eye(c), (v, c, c)))

    def run(params: types.Params, rng: Key[Array, ""], prompt: types.Prompt) -> Any:
        return loop(params, rng, prompt, refiner=refiners.Identity(), code_law=law).tokens

    return run


def _decoding(
    config: build.Config, gives: str, batch_size: int, mesh: Mesh, *, num_runs: int
) -> Timing:
    """The tokenizer's decoder alone, with random weights."""
    network, abstract = build.tokenizer_network(config), build.abstract_tokenizer(config)
    image = jnp.zeros((1, *build.image_shape(config)))
    fitted = dataclasses.replace(
        abstract, params=nn.unbox(jax.jit(network.init)(jax.random.key(0), image))["params"]
    )
    shape = (batch_size, math.prod(build.grid(config)))
    if gives == "codes":
        tokens = types.Tokens(codes=jnp.zeros(shape, jnp.int32))
    else:
        tokens = types.Tokens(latents=jnp.zeros((*shape, build.token_channels(config))))
    name = f"{config.name}: decoding"
    programs = {name: Program(lambda fitted, tokens: fitted.decode(tokens), (fitted, tokens))}
    return _in_turns(programs, batch_size, mesh, num_runs=num_runs)[0]


def sampling_work(loop: build.Sampler, batch_size: int) -> Work | None:
    """What a sampler has to do; None for those that are not counted."""
    if isinstance(loop, mar_sampling.MARSampler):
        return Work(sum(mar_operations(loop, batch_size).values()))
    if isinstance(loop, raster.Raster) and type(_inner(loop.network)) is llamagen.LlamaGen:
        return code_work(loop, batch_size)
    return None


def _inner(network: Any) -> Any:
    """The model that windows are around."""
    return network.inner if isinstance(network, tensorar.Around) else network


def code_work(loop: raster.Raster, batch_size: int) -> Work:
    """Of LlamaGen: every token passes all weights, and looks at a cache of full length.

    Windows add their encoder and decoder, and the head of every entry that is drawn.
    """
    network: Any = _inner(loop.network)
    gpt, rows = network.backbone, batch_size * (2 if loop.guidance.on else 1)
    kv_heads = gpt.num_kv_heads or gpt.num_heads
    head_dim = gpt.width // gpt.num_heads
    hidden = gpt.mlp_hidden or mlp.swiglu_hidden(gpt.width)
    projections = gpt.width * (2 * gpt.width + 2 * kv_heads * head_dim) + 3 * gpt.width * hidden
    head = gpt.width * (network.num_codes or 0)
    weights, per_row = gpt.depth * projections + head, gpt.depth * projections + head
    if isinstance(loop.network, tensorar.Windowed):
        (codes,) = loop.heads
        assert isinstance(codes, heads.Codes)
        drawn = 1 if codes.drafts == "off" else loop.network.window
        added, computed = window_work(loop.network, gpt.width, drawn)
        weights, per_row = weights + added, per_row + computed + (drawn - 1) * head
    attention = 2 * gpt.depth * gpt.length * gpt.width
    cached = 2 * gpt.depth * rows * gpt.length * kv_heads * head_dim
    cached *= jnp.dtype(gpt.dtype).itemsize
    return Work(
        operations=2.0 * network.length * rows * (per_row + attention),
        bytes_read=float(network.length * (4 * weights + cached)),  # weights lie in float32
    )


def window_work(network: tensorar.Windowed, width: int, drawn: int) -> tuple[int, int]:
    """Weights of the query blocks of both sides, and products of them with rows at a position."""
    added = computed = 0
    for kept in (1, drawn):
        for layer in range(network.depth):
            rows = kept if layer == network.depth - 1 else network.window + 1
            mlp_weights = 2 * network.mlp_ratio * width**2
            added += 4 * width**2 + mlp_weights
            computed += 2 * width**2 * (network.window + 1) + (2 * width**2 + mlp_weights) * rows
    return added, computed


def _in_turns(
    programs: dict[str, Program], batch_size: int, mesh: Mesh, *, num_runs: int
) -> list[Timing]:
    compiled = {
        name: compiled_lib.Compiled(program.function, mesh).lower(*program.args).compile()
        for name, program in programs.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(num_runs):
        for name, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*programs[name].args))
            seconds[name].append(time.perf_counter() - start)
    return [
        Timing(name, batch_size, tuple(seconds[name]), _peak_bytes(compiled[name]), program.work)
        for name, program in programs.items()
    ]


def _peak_bytes(program: Any) -> int:
    sizes = program.memory_analysis()
    return sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes


def mar_parts(loop: mar_sampling.MARSampler) -> dict[str, Callable[..., Any]]:
    """Encoder, decoder and head alone, over all steps of the loop and with its shapes."""
    network, width = loop.network, loop.network.decoder_width
    starts = mar_sampling.step_starts(network.length, loop.num_ar_steps)

    def over_steps(body: Callable[..., Array]) -> Callable[..., Array]:
        """Carries a number through the steps, so that none is hoisted out of the loop."""

        def run(params: types.Params, rng: Key[Array, ""], label: Int[Array, " b"]) -> Array:
            label = loop.guidance.both(label)
            order = jnp.broadcast_to(jnp.arange(network.length), (len(label), network.length))
            total = jax.random.uniform(rng)
            for bucket in loop.buckets():
                weights = loop.laid_out(params, bucket, num_rows=len(label))

                def step(
                    total: Array, start: Array, bucket: Any = bucket, weights: Any = weights
                ) -> tuple[Array, None]:
                    result = body(weights, total, label, order, start, bucket)
                    return 1e-6 * jnp.mean(result), None

                steps = jnp.asarray(starts[bucket.start : bucket.stop])
                total, _ = jax.lax.scan(step, total, steps)
            return total

        return run

    def encoder(params, total, label, order, start, bucket):
        tokens = jnp.full((len(label), bucket.num_slots, network.channels), total)
        slots = order[:, : bucket.num_slots]
        return loop.apply(params, tokens, slots, label, start, method=mar.MAR.encode)

    def decoder(params, total, label, order, start, bucket):
        shape = (len(label), network.buffer_size + bucket.num_slots, network.encoder_width)
        encoded = jnp.full(shape, total, network.dtype)
        return loop.apply(
            params, encoded, order, start, start, bucket.num_drawn, method=mar.MAR.decode
        )

    def head(params, total, label, order, start, bucket):
        cond = jnp.full((len(label), bucket.num_drawn, width), total, network.dtype)
        rows = len(label) // 2 if loop.guidance.on else len(label)

        def noise_of(numbers: Int[Array, " k"]) -> Float[Array, "draws b k c"]:
            shape = (loop.solver.num_evaluations + 1, rows, len(numbers), network.channels)
            return jax.random.normal(jax.random.key(0), shape) + total

        return loop.draw(params, cond, start, start + 1, noise_of, bucket)

    return {
        "encoder": over_steps(encoder),
        "decoder": over_steps(decoder),
        "head": over_steps(head),
    }


def mar_operations(loop: mar_sampling.MARSampler, batch_size: int) -> dict[str, float]:
    """Multiplications and additions of matrix products, padding included."""
    network, head = loop.network, loop.network.head
    rows = batch_size * (2 if loop.guidance.on else 1)
    slots = network.buffer_size + network.length
    counts = {"encoder": 0.0, "decoder": 0.0, "head": 0.0}
    for bucket in loop.buckets():
        steps = bucket.stop - bucket.start
        seen, drawn = network.buffer_size + bucket.num_slots, bucket.num_drawn
        counts["encoder"] += (
            steps
            * rows
            * network.encoder_depth
            * _block(seen, seen, network.encoder_width, network.mlp_ratio)
        )
        counts["decoder"] += (
            steps
            * rows
            * (network.decoder_depth - 1)
            * _block(slots, slots, network.decoder_width, network.mlp_ratio)
        )
        counts["decoder"] += (
            steps * rows * _block(slots, drawn, network.decoder_width, network.mlp_ratio)
        )
        per_token = head.width * (head.depth * 5 * head.width + 2 * head.width)
        per_token += head.width * (network.decoder_width + 3 * head.channels)
        counts["head"] += 2.0 * steps * rows * drawn * loop.solver.num_evaluations * per_token
    return counts


def _block(num_keys: int, num_rows: int, width: int, mlp_ratio: float) -> float:
    """One transformer block of which `num_rows` rows are computed to the end."""
    projections = 3 * num_keys * width**2
    rest = num_rows * (1 + 2 * mlp_ratio) * width**2
    attention = 2 * num_rows * num_keys * width
    return 2.0 * (projections + rest + attention)
