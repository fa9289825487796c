"""How much a traced program computes: multiplications and additions of its matrix products."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.extend import core


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
        else:
            total += sum(inner) * (equation.params["length"] if name == "scan" else 1)
    return total


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
