"""Recorded outputs of the official PyTorch models, and how closely ours must follow them.

An archive holds `config` (JSON), `params/<official name>`, `in/<name>` and `out/<name>`. A check
builds our module from the config, and is a function from official parameters to our version of
some of the outputs.
"""

import dataclasses
import json
import pathlib
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Outputs = Mapping[str, Any]  # name below `out/` to our array
Check = Callable[[Mapping[str, np.ndarray]], Outputs]

NOISE = 1e-7  # of the parameters: about one rounding of float32
ROUNDING = 1e-5  # of the largest value: what another order of sums may cost
CAP = 3e-5  # of the largest value: beyond it a wrong GELU would pass


@dataclasses.dataclass(frozen=True)
class Golden:
    """One archive.

    Attributes:
      config: Sizes, seeds and diagnostics.
      params, inputs, outputs: Arrays by their names without the first part.
    """

    path: pathlib.Path
    config: dict[str, Any]
    params: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def load(path: pathlib.Path) -> Golden:
    with np.load(path, allow_pickle=False) as archive:
        config = json.loads(str(archive["config"]))
        parts = {
            part: {
                name.removeprefix(f"{part}/"): archive[name]
                for name in archive.files
                if name.startswith(f"{part}/")
            }
            for part in ("params", "in", "out")
        }
    return Golden(path, config, parts["params"], parts["in"], parts["out"])


def perturbed(params: Mapping[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The parameters as they could be after one more rounding."""
    rng = np.random.default_rng(seed)
    return {
        name: (x * (1.0 + NOISE * rng.standard_normal(x.shape))).astype(x.dtype)
        if np.issubdtype(x.dtype, np.floating)
        else x
        for name, x in params.items()
    }


def in_halves(x: jax.Array) -> jax.Array:
    """Rows under guidance as the official code has them: all conditional ones first."""
    return jnp.concatenate([x[::2], x[1::2]])


def in_pairs(x: jax.Array) -> jax.Array:
    """Undoes `in_halves`: each conditional row has its unconditional one beside it."""
    return jnp.stack(jnp.split(x, 2), axis=1).reshape(x.shape)


def compare(
    golden: Golden,
    check: Check,
    *,
    noise_factor: float = 10.0,
    cap: float | None = CAP,
    by_row: Collection[str] = (),
    rounding: Mapping[str, float] = types.MappingProxyType({}),
    caps: Mapping[str, float] = types.MappingProxyType({}),
    others: Sequence[Check] = (),
) -> dict[str, float]:
    """Every output of `check` against the recorded one.

    Whole numbers must be equal. Floats may differ by `noise_factor` times what a rounding of all
    parameters changes, or by 1e-5 of the largest value, and never by more than `cap` of it.

    Args:
      by_row: Outputs whose first axis runs over magnitudes; each index has its own largest value.
      rounding: Takes the place of 1e-5 for an output, up to its cap; the caller says why.
      caps: Takes the place of `cap` for an output; the caller says why.
      others: The same with sums in another order: what that changes is noise too.

    Returns:
      The largest difference of each output as a share of what is allowed.
    """
    with jax.default_matmul_precision("highest"):
        ours = check(golden.params)
        shaken = [check(perturbed(golden.params, seed)) for seed in (0, 1)]
        shaken += [other(golden.params) for other in others]
    shares = {}
    for name, value in ours.items():
        expected, value = golden.outputs[name], np.asarray(value)
        assert value.shape == expected.shape, f"{name}: {value.shape}, not {expected.shape}"
        if not np.issubdtype(expected.dtype, np.floating):
            np.testing.assert_array_equal(value, expected, err_msg=name)
            continue
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(value[~finite], expected[~finite], err_msg=name)
        noise = np.max([np.abs(np.asarray(s[name]) - value) for s in shaken], axis=0)
        rows = range(len(expected)) if name in by_row else [...]
        for row in rows:
            at = finite[row]
            largest = np.abs(expected[row])[at].max(initial=0.0)
            share = rounding.get(name, ROUNDING)
            allowed = max(noise_factor * noise[row][at].max(initial=0.0), share * largest)
            most = caps.get(name, cap)
            if most is not None:
                allowed = min(allowed, most * largest)
            difference = np.abs(value - expected)[row][at].max(initial=0.0)
            label = name if row is ... else f"{name}[{row}]"
            shares[label] = float(difference / max(allowed, 1e-30))
    worst = {name: round(share, 3) for name, share in shares.items() if share > 1.0}
    assert not worst, f"{golden.path.name}: beyond what is allowed, as a multiple of it: {worst}"
    return shares
