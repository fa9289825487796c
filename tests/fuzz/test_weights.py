"""Weight files with bytes changed, cut, added: read, or refused in one line, and never run."""

import json
import random

import numpy as np
import pytest
import safetensors.numpy

from arcond_jax.convert import files, table

STATE = {"a.weight": np.ones((6, 10), np.float32), "b": np.float32([1.5]), "c": np.arange(4)}
NAMES = ("w.pth", "w", "w.safetensors", "W.CKPT")
LONGEST = 800  # characters that a message may have


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """Up to 20 changes, most of them in the first bytes, where headers are."""
    content = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(min(len(content), rng.choice((400, len(content)))) or 1)
        match rng.randrange(8):
            case 0 | 1 | 2:
                content[at : at + 1] = rng.randbytes(1)
            case 3:
                del content[max(at, 1) :]
            case 4:
                content[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 5:
                del content[at : at + rng.randrange(1, 9)]
            case 6:
                content[at : at + 8] = rng.choice((b"\xff" * 8, bytes(8), (2**31).to_bytes(8)))
            case 7:
                content[at : at + 4] = content[:4]
        content = content or bytearray(b"\0")
    return bytes(content)


def read_or_refused(path):
    """Any other error is that of the test."""
    try:
        files.load_state(path, containers=("model",))
    except table.ConvertError as error:
        return "\n" not in str(error) and len(str(error)) < LONGEST
    return True


@pytest.mark.parametrize("count", [150, pytest.param(30_000, marks=pytest.mark.slow)])
def test_safetensors_and_indices(count, tmp_path):
    rng = random.Random(0)
    whole = safetensors.numpy.save(STATE)
    (tmp_path / "shard").write_bytes(whole)
    places = json.dumps({"weight_map": dict.fromkeys(STATE, "shard")}).encode()
    for _ in range(count):
        path = tmp_path / rng.choice(NAMES)
        path.write_bytes(mutated(whole, rng))
        assert read_or_refused(path)
        path.unlink()
        path = tmp_path / "model.index.json"
        path.write_bytes(mutated(places, rng))
        assert read_or_refused(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("count", [60, pytest.param(20_000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # torch warns of some before it fails
def test_pytorch_files(count, legacy, tmp_path):
    torch = pytest.importorskip("torch")
    rng, path = random.Random(0), tmp_path / "whole"
    tensors = {name: torch.from_numpy(array) for name, array in STATE.items()}
    torch.save({"model": tensors}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for _ in range(count):
        path = tmp_path / rng.choice(NAMES)
        path.write_bytes(mutated(whole, rng))
        assert read_or_refused(path)
        path.unlink()
