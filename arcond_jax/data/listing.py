"""What images a source of any kind holds, before one of them is read."""

import dataclasses
import functools
import gzip
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from arcond_jax.data import folder, images

VALIDATION = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_LABELS = pathlib.Path(__file__).with_name("imagenet_validation.txt.gz")


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of a split, in order.

    Attributes:
      kind: Of the source, in words.
      names: Of the images, as messages give them.
      label: Index into `class_names` of each; int32 [n].
      size: Bytes of each, exact or nearly so; int64 [n].
      class_names: In the order of their ids.
      read: The encoded bytes of an image; called from several threads.
    """

    kind: str
    names: Sequence[str]
    label: np.ndarray
    size: np.ndarray
    class_names: tuple[str, ...]
    read: Callable[[int], bytes]

    def __len__(self) -> int:
        return len(self.names)

    def rows(self, chosen: np.ndarray) -> "Listing":
        """Some of the images."""
        return dataclasses.replace(
            self,
            names=[self.names[i] for i in chosen],
            label=self.label[chosen],
            size=self.size[chosen],
            read=lambda index: self.read(int(chosen[index])),
        )

    def renamed(self, class_names: tuple[str, ...]) -> "Listing":
        """The same labels under other names."""
        return dataclasses.replace(self, class_names=class_names)

    def labelled(self, class_names: tuple[str, ...]) -> "Listing":
        """The same images with labels that are indices into other names of the same classes.

        Raises:
          ValueError: There are images of a class that is not among them.
        """
        places = {name: i for i, name in enumerate(class_names)}
        used = [self.class_names[i] for i in np.unique(self.label)]
        unknown = [name for name in used if name not in places]
        if unknown:
            raise ValueError(
                f"the held-out images have the class {unknown[0]!r}, which the train split does "
                f"not have ({len(unknown)} of {len(used)} classes are unknown to it): rename or "
                "remove it"
            )
        table = np.asarray([places.get(name, -1) for name in self.class_names], np.int32)
        return dataclasses.replace(self, label=table[self.label], class_names=class_names)


class Listed:
    """Random access to the images of a listing; items and attributes are those of `ImageFolder`."""

    image_dtype = np.dtype(np.uint8)

    def __init__(self, listing: Listing, *, image_size: int):
        self._listing, self.label = listing, listing.label
        self.label_names, self.num_classes = listing.class_names, len(listing.class_names)
        self.image_shape: tuple[int, int, int] = (image_size, image_size, 3)

    def __len__(self) -> int:
        return len(self._listing)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        name, encoded = self._listing.names[index], self._listing.read(index)
        image = images.open_square(name, self.image_shape[0], num_channels=3, encoded=encoded)
        return {"image": image, "label": self.label[index]}


def held_out_of(listing: Listing, share: float, *, seed: int) -> tuple[Listing, Listing]:
    """Splits off a share of every class, rounded, by a seed: what stays, and what is held out."""
    rng = np.random.default_rng(seed)
    taken = np.zeros(len(listing), bool)
    for label in range(len(listing.class_names)):
        rows = np.flatnonzero(listing.label == label)
        count = min(round(share * len(rows)), len(rows) - 1)
        taken[rng.permutation(rows)[: max(count, 0)]] = True
    if not taken.any():
        raise ValueError(
            f"a share of {share:g} is less than half an image of every class: raise --held_out"
        )
    return listing.rows(np.flatnonzero(~taken)), listing.rows(np.flatnonzero(taken))


def by_split(paths: Iterable[pathlib.Path], root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """Files by the split that their names or folders say: "train", which is also the rest.

    "held_out" are those of the first of val, validation, held_out and test that there is.
    """
    found: dict[str, list[pathlib.Path]] = {}
    words = [word for names in folder.SPLITS.values() for word in names]
    for path in sorted(paths):
        text = str(path.relative_to(root)).lower() if path != root else path.name.lower()
        said = [word for word in words if re.search(rf"(?<![a-z]){word}(?![a-z])", text)]
        split = said[0] if said else "train"
        found.setdefault(split, []).append(path)
    chosen = {}
    for split, names in folder.SPLITS.items():
        first = next((name for name in names if name in found), None)
        if first is not None:
            chosen[split] = found[first]
    return chosen


@functools.cache
def validation_synsets() -> tuple[str, ...]:
    """The class of ILSVRC2012_val_00000001.JPEG and the 49,999 that follow.

    Source: validation_labels.txt of tensorflow_datasets (Apache-2.0), in the order of file names.
    """
    return tuple(gzip.decompress(_LABELS.read_bytes()).decode().split())


def validation_labels(names: Iterable[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels of files ILSVRC2012_val_*.JPEG by their names, and the 1,000 synsets."""
    synsets = validation_synsets()
    class_names = tuple(sorted(set(synsets)))
    places = {name: i for i, name in enumerate(class_names)}
    numbers = []
    for name in names:
        found = VALIDATION.fullmatch(name)
        if found is None or not 1 <= int(found[1]) <= len(synsets):
            raise ValueError(f"{name} is not a file of ILSVRC2012's validation set: remove it")
        numbers.append(int(found[1]) - 1)
    return np.asarray([places[synsets[i]] for i in numbers], np.int32), class_names
