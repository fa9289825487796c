"""How much a traced program computes: multiplications and additions of its matrix products.

Those inside a Pallas kernel count, padding included. Of cuDNN's, which are not traced, those of
attention do.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.extend import core


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Those of a program and of all programs that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inside(equation.params):
            yield from equations(inner)


def count(jaxpr: core.ClosedJaxpr) -> float | None:
    """Operations of a program; None where they depend on its data.

    Other arithmetic is left out. A branch counts as the longest of those it is chosen from.
    """
    try:
        return _count(jaxpr.jaxpr)
    except _DependsOnDataError:
        return None


class _DependsOnDataError(ValueError):
    """A loop runs until a condition holds."""


def _count(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, [_count(x) for x in _inside(equation.params)]
        if name == "dot_general":
            total += _of_product(equation)
        elif name == "while" and sum(inner):
            raise _DependsOnDataError
        elif name == "cond":
            total += max(inner)
        elif name.startswith("dot_product_attention"):
            total += _of_attention(equation)
        else:
            total += sum(inner) * _times(name, equation.params)
    return total


def _times(name: str, params: Mapping[str, Any]) -> int:
    """How often what an equation calls is done, over all devices."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _of_attention(equation: Any) -> float:
    """Of cuDNN's two products, or of the five with which it computes their gradient."""
    queries, keys = (x.aval.shape for x in equation.invars[:2])  # b l h k
    products = 5 if "bwd" in equation.primitive.name else 2
    return products * 2.0 * math.prod(queries) * keys[1]


def _of_product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    summed = math.prod(shape[axis] for axis in contracted)
    return 2.0 * summed * math.prod(equation.outvars[0].aval.shape)


def _inside(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    """Programs that an equation calls."""
    for value in jax.tree.leaves(dict(params), is_leaf=lambda x: hasattr(x, "eqns")):
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
