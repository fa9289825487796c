"""Where official weights lie: one file, a folder with one, or shards beside their index.

An index is the JSON file of Hugging Face's libraries, `model.safetensors.index.json` or
`pytorch_model.bin.index.json`, whose `weight_map` says in which file beside it each tensor lies.
"""

import json
import pathlib
import re
from collections.abc import Mapping

from arcond_jax.convert import contents, table

ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
MAX_INDEX_BYTES = 1 << 26
MAX_SHARD_NAME = 255  # what file systems allow
SHARD = re.compile(r"-(\d+)-of-(\d+)$", re.IGNORECASE)  # ends the name of a shard
# What lies in the folders of our own runs, of converted weights and of Orbax.
OF_OURS = ("checkpoints", "weights")
OF_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")


def find(source: pathlib.Path) -> pathlib.Path:
    """The file of weights, or the index of its shards, that a path stands for.

    Args:
      source: Either of them, or a folder that holds one of them.

    Raises:
      table.ConvertError: It does not exist, or is a folder with none or several.
    """
    if not source.exists():
        raise table.ConvertError(f"{source} does not exist")
    found = _only(source) if source.is_dir() else source
    if not found.is_file():
        raise table.ConvertError(f"{found} is neither a file nor a folder")
    shard = SHARD.search(found.stem)
    if shard is not None and shard[2].lstrip("0") not in ("", "1"):
        raise table.ConvertError(
            f"{found} is one of {shard[2].lstrip('0')} shards: give the index file, or a folder "
            "with all of them and their index"
        )
    return found


def files_of(found: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """The files that hold the tensors of what `find` gave, shards in the order of their names.

    Raises:
      table.ConvertError: An index that is damaged, or whose shards are not all beside it.
    """
    if not is_index(found):
        return (found,)
    files = tuple(found.parent / name for name in sorted(set(weight_map(found).values())))
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise table.ConvertError(
            f"{found} names {len(files)} shards, and {', '.join(missing[:3])}"
            f"{' and more' if len(missing) > 3 else ''} does not lie beside it"
        )
    return files


def is_index(path: pathlib.Path) -> bool:
    """Whether a file is an index by its name."""
    return path.suffix.lower() == ".json"


def weight_map(index: pathlib.Path) -> Mapping[str, str]:
    """Of each tensor, the name of the file beside the index that holds it.

    Raises:
      table.ConvertError: The file is no index, or a name leads out of its folder.
    """
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise table.ConvertError(f"{index} is too large for an index of shards")
    try:
        listed = json.loads(index.read_bytes())
    except (ValueError, RecursionError):
        raise table.ConvertError(f"{index} is damaged: no JSON") from None
    files = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(files, dict) or not files:
        raise table.ConvertError(
            f"{index} is a JSON file without weight_map, so no index of shards"
        )
    for name in files.values():
        if not isinstance(name, str) or not _is_plain(name):
            raise table.ConvertError(
                f"{index} names the shard {str(name)[:80]!r}, which is no plain name of a file "
                "beside it: refused"
            )
    return files


def _only(folder: pathlib.Path) -> pathlib.Path:
    """The one file of weights or index in a folder."""
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in entries if path.is_file()]
    indices = [path for path in files if path.name.lower().endswith(".index.json")]
    named = {name for index in indices for name in weight_map(index).values()}
    found = indices + [path for path in files if path.name not in named and _may_be_weights(path)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found[:4]) + (", ..." if len(found) > 4 else "")
        raise table.ConvertError(
            f"{folder} holds {len(found)} files of weights ({names}): give the one to convert, or, "
            "of shards, their index file"
        )
    names = {path.name for path in entries}
    if names & set(OF_ORBAX):
        raise table.ConvertError(f"{folder} is a checkpoint of Orbax, not PyTorch's weights")
    if names & set(OF_OURS):
        raise table.ConvertError(f"{folder} holds a run or converted weights: nothing to convert")
    listed = ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")
    raise table.ConvertError(f"{folder} holds no file of weights ({listed or 'it is empty'})")


def _may_be_weights(path: pathlib.Path) -> bool:
    """By its ending, so that a refusal says what it is instead, or by its content."""
    return path.suffix.lower() in ENDINGS or contents.is_weights(path)


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file, and no path, on any system."""
    lone = pathlib.PureWindowsPath(name).name == name and name not in ("", ".", "..")
    return lone and name.isprintable() and len(name) <= MAX_SHARD_NAME
