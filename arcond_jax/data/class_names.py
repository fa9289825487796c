"""Names of the 1,000 classes of ImageNet, to ask for a class by name.

Source: ILSVRC-2012 numbers its synsets in the order of their WordNet ids, and the names are the
lemmas of WordNet 3.0 (Princeton University, WordNet licence), as in timm's data/_info/
imagenet_synsets.txt and imagenet_synset_to_lemma.txt. One departure: "crane bird", "construction
crane", "cardigan sweater" and "tights" are added, where two classes share their only name.
"""

import difflib
import functools
import pathlib
import re
from collections.abc import Sequence

NUM_CLASSES = 1000
_SYNSET = re.compile(r"n\d{8}")
_PATH = pathlib.Path(__file__).with_name("imagenet_classes.txt")


def imagenet() -> tuple[str, ...]:
    """A line per class id: its names, the usual one first, with ", " between them."""
    return tuple(_PATH.read_text(encoding="utf-8").splitlines())


def spoken(names: Sequence[str]) -> tuple[str, ...]:
    """The names of classes as people say them: those of ImageNet for its 1,000 synsets."""
    if len(names) == NUM_CLASSES and all(_SYNSET.fullmatch(name) for name in names):
        return imagenet()
    return tuple(names)


def label_of(name: str, names: Sequence[str]) -> int:
    """The class id of a name, in upper or lower case; a class's first name goes before synonyms.

    Args:
      names: A line per class id, as `imagenet` gives them.

    Raises:
      ValueError: No class has that name, with the closest ones, or several have, with their ids.
    """
    lines = _synonyms(tuple(names))
    asked = _plain(name)
    first = [i for i, line in enumerate(lines) if asked == line[0]]
    found = first or [i for i, line in enumerate(lines) if asked in line]
    if len(found) == 1:
        return found[0]
    if found:
        several = "; ".join(f"{i} ({names[i]})" for i in found)
        raise ValueError(f"class name {name!r} is ambiguous: {several}; give one by --label")
    known = {synonym: i for i, line in enumerate(lines) for synonym in line}
    near = [f"{x} ({known[x]})" for x in difflib.get_close_matches(asked, known, cutoff=0.5)]
    closest = f"the closest are {', '.join(near)}" if near else "none is close"
    raise ValueError(
        f"none of the {len(lines)} classes is named {name!r}, {closest}: give a name, or a number "
        "by --label"
    )


@functools.lru_cache(maxsize=1)
def _synonyms(names: tuple[str, ...]) -> list[list[str]]:
    return [[_plain(synonym) for synonym in line.split(", ")] for line in names]


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())
