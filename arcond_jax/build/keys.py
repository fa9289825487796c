"""Settings: their defaults, and what values they may have.

A section is a mapping of names to `Key`; a config is built from sections and checked by them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Of numbers that are computed with: beyond these float32 soon has no inverse, or no product.
SMALLEST, LARGEST = 1e-6, 1e6
NEARLY_1 = 0.999999  # the next numbers of float32 are 1


@dataclasses.dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
      kind: Its type; float also takes an int, tuple also a list.
      entries: What a tuple holds: int for whole numbers of at least 1, float for numbers from
        `SMALLEST` to `LARGEST`.
      default: None only where it is optional.
      optional: Whether it may be None.
      low, high: Least and largest value.
      above, below: Values it must not reach.
      choices: All values there are.
    """

    kind: type
    default: Any
    optional: bool = False
    low: int | float | None = None
    high: int | float | None = None
    above: int | float | None = None
    below: int | float | None = None
    choices: Sequence[Any] | None = None
    entries: type = int

    def accept(self, name: str, value: Any) -> Any:
        """The value, of the right type; raises ValueError, naming the setting, if it cannot be."""
        if value is None and self.optional:
            return None
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ValueError(f"{name} has more than 64 bits")
        if self.kind is float and type(value) is int:
            value = float(value)
        if self.kind is tuple and isinstance(value, list):
            value = tuple(value)
        if type(value) is not self.kind:
            wanted = self.kind.__name__ + (" or None" if self.optional else "")
            raise ValueError(f"config key {name} wants {wanted}, not {str(value)!r}")
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{name} {value!r} is not one of {', '.join(map(str, self.choices))}")
        if self.kind is tuple:
            return self._entries(name, value)
        if self.kind in (int, float) and not self._inside(value):
            raise ValueError(f"{name} {value} must be {self._range()}")
        return value

    def _entries(self, name: str, values: Any) -> tuple:
        if self.entries is int:
            right = all(type(x) is int and x >= 1 for x in values)
            words = "whole numbers of at least 1"
        else:
            right = all(type(x) in (int, float) and SMALLEST <= x <= LARGEST for x in values)
            words = f"numbers of at least {SMALLEST:g} and at most {LARGEST:g}"
        if not (values and right):
            raise ValueError(f"{name} {values} must hold {words}")
        return tuple(self.entries(x) for x in values)

    def _inside(self, value: Any) -> bool:
        return (
            math.isfinite(value)
            and (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def _range(self) -> str:
        bounds = {
            "at least": self.low,
            "above": self.above,
            "at most": self.high,
            "below": self.below,
        }
        words = [
            f"{word} {x if self.kind is int else f'{x:g}'}"
            for word, x in bounds.items()
            if x is not None
        ]
        return " and ".join(words) or "finite"


Section = Mapping[str, Key]


def integer(default: int | None, low: int | None = 1, **more: Any) -> Key:
    """A whole number, at least 1 unless told otherwise."""
    return Key(int, default, low=low, **more)


def number(default: float | None, **more: Any) -> Key:
    """A finite number."""
    return Key(float, default, **more)


def positive(default: float | None, **more: Any) -> Key:
    """A number above 0, neither tiny nor huge unless told otherwise."""
    bounds: dict[str, Any] = {"low": SMALLEST, "high": LARGEST}
    return Key(float, default, **(bounds | more))


def weight(default: float) -> Key:
    """A factor of at least 0."""
    return Key(float, default, low=0.0, high=LARGEST)


def share(default: float | None, **more: Any) -> Key:
    """A number from 0 to nearly 1, such as a rate of dropout."""
    return Key(float, default, low=0.0, high=NEARLY_1, **more)


def flag(default: bool) -> Key:
    """True or False."""
    return Key(bool, default)


def text(default: str | None, **more: Any) -> Key:
    """A word or a path."""
    return Key(str, default, **more)


def choice(default: str, choices: Sequence[str]) -> Key:
    """One of a few words."""
    return Key(str, default, choices=tuple(choices))


def sizes(default: tuple[int, ...]) -> Key:
    """Several whole numbers."""
    return Key(tuple, default)


def weights() -> Key:
    """Several positive numbers, or None."""
    return Key(tuple, None, optional=True, entries=float)
