"""Checkpoint files: read without running them, and one clear line where that cannot be.

PyTorch's own formats are tested where torch is installed: `pip install -e '.[convert]'`.
"""

import argparse
import json
import pathlib
import resource
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from arcond_jax.convert import files, table

STATE = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([1.5])}


def same(state):
    assert state.keys() == STATE.keys()
    for name, array in STATE.items():
        assert state[name].dtype == np.float32
        np.testing.assert_array_equal(state[name], array)


def refused(message, *args, **options):
    with pytest.raises(table.ConvertError, match=message) as raised:
        files.load_state(*args, **options)
    assert "\n" not in str(raised.value)


def written(path, state=STATE):
    safetensors.numpy.save_file(state, path)
    return path


def raw_safetensors(path, header, body=b"", length=None):
    """A file with any header, as no library would write it."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", length) + header + body)
    return path


def test_safetensors(tmp_path):
    path = tmp_path / "weights.safetensors"
    files.save_state(path, STATE)
    same(files.load_state(path))
    same(files.load_state(path, containers=("model",), others=("model_ema",)))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_floats_of_other_widths_become_float32(dtype, tmp_path):
    state = {name: array.astype(dtype) for name, array in STATE.items()}
    same(files.load_state(written(tmp_path / "weights.safetensors", state)))


def test_numbers_beyond_float32_become_infinite_without_a_warning(tmp_path):
    path = written(tmp_path / "weights.safetensors", {"a": np.float64([1e300])})
    assert np.isinf(files.load_state(path)["a"]).all()


def test_tensors_that_are_no_floats_keep_their_type(tmp_path):
    path = written(tmp_path / "weights.safetensors", {"a": np.arange(3), "b": np.bool_([True])})
    assert [x.dtype for x in files.load_state(path).values()] == [np.int64, np.bool_]


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_names_of_wrappers_are_left_out(prefix, tmp_path):
    wrapped = {prefix + name: array for name, array in STATE.items()}
    same(files.load_state(written(tmp_path / "weights.safetensors", wrapped)))


def test_names_of_wrappers_around_parts(tmp_path):
    path = tmp_path / "weights.safetensors"
    parts = {"a._orig_mod.weight": STATE["a.weight"], "b": STATE["b"]}
    same(files.load_state(written(path, parts)))
    refused("holds weights twice", written(path, {**STATE, "module.b": STATE["b"]}))


@pytest.mark.parametrize("name", ["W.SAFETENSORS", "weights", "weights.pth", "weights.zip"])
def test_the_content_tells_the_format(name, tmp_path):
    same(files.load_state(written(tmp_path / name)))


# Shards and folders.


def write_shards(folder, suffix="safetensors", save=safetensors.numpy.save_file):
    names = [f"model-{i:05}-of-00002.{suffix}" for i in (1, 2)]
    for name, (tensor, array) in zip(names, STATE.items(), strict=True):
        save({tensor: array}, folder / name)
    index = folder / f"model.{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip(STATE, names, strict=True))}))
    return index


def test_shards_by_their_index_and_by_their_folder(tmp_path):
    index = write_shards(tmp_path)
    (tmp_path / "lone").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".hidden.safetensors").write_text("of an editor")
    same(files.load_state(index))
    same(files.load_state(tmp_path))
    shard = tmp_path / "model-00002-of-00002.safetensors"
    refused("is one of 2 shards: give the index file", shard)
    lone = written(tmp_path / "lone" / "MODEL-00001-OF-00002.SAFETENSORS")
    refused("is one of 2 shards: give the index file", lone)
    refused("is one of 2 shards: give the index file", lone.parent)
    shard.unlink()
    refused(f"names 2 shards, and {shard.name} does not lie beside it", index)


def test_shards_that_are_not_those_of_the_index(tmp_path):
    index = write_shards(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    written(second, {**STATE})
    refused("holds a.weight, which an earlier shard holds too", index)
    written(second, {"c": STATE["b"]})
    refused("'b' is in no shard", index)
    written(second, {"b": STATE["b"], "c": STATE["b"]})
    refused("'c' is not in the index", index)


@pytest.mark.parametrize(
    "name",
    [
        "../out.safetensors",
        "/out",
        "sub/x",
        "a\\b",
        "",
        ".",
        "..",
        "c:x",
        "a\nb",
        "a" * 999,
        3,
        None,
    ],
)
def test_shards_lie_beside_their_index(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    written(tmp_path / "out.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(STATE, name)}))
    refused("no plain name of a file beside it", index)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged: no JSON"),
        ("[" * 100_000, "is damaged: no JSON"),
        ("\xff", "is damaged: no JSON"),
        ("[]", "without weight_map"),
        ('{"weight_map": []}', "without weight_map"),
        ('{"weight_map": {}}', "without weight_map"),
    ],
)
def test_files_that_are_no_index(text, message, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text, encoding="latin-1")
    refused(message, index)
    refused(message, tmp_path)


def test_folders(tmp_path):
    refused(r"holds no file of weights \(it is empty\)", tmp_path)
    (tmp_path / "README.md").write_text("the weights are elsewhere")
    refused(r"holds no file of weights \(README.md\)", tmp_path)
    one = written(tmp_path / "blob")
    same(files.load_state(tmp_path))
    two = written(tmp_path / "model.safetensors")
    refused(r"holds 2 files of weights \(blob, model.safetensors\): give the one", tmp_path)
    one.unlink()
    two.unlink()
    (tmp_path / "weights").mkdir()
    refused("holds a run or converted weights", tmp_path)
    refused("no file of weights", tmp_path / "weights")
    (tmp_path / "_CHECKPOINT_METADATA").write_text("{}")
    refused("is a checkpoint of Orbax", tmp_path)


# What is refused.


def zipped(*names, compression=zipfile.ZIP_STORED):
    def write(path):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name in names:
                archive.writestr(name, b"text" * 100)

    return write


MISTAKEN = {
    "is empty": b"",
    "is a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n",
    "is an HTML page": b"\n<!DOCTYPE html><html><head>",
    "is an XML page": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>',
    "is a JSON file": b'{"error": "Not found"}',
    "is a gzip archive": b"\x1f\x8b\x08\x00abc",
    "is a tar archive": b"weights.pth".ljust(257, b"\0") + b"ustar\x0000",
    "is an array of numpy": b"\x93NUMPY\x01\x00",
    "is an HDF5 file": b"\x89HDF\r\n\x1a\n",
    "is a PNG image": b"\x89PNG\r\n\x1a\n",
    "is a pickle that PyTorch did not write": b"\x80\x04\x95\x00\x00.",
    r"is a text file \('Entry not found'\)": b"Entry not found\n",
    r"is damaged, or of an unknown format .* 01 02 03": b"\x01\x02\x03",
    "is an npz archive": zipped("a.npy", "b.npy"),
    "is a zip archive of other things, 'README.md' first": zipped("README.md", "w/model.pth"),
    "is an empty zip archive": zipped(),
    "is a TorchScript program": zipped("m/data.pkl", "m/constants.pkl", "m/code/m.py"),
    "was compressed later": zipped("m/data.pkl", "m/data/0", compression=zipfile.ZIP_DEFLATED),
    "has no whole end": b"PK\x03\x04" + b"\0" * 100,
}


@pytest.mark.parametrize("message", MISTAKEN)
@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "weights"])
def test_a_refusal_says_what_the_file_is(message, name, tmp_path):
    path, content = tmp_path / name, MISTAKEN[message]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)
    refused(message, path)


def test_files_that_are_not_there_or_cut_short(tmp_path):
    refused("weights.pth does not exist", tmp_path / "weights.pth")
    refused("is neither a file nor a folder", pathlib.Path("/dev/null"))
    path = tmp_path / "weights.safetensors"
    whole = written(path).read_bytes()
    for length in range(9, len(whole)):
        path.write_bytes(whole[:length])
        refused("weights.safetensors is damaged", path)


def described(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        {"a": described(), "b": described()},  # one place for two
        {"a": described(offsets=(2, 6))},
        {"a": described(offsets=(4, 0))},
        {"a": described(shape=(2**40, 2**40))},
        {"a": described(shape=(-1,))},
        {"a": described(shape=(1,) * 100)},
        {"a": described("F99")},
        {"a": described("F32"), "__metadata__": {"a": 1}},
        {"a\nb": described()},
        {"a" * 1000: described()},
        {"a": 3},
        b'{"a":' * 100_000,
        b"{" + b"[" * 100_000,
        b'{"\xff": 3}',
    ],
)
def test_hostile_headers(header, tmp_path):
    refused("weights is damaged", raw_safetensors(tmp_path / "weights", header, b"1234"))


@pytest.mark.parametrize("length", [0, 5, 10**6, 2**40, 2**63, 2**64 - 256])
def test_headers_of_wrong_length(length, tmp_path):
    path = raw_safetensors(tmp_path / "weights", {"a": described()}, b"1234", length)
    refused("weights is damaged", path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_eight_bits_are_no_weights_without_scales(dtype, tmp_path):
    path = raw_safetensors(tmp_path / "weights", {"a": described(dtype, (4,))}, b"1234")
    refused("take the weights in float32, float16 or bfloat16", path)


# Writing.


def test_where_nothing_can_be_written(tmp_path):
    for path, message in (
        (tmp_path / "weights.npz", r"must be one of \.safetensors \.pth \.pt \.ckpt \.bin"),
        (tmp_path / "weights", "must be one of"),
        (tmp_path / "no" / "weights.safetensors", "no does not exist: make the folder first"),
        (tmp_path / "folder.bin", "is a folder: give the name of a file"),
    ):
        (tmp_path / "folder.bin").mkdir(exist_ok=True)
        with pytest.raises(table.ConvertError, match=message):
            files.save_state(path, STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["folder.bin"]


@pytest.fixture
def full_disk():
    """No file may grow beyond 4 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_file_is_written_whole_or_not_at_all(suffix, tmp_path, full_disk):
    if suffix == "pth":
        pytest.importorskip("torch")
    path = tmp_path / f"weights.{suffix}"
    path.write_text("what was there")
    with pytest.raises(table.ConvertError, match=f"writing .*{path.name} failed") as raised:
        files.save_state(path, {"a": np.zeros(100_000, np.float32)})
    assert "\n" not in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "what was there"


def test_others_may_read_what_is_written(tmp_path):
    (tmp_path / "other").touch()
    files.save_state(tmp_path / "weights.safetensors", STATE)
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_digest(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1.
    assert files.digest([path]).startswith("ba7816bf8f01cfea414140de5dae2223")
    whole, parts = tmp_path / "whole", [tmp_path / "1", tmp_path / "2"]
    for part, content in zip((whole, *parts), (b"abcd", b"ab", b"cd"), strict=True):
        part.write_bytes(content)
    assert files.digest(parts) == files.digest([whole]) != files.digest(parts[::-1])


# PyTorch's formats.


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
        for name in ("weights.pth", "WEIGHTS.PTH", "weights", "weights.safetensors"):
            path = tmp_path / name
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
    refused("'epoch' is not a tensor, so this is no state dict", path)


def test_containers_of_pytorch_files(torch, tmp_path):
    path = tmp_path / "weights.pth"
    files.save_state(path, STATE, containers=("model", "model_ema"))
    loaded = torch.load(path, weights_only=True)
    assert list(loaded) == ["model", "model_ema"]
    for state in loaded.values():
        same({name: tensor.numpy() for name, tensor in state.items()})
    assert path.stat().st_size < 4000  # the same tensors twice lie there once


def test_shards_of_pytorch(torch, tmp_path):
    def save(state, path):
        torch.save({name: torch.from_numpy(x) for name, x in state.items()}, path)

    same(files.load_state(write_shards(tmp_path, "bin", save)))
    same(files.load_state(tmp_path))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_tensors_of_other_widths(torch, dtype, tmp_path):
    path = tmp_path / "weights.pth"
    tensors = {"module." + name: torch.from_numpy(x) for name, x in STATE.items()}
    torch.save({name: x.to(getattr(torch, dtype)) for name, x in tensors.items()}, path)
    same(files.load_state(path))


def test_tensors_that_are_no_weights(torch, tmp_path):
    path = tmp_path / "weights.pth"
    for tensor in (
        torch.zeros(1).expand(10**9, 10**9),
        torch.zeros(2, dtype=torch.float8_e4m3fn),
        torch.eye(2).to_sparse(),
        torch.empty(2, device="meta"),
    ):
        torch.save({"a": tensor}, path)
        refused("the tensor 'a' cannot be read", path)
    for name in (3, "a\nb", "a" * 1000):
        torch.save({name: torch.ones(2)}, path)
        refused("is no name of a tensor", path)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_code_in_a_pickle_never_runs(torch, tmp_path):
    path, trace = tmp_path / "weights.pth", tmp_path / "ran"
    for legacy in (False, True):
        held = {"model": {"a": torch.ones(2)}, "extra": Malicious(trace)}
        torch.save(held, path, _use_new_zipfile_serialization=not legacy)
        refused("holds more than weights and might run code", path, containers=("model",))
        assert not trace.exists()
    torch.load(path, weights_only=False)
    assert trace.exists()  # it would have


def test_pytorch_files_cut_short(torch, tmp_path):
    path = tmp_path / "weights.pth"
    for legacy in (False, True):
        torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        for length in range(16, len(whole), 97):
            path.write_bytes(whole[:length])
            # Cut within the name of a class, it asks for one that is not known.
            refused("is (damaged|a pickle)|holds more than weights", path)
