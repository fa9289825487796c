"""Official checkpoint files to plain state dicts, without running anything that is in them.

safetensors files hold tensors and nothing else. PyTorch's own format is a pickle, which can hold
any program: it is read with `weights_only`, which knows tensors, containers and numbers, and
refuses the rest. This module is the only door to torch and safetensors.
"""

import argparse
import hashlib
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from arcond_jax.convert import table

BLOCK_BYTES = 1 << 20  # read at a time while hashing


def load_state(
    path: pathlib.Path,
    *,
    containers: Sequence[str] = (),
    others: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """The state dict of a `.safetensors` file, or of any of PyTorch's (.pth .pt .ckpt .bin).

    Args:
      containers: Entries under which the state dict may lie; the file may also be the state dict
        itself.
      others: Entries that hold other weights of the same model: then `containers` must be there.

    Raises:
      table.ConvertError: No such file, damaged, with code in it, or without a state dict.
    """
    if not path.is_file():
        raise table.ConvertError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return _safetensors(path)
    return _state_dict(_unpickled(path), path, containers, others)


def save_state(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict for PyTorch: `.safetensors`, or `.pth` where torch is installed.

    Raises:
      table.ConvertError: The ending is neither.
    """
    partial = path.with_name(path.name + ".partial")
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(dict(state), partial)
    elif path.suffix in (".pth", ".pt"):
        torch = _torch(path)
        torch.save({name: torch.from_numpy(x.copy()) for name, x in state.items()}, partial)
    else:
        raise table.ConvertError(f"{path}: the ending must be .safetensors, .pth or .pt")
    partial.replace(path)


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def _safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise table.ConvertError(f"{path} is damaged ({_first_line(error)})") from None


def _torch(path: pathlib.Path) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]  # an extra: only these files need it
    except ImportError:
        raise table.ConvertError(
            f"{path} is PyTorch's format and torch is not installed: pip install "
            "'arcond_jax[convert]', or give a .safetensors file"
        ) from None
    return torch


def _unpickled(path: pathlib.Path) -> Any:
    torch = _torch(path)
    # Training scripts store their command line too; a namespace is data, like a dict.
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
        except Exception as error:  # torch raises many types for bad files
            if "Unsupported global" in str(error):  # the name of something that could be called
                raise table.ConvertError(
                    f"{path} holds more than weights and might run code when it is loaded: "
                    "refused; take a file with tensors only, or .safetensors"
                ) from None
            raise table.ConvertError(
                f"{path} is damaged, or no checkpoint of weights ({type(error).__name__})"
            ) from None


def _state_dict(
    loaded: Any, path: pathlib.Path, containers: Sequence[str], others: Sequence[str]
) -> dict[str, np.ndarray]:
    state, held = loaded, loaded if isinstance(loaded, Mapping) else {}
    for name in containers:
        if name in held:
            state = held[name]
            break
    else:
        there = sorted(set(others) & set(held))
        if there:
            raise table.ConvertError(
                f"{path} has {', '.join(there)} but no {' or '.join(containers)}: ask for the "
                "weights that are there"
            )
    if not isinstance(state, Mapping) or not state:
        raise table.ConvertError(
            f"{path} holds no state dict, under {' or '.join(containers)} or bare"
        )
    tensors = {}
    for name, tensor in state.items():
        if not hasattr(tensor, "detach"):
            raise table.ConvertError(f"{path}: {name} is not a tensor, so this is no state dict")
        tensor = tensor.detach()
        tensors[name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return tensors


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
