"""Official checkpoint files to plain state dicts, without running anything that is in them.

safetensors files hold tensors and nothing else. PyTorch's own format is a pickle, which can hold
any program: it is read with `weights_only`, which knows tensors, containers and numbers, and
refuses the rest. This module is the only door to torch and safetensors.
"""

import argparse
import contextlib
import hashlib
import pathlib
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from arcond_jax import atomic
from arcond_jax.convert import contents, shards, table

BLOCK_BYTES = 1 << 20  # read at a time while hashing
MAX_NAME = 500  # characters in the name of a tensor
# What PyTorch puts into names: DataParallel, DDP and DeepSpeed; compile; FSDP; checkpointing.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def load_state(
    source: pathlib.Path,
    *,
    containers: Sequence[str] = (),
    others: Sequence[str] = (),
) -> dict[str, np.ndarray]:
    """The state dict of official weights, floats as float32, without the names of `WRAPPERS`.

    Files are told by their content: safetensors, or what `torch.save` writes.

    Args:
      source: A file, the index of shards beside it, or a folder with one of these.
      containers: Entries under which the state dict may lie; the file may also be the state dict
        itself.
      others: Entries that hold other weights of the same model: then `containers` must be there.

    Raises:
      table.ConvertError: Nothing there, damaged, with code in it, or without a state dict.
    """
    found = shards.find(source)
    state: dict[str, np.ndarray] = {}
    for path in shards.files_of(found):
        if contents.weights_format(path) == "safetensors":
            part = _safetensors(path)
        else:
            part = _state_dict(_unpickled(path), path, containers, others)
        twice = sorted(state.keys() & part)
        if twice:
            raise table.ConvertError(f"{path} holds {twice[0]}, which an earlier shard holds too")
        state |= part
    if shards.is_index(found):
        apart = sorted(state.keys() ^ shards.weight_map(found))
        if apart:
            where = "in no shard" if apart[0] not in state else "not in the index"
            raise table.ConvertError(f"{found} and its shards differ: {apart[0]!r} is {where}")
    return _unwrapped(state, found)


def save_state(
    path: pathlib.Path, state: Mapping[str, np.ndarray], *, containers: Sequence[str] = ()
) -> None:
    """Writes a state dict for PyTorch; whole, or not at all.

    Args:
      path: Ends in `.safetensors`, or, where torch is installed, in one of PyTorch's endings.
      containers: Entries of PyTorch's file under each of which the state dict lies; none for the
        state dict itself, as it always is in safetensors.

    Raises:
      table.ConvertError: The ending is another, or the file cannot be written.
    """
    check_target(path)
    with _whole(path) as partial:
        if path.suffix.lower() == ".safetensors":
            safetensors.numpy.save_file(dict(state), partial)
            return
        torch = _torch(path)
        tensors = {name: torch.from_numpy(x.copy()) for name, x in state.items()}
        torch.save(dict.fromkeys(containers, tensors) or tensors, partial)


def check_target(path: pathlib.Path) -> None:
    """Whether `save_state` can write there, to know it before the work.

    Raises:
      table.ConvertError: Another ending, no such folder, or torch is needed and not installed.
    """
    ending = path.suffix.lower()
    if ending not in shards.ENDINGS:
        raise table.ConvertError(f"{path}: the ending must be one of {' '.join(shards.ENDINGS)}")
    if path.is_dir():
        raise table.ConvertError(f"{path} is a folder: give the name of a file")
    if not path.parent.is_dir():
        raise table.ConvertError(f"{path.parent} does not exist: make the folder first")
    if ending != ".safetensors":
        _torch(path)


def digest(paths: Sequence[pathlib.Path]) -> str:
    """SHA-256 of a file, or of several as if they were one, in their order."""
    hasher = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                hasher.update(block)
    return hasher.hexdigest()


@contextlib.contextmanager
def _whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path beside another that takes its place once it is written, and is gone if it is not."""
    try:
        # A folder, since safetensors writes to a temporary file of its own beside it.
        beside = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:100]}."))
        with atomic.unfinished(beside):
            yield beside / path.name
            (beside / path.name).chmod(0o666 & ~atomic.UMASK)
            (beside / path.name).replace(path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise table.ConvertError(f"writing {path} failed ({_first_line(error)})") from error


def _safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        state = safetensors.numpy.load_file(path)
    except AttributeError:  # numpy has no such type
        raise table.ConvertError(
            f"{path} holds numbers of 8 bits or fewer, which mean nothing without their scales: "
            "take the weights in float32, float16 or bfloat16"
        ) from None
    except (safetensors.SafetensorError, OSError, ValueError, OverflowError) as error:
        raise table.ConvertError(f"{path} is damaged ({_first_line(error)})") from None
    for name in state:
        _check_name(name, path)
    return {name: _float32(array) for name, array in state.items()}


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
    # Newer versions of torch go by this ending, whatever is in the file.
    misnamed = path.suffix == ".safetensors"
    mapped = not misnamed and zipfile.is_zipfile(path)
    # Training scripts store their command line too; a namespace is data, like a dict.
    with path.open("rb") as file, torch.serialization.safe_globals([argparse.Namespace]):
        try:
            source = file if misnamed else path
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)
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
    return {name: _array(tensor, name, path) for name, tensor in state.items()}


def _array(tensor: Any, name: Any, path: pathlib.Path) -> np.ndarray:
    """A tensor of PyTorch as an array; floats as float32, since numpy lacks bfloat16."""
    if not hasattr(tensor, "detach"):
        raise table.ConvertError(
            f"{path}: {str(name)[:80]!r} is not a tensor, so this is no state dict"
        )
    _check_name(name, path)
    try:
        size = tensor.element_size()
        if tensor.numel() * size > tensor.untyped_storage().nbytes():
            raise ValueError("it has more numbers than the file")
        if tensor.is_floating_point() and size < 2:
            raise ValueError("numbers of 8 bits mean nothing without their scales")
        return (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
    except (ValueError, TypeError, RuntimeError) as error:
        raise table.ConvertError(
            f"{path}: the tensor {name!r} cannot be read ({_first_line(error)})"
        ) from None


def _check_name(name: Any, path: pathlib.Path) -> None:
    if not isinstance(name, str) or len(name) > MAX_NAME or not name.isprintable():
        raise table.ConvertError(f"{path} is damaged: {str(name)[:80]!r} is no name of a tensor")


def _float32(array: np.ndarray) -> np.ndarray:
    """Floats of any width as float32; what is too large becomes infinite."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def _unwrapped(state: dict[str, np.ndarray], source: pathlib.Path) -> dict[str, np.ndarray]:
    """Names as the model has them, without those of PyTorch's wrappers around it or its parts."""
    names = {
        name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in state
    }
    if len(set(names.values())) < len(names):
        raise table.ConvertError(f"{source} holds weights twice, with and without {WRAPPERS[0]}")
    return {names[name]: array for name, array in state.items()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
