"""What a comparison needs of a set of images, read off it batch by batch on all devices.

Batches have one size on every device, so that the features of an image depend on no other device or
process. Each process reads the rows of its own devices; what it has gathered of them is merged at
the end. Kept are mean and covariance and, for metrics of neighbours and kernels, features in
float32; images and logits pass.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh
from jaxtyping import Float32, Int, UInt8

from arcond_jax.evaluation import features as features_lib
from arcond_jax.evaluation import image_sets, moments, scores
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.parallel import processes, stalling

MAX_CLASSES = 1_000_000  # where nobody says how many there are
Labelled = tuple[np.ndarray, np.ndarray | None]  # uint8 images and, where known, their classes
Images = image_sets.ImageSet | Iterable[Labelled]
Get = Callable[[int, int], UInt8[np.ndarray, "rows height width channels"]]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of a set of images.

    Attributes:
      count: Images.
      image_shape: Height, width, channels.
      features: Mean and covariance; None below two images.
      spatial: The same of spatial features; None also where the network has none.
      rows: Features in float32 of the images kept, in order; None if none are.
      label: Classes of the images kept; None where they are not known.
      inception_score: Of the logits.
      class_accuracy: Share of images read as their label; None where labels are not known or not
        those of the network.
      per_class: Images of the class with the fewest and of that with the most; None without labels.
    """

    count: int
    image_shape: tuple[int, ...]
    features: moments.Statistics | None
    spatial: moments.Statistics | None
    rows: Float32[np.ndarray, "m d"] | None
    label: Int[np.ndarray, " m"] | None
    inception_score: float
    class_accuracy: float | None
    per_class: tuple[int, int] | None


def summarise(
    images: Images,
    extractor: features_lib.Features,
    *,
    what: str = "images",
    total: int | None = None,
    mesh: Mesh | None = None,
    keep: int | None = None,
    num_classes: int | None = None,
    width: int | None = None,
    image_shape: tuple[int, ...] | None = None,
) -> Summary:
    """Reads a set of images once; with several processes all have to call it, with the same images.

    Args:
      images: A set, or batches of any size in order, of which nothing is kept.
      extractor: Reads uint8 images.
      what: The images in words, for messages and the bar of progress.
      total: Images that batches will give in all, so that memory is taken once; None if not known.
      mesh: Of all devices, if the weights of the extractor lie whole on each of them and it takes
        images cut over them. None for an extractor of one device.
      keep: Rows of features to keep, evenly spread; None for all, 0 for none.
      num_classes: Classes that labels are of; None for unknown.
      width: Features that are expected, as of a reference.
      image_shape: Height, width and channels that are expected.

    Raises:
      ValueError: No images, or not uint8, not square or not as expected, features that are not
        finite or of another width, or labels of no class.
    """
    total = len(images) if isinstance(images, image_sets.ImageSet) else total
    gathered = _Gathered(extractor, total=total, keep=keep, num_classes=num_classes, width=width)
    checked = _Checked(images, what, image_shape, num_classes)
    hidden = None if processes.is_first() else True  # None: where there is no terminal
    with tqdm.tqdm(
        desc=f"reading {what}", total=total, unit="image", disable=hidden, mininterval=1.0
    ) as progress:
        for first_row, read in _outputs(checked, extractor, mesh):
            gathered.add(first_row, read, checked.label)
            progress.update(len(read.features))
    return gathered.summary(checked)


class _Read(NamedTuple):
    """Outputs of a network on the host, of the rows that count."""

    features: Float32[np.ndarray, "n d"]
    logits: Float32[np.ndarray, "n classes"]
    spatial: Float32[np.ndarray, "n spatial"] | None


class _Checked:
    """Images in batches of any size asked for, each of which is looked at."""

    def __init__(
        self,
        images: Images,
        what: str,
        expected: tuple[int, ...] | None,
        num_classes: int | None,
    ) -> None:
        self._images, self._what = images, what
        self._expected, self._num_classes = expected, num_classes
        self._label: list[np.ndarray | None] = []
        self.image_shape: tuple[int, ...] = ()
        self.count = 0
        if isinstance(images, image_sets.ImageSet):
            self._take_shape(images.image_shape)
            self._take_label(images.label, len(images))

    @property
    def label(self) -> Int[np.ndarray, " n"] | None:
        """Classes of the images so far, or of all where they are known before."""
        known = [x for x in self._label if x is not None]
        return np.concatenate(known) if known and len(known) == len(self._label) else None

    def batches(self, size: int) -> Iterator[tuple[int, Get]]:
        """Number of the first row, and what gets some of up to `size` rows; fewer at the end."""
        if isinstance(self._images, image_sets.ImageSet):
            self.count = len(self._images)
            for start in range(0, self.count, size):
                yield start, functools.partial(self._part, start)
                stalling.ended()
        else:
            for batch in _rechunked(map(self._taken, self._images), size):
                start, self.count = self.count, self.count + len(batch)
                yield start, lambda low, high, batch=batch: batch[low:high]
                stalling.ended()
        if not self.count:
            raise ValueError(f"There are no {self._what} to evaluate.")

    def _part(self, start: int, low: int, high: int) -> np.ndarray:
        assert isinstance(self._images, image_sets.ImageSet)
        low, high = start + low, min(start + high, self.count)
        if low >= high:
            return np.zeros((0, *self.image_shape), np.uint8)
        return self._pixels(self._images[low:high])

    def _taken(self, labelled: Labelled) -> np.ndarray:
        image, label = labelled
        image = self._pixels(image)
        self._take_label(label, len(image))
        return image

    def _pixels(self, image: np.ndarray) -> np.ndarray:
        if image.dtype != np.uint8 or image.ndim != 4:
            raise ValueError(
                f"The {self._what} must be uint8 [n, height, width, channels], got {image.dtype} "
                f"{list(image.shape)}: convert them first."
            )
        self._take_shape(image.shape[1:])
        return _in_channels(image, self.image_shape[-1], what=self._what)

    def _take_label(self, label: Int[np.ndarray, " n"] | None, count: int) -> None:
        self._label.append(label)
        if label is None or not count:
            return
        if len(label) != count:
            raise ValueError(f"{count} images came with {len(label)} labels.")
        most = self._num_classes or MAX_CLASSES
        if label.min() < 0 or label.max() >= most:
            raise ValueError(
                f"The labels span {label.min()} to {label.max()}, outside the {most} classes."
            )

    def _take_shape(self, image_shape: tuple[int, ...]) -> None:
        image_sets.check_square(image_shape, where=f"the {self._what}")
        expected = self.image_shape or self._expected or image_shape
        if tuple(image_shape[:2]) != tuple(expected[:2]):
            raise ValueError(
                f"The {self._what} are {list(image_shape)}, those of the reference "
                f"{list(expected)}: they cannot be compared."
            )
        self.image_shape = tuple(expected)


class _Gathered:
    """What this process has read, and then what all have."""

    def __init__(
        self,
        extractor: features_lib.Features,
        *,
        total: int | None,
        keep: int | None,
        num_classes: int | None,
        width: int | None,
    ) -> None:
        self._num_logits, self._num_classes = extractor.num_classes, num_classes
        self._total, self._keep, self._width = total, keep, width
        # Numbers of the rows kept and their features, or while nobody knows how many come, blocks.
        self._chosen = None if total is None else spread(total, total if keep is None else keep)
        self._rows: Float32[np.ndarray, "m d"] | None = None
        self._blocks: list[tuple[int, Float32[np.ndarray, "rows d"]]] = []
        self._features: moments.Moments | None = None
        self._spatial: moments.Moments | None = None
        self._score = scores.InceptionScore(extractor.num_classes)
        self._hits = 0

    def add(
        self,
        first_row: int,
        read: _Read,
        label: Int[np.ndarray, " n"] | None,
    ) -> None:
        rows = read.features
        if self._features is None:
            self._features = moments.Moments(self._checked_width(rows.shape[1]))
            if read.spatial is not None:
                self._spatial = moments.Moments(read.spatial.shape[1])
        self._features.add(rows, first_row=first_row)
        if self._spatial is not None and read.spatial is not None:
            self._spatial.add(read.spatial, first_row=first_row)
        if len(rows):
            self._score.add(read.logits, first_row)
        if label is not None and self._knows_labels():
            found = read.logits.argmax(axis=1)
            self._hits += int(np.sum(found == label[first_row : first_row + len(found)]))
        self._hold(rows, first_row)

    def _hold(self, rows: Float32[np.ndarray, "n d"], first_row: int) -> None:
        if self._chosen is None:
            if self._keep != 0:
                self._blocks.append((first_row, rows.copy()))
            return
        if self._rows is None:
            self._rows = np.zeros((len(self._chosen), rows.shape[1]), np.float32)
        low, high = np.searchsorted(self._chosen, [first_row, first_row + len(rows)])
        self._rows[low:high] = rows[self._chosen[low:high] - first_row]

    def summary(self, images: _Checked) -> Summary:
        count, label = images.count, images.label
        assert self._features is not None  # there are images
        features, spatial = _merged(self._features), self._spatial and _merged(self._spatial)
        score, hits = scores.InceptionScore(self._num_logits), 0
        for theirs in processes.each(
            self._score.arrays(count) | {"hits": np.asarray(self._hits, np.int64)}
        ):
            score.merge_arrays(theirs)
            hits += int(theirs["hits"])
        rows, chosen = self._all_rows(count)
        few = count < 2
        per_class = None
        if label is not None:
            counts = np.bincount(label, minlength=self._num_classes or 0)
            per_class = int(counts.min()), int(counts.max())
        accurate = label is not None and self._knows_labels()
        return Summary(
            count=count,
            image_shape=images.image_shape,
            features=None if few else features.statistics(),
            spatial=None if few or spatial is None else spatial.statistics(),
            rows=rows if len(chosen) else None,
            label=None if label is None else label[chosen],
            inception_score=score.value(),
            class_accuracy=hits / count if accurate else None,
            per_class=per_class,
        )

    def _all_rows(self, count: int) -> tuple[Float32[np.ndarray, "m d"], Int[np.ndarray, " m"]]:
        """Features of the rows kept, of all processes, and their numbers."""
        assert self._features is not None
        if self._chosen is None:
            self._chosen = spread(count, count if self._keep is None else self._keep)
            blocks, self._blocks = self._blocks[::-1], []
            while blocks:  # emptied on the way
                first_row, rows = blocks.pop()
                self._hold(rows, first_row)
        elif self._total != count:
            raise ValueError(f"{self._total} images were announced, {count} came.")
        width = self._features.mean.size
        rows = np.zeros((0, width), np.float32) if self._rows is None else self._rows
        processes.added(rows)
        return rows, self._chosen

    def _knows_labels(self) -> bool:
        return self._num_logits == self._num_classes

    def _checked_width(self, width: int) -> int:
        if width != (self._width or width):
            raise ValueError(
                f"The network has {width} features, the reference was made with {self._width}: use "
                "the same network for both."
            )
        return width


def _in_channels(
    image: UInt8[np.ndarray, "n height width channels"], count: int, *, what: str
) -> UInt8[np.ndarray, "n height width count"]:
    """Grey images as 3 equal channels, and such images as grey ones."""
    channels = image.shape[-1]
    if channels == count:
        return image
    if channels == 1 and count == 3:
        return np.repeat(image, 3, axis=-1)
    if channels == 3 and count == 1 and np.all(image == image[..., :1]):
        return image[..., :1]
    raise ValueError(
        f"The {what} have {channels} channels, those before them or of the reference {count}: they "
        "cannot be compared."
    )


def spread(total: int, count: int) -> Int[np.ndarray, " rows"]:
    """`count` of `total` rows, evenly spread, or all there are."""
    count = min(count, total)
    return np.arange(count) * total // max(count, 1)


def _merged(own: moments.Moments) -> moments.Moments:
    """What all processes have seen, merged in their order."""
    if not processes.are_several():
        return own
    merged = moments.Moments(own.mean.size)
    for arrays in processes.each(own.arrays()):
        merged.merge(moments.Moments.of_arrays(arrays))
    return merged


def _rechunked(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same rows in batches of `size`; fewer in the last."""
    rest: list[np.ndarray] = []
    held = 0
    for batch in batches:
        rest, held = [*rest, batch], held + len(batch)
        if held < size:
            continue
        whole = rest[0] if len(rest) == 1 else np.concatenate(rest)
        cut = held - held % size
        for start in range(0, cut, size):
            yield whole[start : start + size]
        rest, held = [whole[cut:]], held - cut
    if held:
        yield np.concatenate(rest)


def _outputs(
    images: _Checked, extractor: features_lib.Features, mesh: Mesh | None
) -> Iterator[tuple[int, _Read]]:
    """Row numbers and outputs on the host of what this process reads, in order.

    The next batch is on its way to the devices before this one is waited for. Of the first one, a
    process for which there are no rows gets outputs of none.
    """
    read = _on_one(images, extractor) if mesh is None else _on_all(images, extractor, mesh)
    waiting: collections.deque[tuple[int, int, Sequence[Any]]] = collections.deque()
    for batch in read:
        waiting.append(batch)
        if len(waiting) > 2:
            yield _fetched(*waiting.popleft())
    while waiting:
        yield _fetched(*waiting.popleft())


def _fetched(first_row: int, count: int, outputs: Sequence[Any]) -> tuple[int, _Read]:
    features, logits, spatial = outputs

    def fetched(x: Any) -> Float32[np.ndarray, "n d"]:
        return np.asarray(x, np.float32)[:count]

    read = _Read(fetched(features), fetched(logits), None if spatial is None else fetched(spatial))
    return first_row, read


def _on_one(
    images: _Checked, extractor: features_lib.Features
) -> Iterator[tuple[int, int, Sequence[Any]]]:
    """First row, number of rows that count, and outputs; processes take turns."""
    size = features_lib.batch_size(extractor)
    me = jax.process_index() if processes.are_several() else 0
    several = jax.process_count() if processes.are_several() else 1
    for start, get in images.batches(size * several):
        rows = get(me * size, (me + 1) * size)
        if len(rows) or start == 0:
            yield start + me * size, len(rows), extractor(_filled(rows, size))


def _on_all(
    images: _Checked, extractor: features_lib.Features, mesh: Mesh
) -> Iterator[tuple[int, int, Sequence[Any]]]:
    """The same, of each device of this process."""
    place, size = mesh_lib.batch_sharding(mesh), features_lib.batch_size(extractor)
    whole = mesh_lib.spread_over(mesh, 1) * size
    for start, get in images.batches(whole):
        counts: dict[int, int] = {}

        def load(index: Any, get: Get = get, counts: dict[int, int] = counts) -> np.ndarray:
            low, high, _ = index[0].indices(whole)
            rows = get(low, high)
            counts[low] = len(rows)
            return _filled(rows, high - low)

        image = jax.make_array_from_callback((whole, *images.image_shape), place, load)
        outputs = jax.device_put(extractor(image), place)
        shards = [None if x is None else _by_row(x, whole) for x in outputs]
        for low, count in sorted(counts.items()):
            if count or start == 0:
                yield start + low, count, [None if x is None else x[low] for x in shards]


def _by_row(x: jax.Array, total: int) -> dict[int, jax.Array]:
    """What lies on the devices of this process, by its first row."""
    return {shard.index[0].indices(total)[0]: shard.data for shard in x.addressable_shards}


def _filled(rows: np.ndarray, size: int) -> np.ndarray:
    """Black images below the rows, so that every batch is of one size."""
    if len(rows) == size:
        return rows
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
