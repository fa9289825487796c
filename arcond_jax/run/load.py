"""Draws images with jax and numpy alone, from the folder that `arcond export --stablehlo` wrote.

    python load.py --label 3 --num_images 16 --out images.npy

or `draw = load.sampler("folder")` and `draw(labels, seed=0)`. Reading the program takes the package
flatbuffers as well.
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

PROGRAM, WEIGHTS, MANIFEST = "sampler.stablehlo", "weights.safetensors", "manifest.json"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "BOOL": np.bool_}
DTYPES |= {f"I{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)}
DTYPES |= {f"U{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)}


def sampler(folder: str | pathlib.Path) -> Callable[..., np.ndarray]:
    """The sampler of a folder: `draw(prompt, seed=0, first_row=0)` gives uint8 images.

    Images are [b, height, width, channels]. `prompt` holds labels [b], or for captions a dict of
    `embedding` float32 [b, prefix, width] and `valid` bool [b, prefix], False at the padding in
    front. Image i depends on the seed, its number `first_row` + i and its prompt alone, unless the
    manifest has a "batch_size": then on its batch, which must be of that size.

    `draw` raises ValueError for a label that is not a class, no rows, a batch of another size, or
    a seed of more than 32 bits.
    """
    folder = pathlib.Path(folder)
    manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
    exported = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    call = jax.jit(exported.call)  # compiles once for each number of images
    held = jax.device_put(weights(folder / WEIGHTS))

    def draw(prompt: Any, seed: int = 0, first_row: int = 0) -> np.ndarray:
        if not isinstance(prompt, dict):
            prompt = np.asarray(prompt, np.int32)
            if ((prompt < 0) | (prompt >= manifest["num_classes"])).any():
                raise ValueError(f"a label is not from 0 to {manifest['num_classes'] - 1}")
        size = len(prompt["valid"] if isinstance(prompt, dict) else prompt)
        if size == 0:
            raise ValueError("nothing to draw: the prompt has no rows")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed {seed} is not from 0 to {2**32 - 1}")
        if size != (manifest["batch_size"] or size):
            raise ValueError(f"it draws {manifest['batch_size']} images at a time, not {size}")
        return np.asarray(call(held, prompt, np.uint32(seed), np.int32(first_row)))

    return draw


def weights(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name: a header of JSON, and behind it their bytes."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    content, arrays = np.memmap(path, np.uint8, "r", offset=8 + size), {}
    for name, entry in header.items():
        if name != "__metadata__":
            part = content[slice(*entry["data_offsets"])]
            arrays[name] = part.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws images, of all classes or of one.")
    parser.add_argument("--label", type=int)
    parser.add_argument("--num_images", type=int, help="default: 16, or a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, help=".npy, uint8 [n, height, width, channels]")
    args = parser.parse_args()
    here = pathlib.Path(__file__).parent
    about = json.loads((here / MANIFEST).read_text("utf-8"))
    num_images = about["batch_size"] or 16 if args.num_images is None else args.num_images
    if num_images < 1:
        parser.error("--num_images must be at least 1")
    if about["num_classes"] is None:
        parser.error("this sampler draws captions: call `sampler` from Python")
    # Classes take turns; a sampler that mixes the rows of a batch needs them class by class.
    labels = np.arange(num_images) % about["num_classes"]
    if about["batch_size"]:
        labels = np.arange(num_images) * about["num_classes"] // num_images
    if args.label is not None:
        labels[:] = args.label
    try:
        np.save(args.out, sampler(here)(labels, args.seed))
    except (OSError, OverflowError, ValueError) as error:
        parser.error(str(error))
