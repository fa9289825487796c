"""Laws of the data order, of the digits split and of the two spellings of an image."""

import hashlib
import itertools
import json
import threading
import time

import grain
import jax
import numpy as np
import pytest

from arcond_jax.data import digits, images, pipeline


class Numbered:
    """Item i is a constant image of value i, so that a batch shows which items it holds."""

    num_classes = 2
    image_shape = (2, 2, 1)
    image_dtype = np.dtype(np.float32)
    label_names = ("even", "odd")

    def __init__(self, length, broken=()):
        self.length, self.broken = length, broken
        self.label = np.arange(length, dtype=np.int32) % 2

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("truncated file")
        return {"image": np.full((2, 2, 1), index, np.float32), "label": np.int32(index % 2)}


def take(iterator, count):
    return [batch["image"][:, 0, 0, 0].astype(int) for batch in itertools.islice(iterator, count)]


def test_split_is_the_published_one():
    train, held_out = digits.Digits("train"), digits.Digits("held_out")
    assert (len(train), len(held_out)) == (1437, 360)
    digest = hashlib.sha256(held_out.image.tobytes() + held_out.label.tobytes()).hexdigest()
    assert digest[:16] == "f1120d1202d1ea03"
    both = np.concatenate([train.label, held_out.label])
    for label in range(10):  # stratified: each class has its share to within one image
        share = (both == label).sum() * 360 / 1797
        assert abs((held_out.label == label).sum() - share) <= 1


def test_digits_items():
    source = digits.Digits("train")
    item = source[5]
    assert item["image"].shape == source.image_shape and item["image"].dtype == np.float32
    assert item["label"].dtype == np.int32
    assert (source.image.min(), source.image.max()) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="no split 'test'"):
        digits.Digits("test")


def test_uint8_round_trip():
    image_uint8 = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    image = images.uint8_to_image(image_uint8)
    assert (image.min(), image.max(), image.dtype) == (-1.0, 1.0, np.float32)
    np.testing.assert_array_equal(images.image_to_uint8(image), image_uint8)
    np.testing.assert_array_equal(images.image_to_uint8(image * 9)[0, 0], 0)


def test_uint8_becomes_the_same_floats_on_host_and_device():
    image_uint8 = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    expected = (image_uint8 / np.float32(127.5) - np.float32(1.0)).view(np.int32)
    for scale in (images.as_float, jax.jit(images.as_float)):
        np.testing.assert_array_equal(np.asarray(scale(image_uint8)).view(np.int32), expected)
    image = images.uint8_to_image(image_uint8)
    assert images.as_float(image) is image


def test_each_image_once_an_epoch():
    taken = np.concatenate(
        take(pipeline.train_iterator(Numbered(12), global_batch_size=4, seed=0), 6)
    )
    assert sorted(taken[:12]) == sorted(taken[12:]) == list(range(12))
    assert taken[:12].tolist() != taken[12:].tolist() != list(range(12))


@pytest.mark.parametrize("process_count", [2, 4])
def test_order_does_not_depend_on_process_count(process_count):
    # 10 images in batches of 4: batches cross the ends of epochs.
    def batches(process_index, count):
        iterator = pipeline.train_iterator(
            Numbered(10),
            global_batch_size=4,
            seed=7,
            rows=np.arange(4).reshape(count, -1)[process_index],
        )
        return take(iterator, 6), iterator.get_state()

    alone, state = batches(0, 1)
    each = [batches(index, process_count) for index in range(process_count)]
    parts, states = zip(*each, strict=True)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), alone)
    assert all(other == state == {"next_index": 6} for other in states)


def test_process_loads_only_its_rows():
    order = take(pipeline.train_iterator(Numbered(8), global_batch_size=4, seed=1), 2)
    others = {int(index) for batch in order for index in batch[2:]}
    source = Numbered(8, broken=others)
    first_half = pipeline.train_iterator(
        source, global_batch_size=4, seed=1, rows=np.arange(2), num_threads=0
    )
    np.testing.assert_array_equal(take(first_half, 2), [batch[:2] for batch in order])


def test_the_order_is_that_of_earlier_versions():
    # A run that was begun with one of them goes on with these batches.
    order = [7, 9, 0, 8, 4, 2, 5, 6, 3, 1, 6, 0, 4, 2, 7, 9, 1, 5, 8, 3]
    iterator = pipeline.train_iterator(Numbered(10), global_batch_size=4, seed=7)
    assert np.concatenate(take(iterator, 5)).tolist() == order


@pytest.mark.parametrize(("length", "seed"), [(10, 7), (1000, 0), (70_000, 2**32 - 1)])
def test_the_order_is_that_of_grain(length, seed):
    order = grain.MapDataset.range(length).seed(seed).shuffle().repeat(None)
    positions = np.asarray([0, 1, 2, length - 1, length, length + 1, 7 * length + 5])
    found = pipeline.shuffled(positions, length, seed=seed)
    assert found.tolist() == [order[int(i)] for i in positions]


class Seen:
    """Each item says which it is and which view was taken."""

    num_views = 2
    label_names = ("0",)

    def __init__(self, length):
        self.length = length
        self.arrays = {"seen": ((2,), np.dtype(np.int64))}

    def __len__(self):
        return self.length

    def view(self, index, view):
        return {"seen": np.asarray([index, view]), "label": np.int32(0)}


def test_views_depend_on_seed_epoch_and_index_alone():
    def seen(batch_size, count, seed=3, **process):
        iterator = pipeline.train_iterator(
            Seen(10), global_batch_size=batch_size, seed=seed, num_threads=0, **process
        )
        return np.stack([batch["seen"] for batch in itertools.islice(iterator, count)])

    alone = seen(4, 25)  # ten epochs; batches cross their ends
    for rows in ([0, 1], [1, 3]):
        np.testing.assert_array_equal(seen(4, 25, rows=np.array(rows)), alone[:, rows])
    np.testing.assert_array_equal(seen(10, 10).reshape(-1, 2), alone.reshape(-1, 2))
    epochs = [dict(epoch) for epoch in alone.reshape(10, 10, 2).tolist()]
    assert all(epoch != epochs[0] for epoch in epochs[1:])
    assert dict(seen(10, 1, seed=4)[0].tolist()) != epochs[0]
    # These numbers are those of every later version: runs go on with them.
    assert [epochs[0][i] for i in range(10)] == [1, 1, 0, 1, 1, 1, 1, 0, 1, 1]


def test_views_are_drawn_evenly():
    for num_views in (2, 10):
        indices = np.arange(20_000)
        views = pipeline.drawn_views(indices, indices // 5000, seed=1, num_views=num_views)
        counts = np.bincount(views, minlength=num_views)
        expected = len(indices) / num_views
        # A fair draw is further off with a chance below 1e-5.
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    first, second = (
        pipeline.drawn_views(indices, np.full_like(indices, epoch), seed=1, num_views=2)
        for epoch in (0, 1)
    )
    assert abs((first == second).mean() - 0.5) < 5 * 0.5 / np.sqrt(len(indices))


def test_the_second_view_is_the_mirror_image():
    source = digits.Digits("held_out")
    mirrored = pipeline.Mirrored(source)
    image = source[3]["image"]
    np.testing.assert_array_equal(mirrored.view(3, 0)["image"], image)
    np.testing.assert_array_equal(mirrored.view(3, 1)["image"], image[:, ::-1])
    views = np.asarray([0, 1])
    batch = pipeline.load(mirrored, np.asarray([3, 3]), views=views)
    np.testing.assert_array_equal(batch["image"], [image, image[:, ::-1]])


@pytest.mark.parametrize("num_threads", [None, 1, 4, 70])
def test_threads_change_no_batch(num_threads):
    def batches(num_threads):
        source, options = Numbered(50), dict(global_batch_size=40, seed=2, num_threads=num_threads)
        return take(pipeline.train_iterator(source, **options), 4)

    np.testing.assert_array_equal(batches(num_threads), batches(0))


class Counting(Numbered):
    """Counts what is read of it, and how many threads read at a time."""

    def __init__(self, length):
        super().__init__(length)
        self.lock, self.count, self.reading, self.most = threading.Lock(), 0, 0, 0

    def __getitem__(self, index):
        with self.lock:
            self.count, self.reading = self.count + 1, self.reading + 1
            self.most = max(self.most, self.reading)
        time.sleep(0.001)
        with self.lock:
            self.reading -= 1
        return super().__getitem__(index)


def has_read(source, count):
    """Whether so many items are read, sooner or later, and no more."""
    end = time.monotonic() + 30
    while source.count < count and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.1)
    return source.count == count


@pytest.mark.parametrize(
    ("prefetch_bytes", "ahead"), [(0, 1), (8 * 16 * 3, 3), (8 * 16 * 4 - 1, 3)]
)
def test_as_many_batches_are_loaded_ahead_as_bytes_allow(prefetch_bytes, ahead):
    source = Counting(64)  # 16 bytes an image
    iterator = pipeline.train_iterator(
        source, global_batch_size=8, seed=0, num_threads=4, prefetch_bytes=prefetch_bytes
    )
    for taken in (1, 2):
        next(iterator)
        assert has_read(source, 8 * (taken + ahead))
    assert 1 < source.most <= 4


def test_small_batches_are_bounded_in_number():
    source = Counting(8)
    iterator = pipeline.train_iterator(source, global_batch_size=1, seed=0, num_threads=2)
    next(iterator)
    assert has_read(source, 1 + pipeline.PREFETCH_BATCHES)


def test_without_threads_nothing_is_loaded_ahead():
    source = Counting(64)
    iterator = pipeline.train_iterator(source, global_batch_size=8, seed=0, num_threads=0)
    next(iterator)
    assert has_read(source, 8) and source.most == 1


def test_one_batch_ahead_is_placed_and_not_counted():
    def start():
        iterator = pipeline.train_iterator(Numbered(10), global_batch_size=4, seed=3)
        return pipeline.Ahead(iterator, lambda batch: placed.append(batch) or batch), iterator

    placed = []
    ahead, _ = start()
    assert ahead.get_state() == {"next_index": 0} and not placed
    first = take(ahead, 3)
    while len(placed) < 4:
        time.sleep(0.01)
    assert ahead.get_state() == {"next_index": 3}
    rest = take(ahead, 3)
    np.testing.assert_array_equal(first + rest, take(start()[1], 6))
    for other in (start()[0], ahead):  # a fresh one, and one that has a batch ready
        other.set_state({"next_index": 3})
        np.testing.assert_array_equal(take(other, 3), rest)
        assert other.get_state() == {"next_index": 6}


def test_an_error_ahead_comes_with_its_own_batch():
    order = take(pipeline.train_iterator(Numbered(8), global_batch_size=4, seed=1), 2)
    source = Numbered(8, broken={order[1][2]})
    ahead = pipeline.Ahead(
        pipeline.train_iterator(source, global_batch_size=4, seed=1), lambda batch: batch
    )
    next(ahead)
    with pytest.raises(ValueError, match=f"Item {order[1][2]} of Numbered cannot be read"):
        next(ahead)
    assert ahead.get_state() == {"next_index": 1}


@pytest.mark.parametrize("num_threads", [0, 2])
def test_restored_state_continues(num_threads):
    def start():
        return pipeline.train_iterator(
            Numbered(10), global_batch_size=4, seed=3, num_threads=num_threads
        )

    iterator = start()
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    resumed = start()
    resumed.set_state(state)
    np.testing.assert_array_equal(take(resumed, 4), take(iterator, 4))


def test_full_batches_count_each_image_once():
    batches = list(pipeline.full_batches(Numbered(10), 4))
    assert [batch["image"].shape[0] for batch in batches] == [4, 4, 4]
    valid = np.concatenate([batch["valid"] for batch in batches])
    seen = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    np.testing.assert_array_equal(seen[valid], np.arange(10))
    assert np.isfinite(seen).all()


def test_one_pass_loads_only_the_rows_of_a_process():
    rows = np.array([0, 3])
    read = [x for x in range(10) if x % 4 in rows] + [9]  # the last fills its batch up
    source = Numbered(10, broken=set(range(10)) - set(read))
    parts, whole = (
        [{name: batch[name][part] for name in ("image", "label", "valid")} for batch in batches]
        for part, batches in (
            (slice(None), pipeline.full_batches(source, 4, rows=rows)),
            (rows, pipeline.full_batches(Numbered(10), 4)),
        )
    )
    for ours, wanted in zip(parts, whole, strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, wanted)


def test_bad_batch_sizes_say_what_to_do():
    with pytest.raises(ValueError, match="does not fit a dataset of 9 images"):
        pipeline.train_iterator(Numbered(9), global_batch_size=10, seed=0)


def test_corrupt_items_are_named():
    iterator = pipeline.train_iterator(Numbered(4, broken={2}), global_batch_size=4, seed=0)
    with pytest.raises(ValueError, match=r"Item 2 of Numbered cannot be read \(truncated file\)"):
        next(iterator)
    source = Numbered(4)
    source.image_shape = (2, 2, 3)
    with pytest.raises(ValueError, match=r"Item 0 of Numbered has image shape \(2, 2, 1\)"):
        next(pipeline.full_batches(source, 2))
    source = Numbered(4)
    source.image_dtype = np.dtype(np.uint8)
    with pytest.raises(ValueError, match="image type float32, expected uint8"):
        next(pipeline.full_batches(source, 2))
