"""Checkpoint files: read without running them, and one clear line where that cannot be.

PyTorch's own formats are tested where torch is installed: `pip install -e '.[convert]'`.
"""

import argparse
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from arcond_jax.convert import files, table

STATE = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([1.5])}


def same(state):
    assert state.keys() == STATE.keys()
    for name, array in STATE.items():
        np.testing.assert_array_equal(state[name], array)


def refused(message, *args, **options):
    with pytest.raises(table.ConvertError, match=message) as raised:
        files.load_state(*args, **options)
    assert "\n" not in str(raised.value)


def test_safetensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    files.save_state(path, STATE)
    same(files.load_state(path))
    same(files.load_state(path, containers=("model",), others=("model_ema",)))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_files_that_are_not_there_or_cut_short(tmp_path):
    refused("weights.pth does not exist", tmp_path / "weights.pth")
    path = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-5])
    refused("weights.safetensors is damaged", path)


def test_the_ending_says_the_format(tmp_path):
    with pytest.raises(table.ConvertError, match=r"must be \.safetensors, \.pth or \.pt"):
        files.save_state(tmp_path / "weights.bin", STATE)


def test_digest(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert files.digest(path).startswith("ba7816bf8f01cfea414140de5dae2223")


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_pytorch_formats(torch, tmp_path):
    path = tmp_path / "weights.pth"
    files.save_state(path, STATE)
    same(files.load_state(path))
    tensors = {name: torch.from_numpy(x) for name, x in STATE.items()}
    other = {"a.weight": tensors["b"]}
    for legacy in (False, True):
        saved = {"model": other, "model_ema": tensors, "args": argparse.Namespace(lr=1e-4)}
        saved |= {"optimizer": {"state": {0: {"step": 3}}}, "epoch": 7}
        torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
        same(files.load_state(path, containers=("model_ema",), others=("model",)))
        assert files.load_state(path, containers=("model",)).keys() == {"a.weight"}
    torch.save({"model": tensors}, path)
    refused(
        "has model but no model_ema: ask for the weights that are there",
        path,
        containers=("model_ema",),
        others=("model",),
    )
    torch.save([1, 2], path)
    refused("holds no state dict, under model or bare", path, containers=("model",))
    torch.save({"epoch": 3}, path)
    refused("epoch is not a tensor, so this is no state dict", path)


def test_half_precision_tensors(torch, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.tensor([0.5], dtype=torch.bfloat16)}, path)
    np.testing.assert_array_equal(files.load_state(path)["a"], np.float32([0.5]))


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_code_in_a_pickle_never_runs(torch, tmp_path):
    path, trace = tmp_path / "weights.pth", tmp_path / "ran"
    torch.save({"model": {"a": torch.ones(2)}, "extra": Malicious(trace)}, path)
    refused("holds more than weights and might run code", path, containers=("model",))
    assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # it would have


def test_pytorch_files_cut_short(torch, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-700])
    refused("weights.pth is damaged", path)
    path.write_bytes(b"not a checkpoint")
    refused("weights.pth is damaged", path)
