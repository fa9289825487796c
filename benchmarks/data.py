"""CPU milliseconds an image: decoding, both ways of resizing, a source, and batches of it.

Copies JPEG files of a folder (at any depth) into an image folder of its own, scaled if asked, and
reads them from there. Times are those of all threads of the process, the least of several passes;
only ratios within one run compare. Beside them the seconds on the clock, which other programs on
the machine change. With --cache, records of tokens in the place of images; with --steps, updates of
models at full size, with the tokenizer in the step and from a cache (6 GB of memory, 15 minutes);
with --start, the first batch of a source as long as ImageNet, and what is loaded ahead.

  python benchmarks/data.py ~/photographs --num_images 100 --image_size 256
  python benchmarks/data.py --cache --num_images 20000 --batch_size 200
  python benchmarks/data.py --start --batch_size 2048
  python benchmarks/data.py --steps --batch_size 2 --repeats 3
"""

import argparse
import os
import pathlib
import shutil
import tempfile
import time
import tracemalloc
from collections.abc import Callable

import jax
import numpy as np
from PIL import Image

from arcond_jax import build, types
from arcond_jax.data import folder, images, pipeline, records, stored
from arcond_jax.run import sharded

THREADS = (0, 1, 2, 4)
# One view's shape and type, and how many views there are: ImageNet at 256 pixels.
CACHES = {
    "moments, float16, flip": ("moments", (16, 16, 32), "float16", 2),
    "codes, uint16, ten": ("codes", (256,), "uint16", 10),
}
MODELS = ("llamagen_b_256", "mar_base_imagenet256")


def make_folder(found: list[pathlib.Path], out: pathlib.Path, shorter_side: int | None) -> None:
    """The files as `out/train/class/*.jpg`, as they are or with so many pixels on a side."""
    target = out / "train" / "class"
    target.mkdir(parents=True)
    for number, path in enumerate(found):
        copy = target / f"{number:06d}.jpg"
        if shorter_side is None:
            shutil.copy(path, copy)
        else:
            image = images.open_image(path, num_channels=3)
            scale = shorter_side / min(image.size)
            image.resize([round(x * scale) for x in image.size]).save(copy, quality=90)


class Counted(folder.ImageFolder):
    """Knows which items were read."""

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        item = super().__getitem__(index)
        self.read.append(index)
        return item


def passes(source: Counted, num_batches: int, batch_size: int) -> dict[str, Callable]:
    """What is timed: each reads every image once."""
    paths = [source.folder / "class" / name for name in source.files]
    size = source.image_shape[0]

    def raw() -> None:
        for path in paths:
            with Image.open(path) as image:
                np.asarray(image.convert("RGB"))

    def square(resize: str) -> None:
        for path in paths:
            images.open_square(path, size, num_channels=3, resize=resize)

    def items() -> None:
        for index in range(len(source)):
            source[index]

    def batches(num_threads: int) -> None:
        iterator = pipeline.train_iterator(
            source,
            global_batch_size=batch_size,
            seed=0,
            num_threads=num_threads,
            prefetch_bytes=0,  # one batch ahead, so the last one need not be asked for
        )
        source.read.clear()
        for _ in range(num_batches - (num_threads > 0)):
            next(iterator)
        while len(source.read) < len(source):
            time.sleep(1e-3)

    named = {"PIL decode": raw, "adm": lambda: square("adm"), "fast": lambda: square("fast")}
    named["source[i]"] = items
    for num_threads in THREADS:
        named[f"train_iterator, {num_threads} threads"] = lambda n=num_threads: batches(n)
    return named


def write_cache(
    out: pathlib.Path, name: str, shape: tuple[int, ...], dtype: str, num_views: int, count: int
) -> None:
    """A cache of random numbers, complete but for what the trainer compares."""
    shards, rng = sharded.cut("train", [0], count), np.random.default_rng(0)
    plan = {"kind": stored.KIND, "class_names": ["0"], "views": {"names": ["view"] * num_views}}
    plan = sharded.begin(out, plan | {"arrays": {name: {"shape": shape, "dtype": dtype}}}, shards)
    array = (100 * rng.standard_normal((num_views, *shape))).astype(dtype)
    rows = (stored.pack(0, {name: array}) for _ in range(count))
    records.write_shard(out / shards[0].file, rows)
    sharded.keep(out, shards[0], [0] * count)
    sharded.finish(out, plan, shards, sharded.all_known(out, shards) or [])


def cache_passes(
    source: stored.Stored, num_batches: int, batch_size: int
) -> dict[str, Callable[[], None]]:
    """What is timed of a cache: each reads every image once."""
    order = np.random.default_rng(0).permutation(len(source)).tolist()

    def views() -> None:
        for index in order:
            source.view(index, index % source.num_views)

    def batches() -> None:
        iterator = pipeline.train_iterator(
            source, global_batch_size=batch_size, seed=0, num_threads=0
        )
        for _ in range(num_batches):
            next(iterator)

    return {"record and view": views, "train_iterator, 0 threads": batches}


def time_steps(batch_size: int, repeats: int) -> None:
    """Prints seconds of an update with the tokenizer in it and from a cache, and their ratio."""
    print(f"{'':26} images s  cache s  ratio, a batch of {batch_size}")
    for name in MODELS:
        given = ["training.dtype=float32", f"data.batch_size={batch_size}", "data.name=folder"]
        config = build.load_config(name, given)
        mesh, rng = build.mesh(config), np.random.default_rng(0)
        tokenizer = jax.tree.map(
            lambda x: (0.02 * rng.standard_normal(x.shape)).astype(x.dtype),  # noqa: B023
            build.abstract_tokenizer(config),
        )
        shape, label = (batch_size, *build.image_shape(config)), np.zeros(batch_size, np.int32)
        image = rng.integers(0, 256, shape, np.uint8)
        kept = jax.jit(lambda tokenizer, x: tokenizer.store(images.as_float(x)))(tokenizer, image)
        batches = {
            "images": types.Batch(image, label),
            "cache": types.Batch(None, label, jax.device_get(kept)),
        }
        step_fn, state = build.train_step(config, mesh, tokenizer), build.train_state(config, mesh)
        least = dict.fromkeys(batches, np.inf)
        for repeat in range(repeats + 1):  # the first one compiles
            for kind, batch in batches.items():
                start = time.perf_counter()
                state, metrics = step_fn(state, tokenizer, batch)
                jax.block_until_ready(metrics)
                if repeat:
                    least[kind] = min(least[kind], time.perf_counter() - start)
        ratio = least["images"] / least["cache"]
        print(f"{name:26} {least['images']:8.2f}  {least['cache']:7.2f}  {ratio:5.2f}", flush=True)


def time_caches(num_images: int, batch_size: int, repeats: int) -> None:
    """Prints CPU milliseconds an image of reading caches, in any order."""
    print(f"{'':50} CPU ms  clock ms")
    for title, (name, shape, dtype, num_views) in CACHES.items():
        with tempfile.TemporaryDirectory() as out:
            write_cache(pathlib.Path(out), name, shape, dtype, num_views, num_images)
            source = stored.Stored(out)
            named = cache_passes(source, num_images // batch_size, batch_size)
            for what, (cpu, clock) in least_of(repeats, named).items():
                each = 1e3 / num_images
                print(f"{f'{title}: {what}':50} {cpu * each:6.4f}  {clock * each:8.4f}")


class Blank:
    """As many images as ImageNet has, all zeros, that cost nothing to read."""

    num_views, label_names = 1, ("0",)

    def __init__(self, image_size: int):
        image = np.zeros((image_size, image_size, 3), np.uint8)
        self.arrays = {"image": (image.shape, image.dtype)}
        self._item, self.last_read = {"image": image, "label": np.int32(0)}, 0.0

    def __len__(self) -> int:
        return 1_281_167

    def view(self, index: int, view: int) -> dict[str, np.ndarray]:
        self.last_read = time.monotonic()
        return self._item


def time_start(batch_size: int, image_size: int, repeats: int) -> None:
    """Prints seconds until the first batch, fresh and resumed, and bytes that wait for their turn.

    Images of one pixel leave the work of the order.
    """
    given = dict(global_batch_size=batch_size, seed=0)

    def first(next_index: int) -> None:
        iterator = pipeline.train_iterator(Blank(1), num_threads=0, **given)
        iterator.set_state({"next_index": next_index})
        next(iterator)

    named = {"first batch": lambda: first(0), "batch 900,000": lambda: first(900_000)}
    for name, (cpu, clock) in least_of(repeats, named).items():
        print(f"{name:26} {cpu:6.4f} s of CPU  {clock:6.4f} s")
    source = Blank(image_size)
    tracemalloc.start()
    iterator = pipeline.train_iterator(source, **given)
    held = next(iterator)
    while time.monotonic() < source.last_read + 3:  # until nothing is read ahead any more
        time.sleep(0.1)
    mine = sum(x.nbytes for x in held.values())
    waiting = tracemalloc.get_traced_memory()[0] - mine
    print(f"a batch of {batch_size}: {mine / 1e9:.3f} GB, and {waiting / 1e9:.3f} GB wait")


def least_of(repeats: int, named: dict[str, Callable]) -> dict[str, tuple[float, float]]:
    """Least CPU seconds, and seconds on the clock, of each pass."""
    least = dict.fromkeys(named, (np.inf, np.inf))
    for _ in range(repeats):
        for name, run in named.items():
            start = time.process_time(), time.perf_counter()
            run()
            taken = time.process_time() - start[0], time.perf_counter() - start[1]
            least[name] = tuple(map(min, least[name], taken))
    return least


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, nargs="?")
    parser.add_argument("--cache", action="store_true", help="time caches of tokens")
    parser.add_argument("--steps", action="store_true", help="time updates of models")
    parser.add_argument("--start", action="store_true", help="time the first batch of ImageNet")
    parser.add_argument("--num_images", type=int, default=100)
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--shorter_side", type=int, help="scale the photographs to it first")
    parser.add_argument("--batch_size", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.steps:
        time_steps(args.batch_size, args.repeats)
        return
    if args.start:
        time_start(args.batch_size, args.image_size, args.repeats)
        return
    if args.cache:
        time_caches(args.num_images, args.batch_size, args.repeats)
        return
    if args.folder is None:
        parser.error("give a folder of photographs, --cache, --steps or --start")
    found = sorted(x for x in args.folder.expanduser().rglob("*") if x.suffix in (".jpg", ".jpeg"))
    num_batches = min(args.num_images, len(found)) // args.batch_size
    found = found[: num_batches * args.batch_size]
    with tempfile.TemporaryDirectory() as out:
        make_folder(found, pathlib.Path(out), args.shorter_side)
        source = Counted(out, image_size=args.image_size)
        source.read = []
        least = least_of(args.repeats, passes(source, num_batches, args.batch_size))
    print(f"{len(found)} images, {os.cpu_count()} cores, Pillow {Image.__version__}")
    print(f"{'':26} CPU ms  share of decode  clock ms")
    for name, (cpu, clock) in least.items():
        each = 1e3 / len(found)
        share = least["PIL decode"][0] / cpu
        print(f"{name:26} {cpu * each:6.3f}  {share:15.3f}  {clock * each:8.3f}")


if __name__ == "__main__":
    main()
