"""A cache of tokens: what a tokenizer made of every view of every image, in records of one size.

A folder that `arcond encode` wrote holds a manifest and shards, as prepared images do
(`data.records`). A record is the label (int32) and then each array, all its views one after
another, with the low byte first; the manifest has shapes and types. Of a pair of trained tokenizers
the Gaussian of the latents behind each code lies beside them.
"""

import hashlib
import io
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from arcond_jax import atomic, types
from arcond_jax.data import pipeline, records

LAW = "code_law.npz"
KIND = "tokens"  # of the manifest
_LABEL = np.dtype("<i4")


def pack(label: int, arrays: Mapping[str, Shaped[np.ndarray, "views ..."]]) -> bytes:
    """The record of an image."""
    parts = [np.asarray(label, _LABEL), *arrays.values()]
    return b"".join(x.astype(x.dtype.newbyteorder("<"), copy=False).tobytes() for x in parts)


class Stored:
    """Random access to the views of the images of a cache, as `pipeline.Viewed`.

    Args:
      directory: What `arcond encode` wrote.
      split: "train".

    Attributes:
      manifest: What the folder says of itself.

    Raises:
      ValueError: The folder is unfinished, a file of it is missing or cut off, or it has no such
        split; and for an item, a damaged file, named.
    """

    def __init__(self, directory: str | os.PathLike, split: str = "train"):
        root = pathlib.Path(directory)
        self.manifest = records.complete_manifest(root, kind=KIND)
        self.label, self._shards = records.open_split(root, self.manifest, split)
        self.label_names = tuple(self.manifest["class_names"])
        self.num_views = len(self.manifest["views"]["names"])
        self.arrays: pipeline.Arrays = {
            name: (tuple(x["shape"]), np.dtype(x["dtype"]).newbyteorder("<"))
            for name, x in self.manifest["arrays"].items()
        }

    def __len__(self) -> int:
        return len(self._shards)

    def view(self, index: int, view: int) -> dict[str, np.ndarray]:
        """One view of an image, by the names of `types.Stored`, and its label."""
        record, offset = self._shards[index], _LABEL.itemsize
        item: dict[str, np.ndarray] = {"label": np.frombuffer(record, _LABEL, 1).reshape(())}
        for name, (shape, dtype) in self.arrays.items():
            size = math.prod(shape)
            start = offset + view * size * dtype.itemsize
            item[name] = np.frombuffer(record, dtype, size, start).reshape(shape)
            offset += self.num_views * size * dtype.itemsize
        return item


def write_law(directory: pathlib.Path, law: types.CodeLaw) -> str:
    """Writes the Gaussians behind the codes; returns the SHA-256 of their file."""
    content = io.BytesIO()
    np.savez(content, mean=law.mean, cholesky=law.cholesky)
    with atomic.file(directory / LAW) as opened:
        opened.write(content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


def read_law(directory: pathlib.Path, manifest: Mapping[str, Any]) -> types.CodeLaw:
    """The Gaussians behind the codes, in the units in which latents are stored.

    Raises:
      ValueError: They are missing or damaged.
    """
    path = directory / LAW
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != manifest.get("code_law_sha256"):
        state = "is damaged" if content else "is missing"
        raise ValueError(f"{path} {state}: {records.again(KIND)}")
    with np.load(io.BytesIO(content)) as held:
        return types.CodeLaw(jnp.asarray(held["mean"]), jnp.asarray(held["cholesky"]))
