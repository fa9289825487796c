"""Laws of checkpoints: restored is saved, on any mesh; a kill or a bad file costs one step."""

import pathlib
import resource
import signal
import subprocess
import sys
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from arcond_jax import checkpoint, digest


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    rng: jax.Array


def make_state(value=1.0):
    params = {"dense": {"kernel": jnp.full((8, 4), float(value)), "bias": jnp.arange(4.0)}}
    opt_state = optax.adamw(1e-3).init(params)
    return State(jnp.int32(value), params, opt_state, jax.random.key(3))


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding(leaf) if sharding else None
        ),
        state,
    )


def assert_equal(tree, expected):
    def check(leaf, other):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        np.testing.assert_array_equal(leaf, other)

    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(check, tree, expected)


def save(checkpoints, step, state=None, **kwargs):
    state = make_state(step) if state is None else state
    items = dict(tokenizer={"mean": jnp.ones(3)}, data={"next_index": step}, config={"seed": 0})
    return checkpoints.save(step, state=state, **items | kwargs)


def test_schedule_and_retention(tmp_path):
    with checkpoint.Checkpoints(str(tmp_path / "run"), every=2, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        assert [save(checkpoints, step) for step in range(1, 8)] == [False, True] * 3 + [False]
        assert save(checkpoints, 7, force=True)
        assert not save(checkpoints, 7, force=True)  # nothing new to write
    with checkpoint.Checkpoints(str(tmp_path / "run")) as reader:
        assert reader.latest_step() == 7
        with pytest.raises(
            checkpoint.CheckpointError, match=r"No checkpoint of step 4 .* it has 6, 7"
        ):
            reader.config(4)
        with pytest.raises(checkpoint.CheckpointError, match="reading only"):
            save(reader, 8)


def test_restored_is_saved(tmp_path):
    state = make_state(4.0)
    tokenizer = {"mean": jnp.arange(3.0)}
    with checkpoint.Checkpoints(str(tmp_path), every=1) as checkpoints:
        save(checkpoints, 4, state, tokenizer=tokenizer, data={"next_index": 9})
        checkpoints.wait()
        restored = checkpoints.restore(abstract(state), abstract_tokenizer=abstract(tokenizer))
        assert_equal(restored.state, state)
        assert_equal(restored.tokenizer, tokenizer)
        assert (restored.step, restored.data) == (4, {"next_index": 9})
        assert checkpoints.config() == {"seed": 0}
        assert checkpoints.restore(abstract(state)).tokenizer is None
        save(checkpoints, 5, tokenizer=None)
        checkpoints.wait()
        assert checkpoints.restore(abstract(state)).step == 5


def test_branches_may_stay_on_disk(tmp_path):
    state = make_state(2.0)
    with checkpoint.Checkpoints(str(tmp_path), every=1) as checkpoints:
        save(checkpoints, 1, state)
        checkpoints.wait()
        restored = checkpoints.restore(abstract(state), unread=("opt_state",)).state
        assert all(leaf is ... for leaf in jax.tree.leaves(restored.opt_state))
        assert_equal(restored.replace(opt_state=state.opt_state), state)
        other = abstract(state).replace(opt_state={"count": jax.ShapeDtypeStruct((7,), jnp.int32)})
        with pytest.raises(checkpoint.CheckpointError, match=r"of another model: state/opt_state"):
            checkpoints.restore(other, unread=("opt_state",))


def test_saved_arrays_may_be_donated(tmp_path):
    state = {"kernel": jnp.zeros((256, 256))}
    update = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    with checkpoint.Checkpoints(str(tmp_path), every=1) as checkpoints:
        for step in range(1, 4):
            state = update(state)
            save(checkpoints, step, state)
        state = update(state)
        checkpoints.wait()
        for step in range(1, 4):
            restored = checkpoints.restore(abstract(state), step=step)
            np.testing.assert_array_equal(restored.state["kernel"], step)


def test_restores_on_another_mesh(tmp_path):
    state = make_state(2.0)
    with checkpoint.Checkpoints(str(tmp_path), every=1) as checkpoints:
        save(checkpoints, 1, state)
        checkpoints.wait()
        for step, shape in enumerate([(8, 1), (2, 4)], start=1):  # one device, 8x1, then 2x4
            mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

            def sharding(leaf, mesh=mesh):
                axes = ("data", "fsdp") if leaf.ndim == 2 else ()
                return NamedSharding(mesh, PartitionSpec(*axes))

            restored = checkpoints.restore(abstract(state, sharding)).state
            assert_equal(restored, state)
            kernel = restored.params["dense"]["kernel"]
            assert kernel.sharding.spec == PartitionSpec("data", "fsdp")
            assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8
            save(checkpoints, step + 1, restored)
            checkpoints.wait()


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from arcond_jax import checkpoint
checkpoints = checkpoint.Checkpoints(sys.argv[1], every=1)
for step in range(1, 4):
    state = {"kernel": jnp.full((512, 512), float(step))}
    checkpoints.save(step, state=state, tokenizer=None, data={"next_index": step}, config={})
    if step == 2:
        checkpoints.wait()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_leaves_committed_steps(tmp_path):
    result = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    state = {"kernel": jnp.zeros((512, 512))}
    with checkpoint.Checkpoints(str(tmp_path), every=1) as checkpoints:
        latest = checkpoints.latest_step()
        assert latest in (2, 3)  # 3 only if its files were whole before the kill
        restored = checkpoints.restore(abstract(state))
        np.testing.assert_array_equal(restored.state["kernel"], latest)
        assert restored.data == {"next_index": latest}
        assert save(checkpoints, latest + 1, state)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {str(step) for step in range(1, latest + 2)}  # no unfinished ones are left


def test_a_full_disk_shows_at_the_next_look_and_leaves_nothing(tmp_path):
    state = {"kernel": jax.random.normal(jax.random.key(0), (256, 256))}
    with checkpoint.Checkpoints(str(tmp_path), every=1) as checkpoints:
        save(checkpoints, 1)
        checkpoints.wait()
        checkpoints.check()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))  # bytes of any one file
        try:
            save(checkpoints, 2, state)
            while checkpoints.is_writing():
                time.sleep(0.01)
            with pytest.raises(checkpoint.CheckpointError, match=r"Writing to .* File too large"):
                checkpoints.check()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry.name for entry in tmp_path.iterdir()] == ["1"]


# Small arrays live inside the index; the file cut in half must be one that holds an array.
def largest_file(directory: pathlib.Path) -> pathlib.Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Orbax leaves its other reads unawaited when one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_truncated_files_cost_one_step(tmp_path):
    state = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
    with checkpoint.Checkpoints(str(tmp_path), every=1) as checkpoints:
        for step in (1, 2, 3):
            save(checkpoints, step, state)
        checkpoints.wait()
        truncate(largest_file(tmp_path / "3" / "state"))
        truncate(tmp_path / "2" / "config" / "metadata")
    with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
        with pytest.raises(checkpoint.CheckpointError) as raised:
            checkpoints.restore(abstract(state))
        assert str(raised.value).startswith(f"The checkpoint of step 3 in {tmp_path} is damaged")
        assert f"delete {tmp_path}/3, or go on from an earlier one" in str(raised.value)
        assert "\n" not in str(raised.value)
        with pytest.raises(checkpoint.CheckpointError, match=r"step 2 .* is damaged"):
            checkpoints.config(2)
        assert_equal(checkpoints.restore(abstract(state), step=1).state, state)


def test_other_models_are_named_by_leaf(tmp_path):
    with checkpoint.Checkpoints(str(tmp_path), every=1) as checkpoints:
        save(checkpoints, 1, {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)})
        checkpoints.wait()
        wrong = {
            r"state/w is \(2, 3\) in the checkpoint, \(2, 5\) here": dict(w=(2, 5), b=(3,)),
            r"state/b is \(3,\) in the checkpoint, absent here": dict(w=(2, 3)),
            r"state/c is absent in the checkpoint, \(1,\) here": dict(w=(2, 3), b=(3,), c=(1,)),
        }
        for message, shapes in wrong.items():
            target = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in shapes.items()}
            with pytest.raises(checkpoint.CheckpointError, match=message):
                checkpoints.restore(target)


def test_directory_errors(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(checkpoint.CheckpointError, match=r"Cannot write to .*file/run"):
        checkpoint.Checkpoints(str(tmp_path / "file" / "run"), every=1)
    with pytest.raises(checkpoint.CheckpointError, match="does not exist: train there first"):
        checkpoint.Checkpoints(str(tmp_path / "nothing"))
    with checkpoint.Checkpoints(str(tmp_path), every=2) as checkpoints:
        with pytest.raises(checkpoint.CheckpointError, match="No checkpoint in"):
            checkpoints.restore({})
        save(checkpoints, 4)
    other_run = checkpoint.Checkpoints(str(tmp_path), every=2)
    with pytest.raises(checkpoint.CheckpointError, match="already holds step 4, cannot save"):
        save(other_run, 1)
    other_run.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_tree(tmp_path):
    path = str(tmp_path / "refiner")
    tree = {"anchors": jax.random.normal(jax.random.key(1), (64, 64))}
    checkpoint.save_tree(path, tree, {"kind": "transport", "epsilon": 0.1})
    assert [entry.name for entry in tmp_path.iterdir()] == ["refiner"]
    assert_equal(checkpoint.load_tree(path, abstract(tree)), tree)
    assert checkpoint.load_metadata(path) == {"kind": "transport", "epsilon": 0.1}
    with pytest.raises(checkpoint.CheckpointError, match="exists: delete it"):
        checkpoint.save_tree(path, tree, {})
    with pytest.raises(checkpoint.CheckpointError, match=r"tree/anchors is \(64, 64\) in the"):
        checkpoint.load_tree(path, {"anchors": jax.ShapeDtypeStruct((4, 64), jnp.float32)})
    with pytest.raises(checkpoint.CheckpointError, match="does not exist"):
        checkpoint.load_metadata(str(tmp_path / "nothing"))
    truncate(largest_file(tmp_path / "refiner" / "tree"))
    with pytest.raises(checkpoint.CheckpointError, match=r"is damaged .* make it again"):
        checkpoint.load_tree(path, abstract(tree))


def test_a_flipped_bit_is_found(tmp_path):
    state = {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}
    with checkpoint.Checkpoints(str(tmp_path), every=1) as checkpoints:
        save(checkpoints, 1, state)
    files = (tmp_path / "1" / "state").rglob("d/*")
    largest = max(files, key=lambda path: path.stat().st_size)
    whole, refused, rng = largest.read_bytes(), [], np.random.default_rng(0)
    for _ in range(20):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        largest.write_bytes(flipped)
        with checkpoint.Checkpoints(str(tmp_path)) as checkpoints:
            try:
                restored = checkpoints.restore(abstract(state)).state
                np.testing.assert_array_equal(restored["kernel"], state["kernel"])
            except checkpoint.CheckpointError as error:
                refused.append(str(error))
    assert len(refused) > 10 and all("is damaged" in line for line in refused)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "uint16", "bool"])
def test_a_digest_changes_with_every_bit_and_not_with_the_mesh(dtype):
    array = jax.random.bits(jax.random.key(0), (8, 6), np.uint8).astype(dtype)
    wanted = digest.of_tree({"x": array})["x"]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(array, NamedSharding(mesh, PartitionSpec("data")))
    assert digest.of_tree({"x": sharded})["x"] == wanted
    raw = np.asarray(array).view(np.uint8).reshape(-1)
    for i in range(0, raw.size, 5):
        flipped = raw.copy()
        flipped[i] ^= 1 if dtype == "bool" else 64
        other = flipped.view(np.asarray(array).dtype).reshape(array.shape)
        assert digest.of_tree({"x": other})["x"] != wanted
