"""CPU milliseconds an image: decoding, both ways of resizing, a source, and batches of it.

Copies JPEG files of a folder (at any depth) into an image folder of its own, scaled if asked, and
reads them from there. Times are those of all threads of the process, the least of several passes;
only ratios within one run compare. Beside them the seconds on the clock, which other programs on
the machine change.

  python benchmarks/data.py ~/photographs --num_images 100 --image_size 256
"""

import argparse
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable

import numpy as np
from PIL import Image

from arcond_jax.data import folder, images, pipeline

THREADS = (0, 1, 2, 4)


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


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--num_images", type=int, default=100)
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--shorter_side", type=int, help="scale the photographs to it first")
    parser.add_argument("--batch_size", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    found = sorted(x for x in args.folder.expanduser().rglob("*") if x.suffix in (".jpg", ".jpeg"))
    num_batches = min(args.num_images, len(found)) // args.batch_size
    found = found[: num_batches * args.batch_size]
    with tempfile.TemporaryDirectory() as out:
        make_folder(found, pathlib.Path(out), args.shorter_side)
        source = Counted(out, image_size=args.image_size)
        source.read = []
        named = passes(source, num_batches, args.batch_size)
        cpu, clock = dict.fromkeys(named, np.inf), dict.fromkeys(named, np.inf)
        for _ in range(args.repeats):
            for name, run in named.items():
                start = time.process_time(), time.perf_counter()
                run()
                cpu[name] = min(cpu[name], time.process_time() - start[0])
                clock[name] = min(clock[name], time.perf_counter() - start[1])
    print(f"{len(found)} images, {os.cpu_count()} cores, Pillow {Image.__version__}")
    print(f"{'':26} CPU ms  share of decode  clock ms")
    for name in named:
        each = 1e3 / len(found)
        share = cpu["PIL decode"] / cpu[name]
        print(f"{name:26} {cpu[name] * each:6.3f}  {share:15.3f}  {clock[name] * each:8.3f}")


if __name__ == "__main__":
    main()
