"""What devices send each other in a compiled program: read from the compiler's own text.

The text is that of `compiled.as_text()`, optimised HLO. What stands in the body of a loop counts as
often as the loop runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np
from jax.sharding import Mesh

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}  # others end in their number of bits

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"(\w+?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]+\})\}")
_NUMBERED = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
    r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
)
_CHAIN = re.compile(r'chain_id="(\d+)"')
_PAIRS = re.compile(r"source_target_pairs=\{(\{.*?\})\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction.

    Attributes:
      kind: Of `KINDS`.
      shapes: Of what comes in and goes out: (type, sizes) of each array.
      bytes: The larger of what a device puts in and gets out, each time.
      times: It runs in the program.
      axes: Of the mesh, along which devices differ that talk to each other.
    """

    kind: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    bytes: int
    times: int
    axes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Instruction:
    shape: str
    op: str
    rest: str


def of_program(text: str, mesh: Mesh) -> list[Collective]:
    """All collectives of a program that was compiled for a mesh."""
    computations, entry = _parsed(text)
    found, chains = [], set()
    for name, times in _times(computations, entry).items():
        sizes = {x: _arrays(y.shape) for x, y in computations[name].items()}
        for instruction in computations[name].values():
            kind = instruction.op.removesuffix("-start")
            if kind not in KINDS:
                continue
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # as a TPU's compiler writes it
            # On a TPU one that is drawn out over other work stands there in pieces.
            chain = _CHAIN.search(instruction.rest)
            if chain is not None and chain[1] in chains:
                continue
            chains |= {chain[1]} if chain is not None else set()
            operands = _operands(instruction.rest)
            given = [array for x in operands for array in sizes.get(x, [])]
            taken = _arrays(instruction.shape)
            if instruction.op.endswith("-start") and kind != "all-reduce":
                taken = taken[len(given) :]  # the operands stand before the results
            found.append(
                Collective(
                    kind=kind,
                    shapes=tuple(dict.fromkeys([*given, *taken])),
                    bytes=max(_bytes(given), _bytes(taken)),
                    times=times,
                    axes=_axes(instruction.rest, mesh),
                )
            )
    return found


def total(collectives: Sequence[Collective]) -> dict[str, int]:
    """Bytes of a device by kind and axes, "all-gather over fsdp"."""
    sums: collections.Counter[str] = collections.Counter()
    for x in collectives:
        sums[f"{x.kind} over {' and '.join(x.axes) or 'nothing'}"] += x.bytes * x.times
    return dict(sums.most_common())


def _parsed(text: str) -> tuple[dict[str, dict[str, _Instruction]], str]:
    computations: dict[str, dict[str, _Instruction]] = {}
    current, entry = {}, ""
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            current = computations.setdefault(opened[2], {})
            entry = opened[2] if opened[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current[instruction[1]] = _Instruction(instruction[2], instruction[3], instruction[4])
    return computations, entry


def _times(computations: dict[str, dict[str, _Instruction]], entry: str) -> dict[str, int]:
    """How often each computation runs, for one run of the program."""
    times: collections.Counter[str] = collections.Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for instruction in computations[name].values():
            trips = _trips(instruction, computations) if instruction.op == "while" else 1
            for called in _called(instruction.rest):
                if called in computations:
                    visit(called, count * trips)

    visit(entry, 1)
    return dict(times)


def _called(rest: str) -> Iterator[str]:
    yield from _CALLED.findall(rest)
    for branches in _BRANCHES.findall(rest):
        yield from (x.strip().lstrip("%") for x in branches.split(","))


def _trips(loop: _Instruction, computations: dict[str, dict[str, _Instruction]]) -> int:
    """Turns of a loop: as the compiler notes them, or the bound in its condition."""
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = _CONDITION.search(loop.rest)
    bounds = [1]
    if condition is not None:
        for instruction in computations[condition[1]].values():
            if instruction.op == "constant" and instruction.shape.startswith("s32[]"):
                bounds.append(int(instruction.rest.partition(")")[0]))
    return max(bounds)


def _operands(rest: str) -> list[str]:
    """Names within the parentheses of an instruction."""
    depth, end = 1, 0
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    return re.findall(r"%([\w.\-]+)", rest[: end - 1])


def _arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    layouts_out = re.sub(r"\{[^}]*\}", "", shape)
    return [
        (kind, tuple(int(x) for x in sizes.split(",") if x))
        for kind, sizes in _ARRAY.findall(layouts_out)
    ]


def _bytes(arrays: Sequence[tuple[str, tuple[int, ...]]]) -> int:
    return sum(_bits(kind) * math.prod(sizes) for kind, sizes in arrays) // 8


def _bits(kind: str) -> int:
    if kind in BITS:
        return BITS[kind]
    digits = re.search(r"\d+", kind)
    return int(digits[0]) if digits else 8


def _axes(rest: str, mesh: Mesh) -> tuple[str, ...]:
    """Mesh axes along which the members of a group differ."""
    shape = tuple(mesh.shape.values())
    differ = np.zeros(len(shape), bool)
    for group in _groups(rest) or [list(range(mesh.size))]:
        places = np.array(np.unravel_index(np.array(group) % mesh.size, shape))
        differ |= (places != places[:, :1]).any(axis=1)
    return tuple(name for name, yes in zip(mesh.axis_names, differ, strict=True) if yes)


def _groups(rest: str) -> list[list[int]]:
    """Numbers of the devices that talk to each other; none where all do.

    They stand there as "{{0,1},{2,3}}"; as "[2,2]<=[2,2]T(1,0)", which numbers devices along axes
    in another order; or as "mesh['a'=2,'b'=2] {'b'}", which groups them along named axes.
    """
    if pairs := _PAIRS.search(rest) or _LISTED.search(rest):
        return [_ints(group) for group in re.findall(r"\{([\d,]+)\}", pairs[0])]
    if numbered := _NUMBERED.search(rest):
        shape, *order = numbered.groups()
        return _iota(*order).reshape(_ints(shape)).tolist()
    if named := _NAMED.search(rest):
        axes, *order, chosen = named.groups()
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", chosen)]
        numbers = np.arange(math.prod(sizes.values())) if order[0] is None else _iota(*order)
        last = range(-len(along), 0)
        numbers = np.moveaxis(numbers.reshape(list(sizes.values())), along, last)
        return numbers.reshape(-1, math.prod(numbers.shape[i] for i in last)).tolist()
    return []


def _iota(sizes: str, order: str | None) -> np.ndarray:
    numbers = np.arange(math.prod(_ints(sizes))).reshape(_ints(sizes))
    return (numbers.transpose(_ints(order)) if order else numbers).reshape(-1)


def _ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]
