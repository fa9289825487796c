"""Laws of sharding: every mesh computes what one device computes, and really is used."""

import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, PartitionSpec

from arcond_jax import build, placement
from arcond_jax.data import pipeline
from arcond_jax.parallel import compiled, processes
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.run import drawing, restoring, training
from arcond_jax.transport import refiners

MESHES = {
    "one device": 1,
    "three devices": 3,
    "data=8": dict(data=8),
    "fsdp=8": dict(fsdp=8),
    "data=2 fsdp=2 tensor=2": dict(data=2, fsdp=2, tensor=2),
}


def make_mesh(name):
    if isinstance(MESHES[name], int):
        return mesh_lib.make_mesh(devices=jax.devices()[: MESHES[name]])
    return mesh_lib.make_mesh(**MESHES[name])


@pytest.fixture(scope="module")
def config():
    return tiny.config()


@pytest.fixture(scope="module")
def tokenizer(config):
    return build.tokenizer(config)


@pytest.fixture(scope="module")
def first_state(config):
    """A fresh state on one device, copied to the host."""
    return jax.tree.map(np.array, build.train_state(config, make_mesh("one device")))


def place(state, config, mesh):
    return jax.device_put(state, mesh_lib.tree_shardings(build.abstract_state(config), mesh))


def three_steps(config, tokenizer, state, mesh):
    step_fn = build.train_step(config, mesh, tokenizer)
    batch = processes.put_batch(tiny.batch(config), mesh)
    state, log = place(state, config, mesh), []
    for _ in range(3):
        state, metrics = step_fn(state, tokenizer, batch)
        log.append([float(metrics[name]) for name in ("loss", "gradient_norm")])
    return state, np.array(log)


@pytest.fixture(scope="module")
def on_one_device(config, tokenizer, first_state):
    return three_steps(config, tokenizer, first_state, make_mesh("one device"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("data=8", marks=pytest.mark.slow),
        pytest.param("fsdp=8", marks=pytest.mark.slow),
        "data=2 fsdp=2 tensor=2",
    ],
)
def test_three_steps_are_those_of_one_device(name, config, tokenizer, first_state, on_one_device):
    state, log = three_steps(config, tokenizer, first_state, make_mesh(name))
    # Sums run in another order: a few float32 roundings (1.2e-7) apart.
    np.testing.assert_allclose(log, on_one_device[1], rtol=3e-6)
    # Still where they were put: the update gathers nothing for good.
    qkv = state.params["trunk"]["blocks"]["qkv"]["kernel"]
    assert qkv.addressable_shards[0].data.size * num_pieces(name) == qkv.size


def num_pieces(name):
    return int(np.prod([MESHES[name].get(axis, 1) for axis in ("fsdp", "tensor")]))


def test_batches_ahead_are_those_of_the_pipeline_cut_over_the_devices(config):
    mesh, size = make_mesh("data=8"), config.data.batch_size
    ahead = training._Batches(config, mesh, None)
    source = build.examples(config, "train")
    plain = pipeline.train_iterator(source, global_batch_size=size, seed=config.seed)
    for number in range(1, 4):
        batch, expected = next(ahead), next(plain)
        assert {x.data.shape[0] for x in batch.image.addressable_shards} == {size // 8}
        np.testing.assert_array_equal(batch.image, expected["image"])
        np.testing.assert_array_equal(batch.prompt, expected["label"])
        assert ahead.get_state() == plain.get_state() == {"next_index": number}


PROCESS = """
import json, sys
import jax

index, count, port = map(int, sys.argv[1:])
jax.config.update("jax_num_cpu_devices", 4 // count)
if count > 1:
    jax.distributed.initialize(f"localhost:{port}", count, index)
import tiny
from arcond_jax import build
from arcond_jax.run import training

config, log = tiny.config(), []
mesh, tokenizer = build.mesh(config), build.tokenizer(config)
step_fn, state = build.train_step(config, mesh, tokenizer), build.train_state(config, mesh)
batches = training._Batches(config, mesh, None)
for _ in range(4):  # the thread ahead places a batch while this step runs
    state, metrics = step_fn(state, tokenizer, next(batches))
    log.append(float(metrics["loss"]))
print(json.dumps([jax.process_count(), batches.get_state(), log]))
"""


def losses_of(num_processes):
    """What each process of a run has to say; all run at once, on four devices together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([os.path.dirname(tiny.__file__), *sys.path])
    flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
    environment = {**os.environ, "PYTHONPATH": paths, "XLA_FLAGS": flags}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, *map(str, (index, num_processes, port))],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(num_processes)
    ]
    return [json.loads(x.communicate(timeout=300)[0].splitlines()[-1]) for x in processes]


@pytest.mark.slow
def test_two_processes_with_batches_ahead_train_as_one():
    alone, pair = losses_of(1), losses_of(2)
    assert pair[0] == pair[1] and pair[0][:2] == [2, {"next_index": 4}]
    # Sums run in another order: a few float32 roundings (1.2e-7) apart.
    np.testing.assert_allclose(pair[0][2], alone[0][2], rtol=3e-6)


def test_states_are_born_in_their_shards():
    config = tiny.config("base")
    state = build.train_state(config, make_mesh("data=2 fsdp=2 tensor=2"))
    alone = build.train_state(config, make_mesh("one device"))
    jax.tree.map(np.testing.assert_array_equal, state.params, alone.params)
    blocks = state.params["trunk"]["blocks"]
    adam = [x for x in jax.tree.leaves(state.opt_state, is_leaf=is_moments) if is_moments(x)]
    for tree in (blocks, state.ema["trunk"]["blocks"], adam[0].mu["trunk"]["blocks"]):
        shapes = {
            name: (leaf.shape, leaf.addressable_shards[0].data.shape)
            for name, leaf in (
                ("qkv", tree["qkv"]["kernel"]),
                ("up", tree["mlp"]["Linear_0"]["kernel"]),
                ("down", tree["mlp"]["Linear_1"]["kernel"]),
                ("scale", tree["mlp_norm"]["scale"]),
            )
        }
        assert shapes == {
            "qkv": ((1, 16, 2, 3, 8), (1, 8, 1, 3, 8)),
            "up": ((1, 16, 2, 32), (1, 8, 2, 16)),
            "down": ((1, 32, 16), (1, 16, 8)),
            "scale": ((1, 16), (1, 8)),
        }
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {8}


def is_moments(x):
    return hasattr(x, "mu")


def test_every_parameter_names_each_of_its_axes_once(config):
    params = build.abstract_state(config).params
    names = placement.RULES
    boxes = jax.tree_util.tree_flatten_with_path(
        params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
    )[0]
    for path, box in boxes:
        where = jax.tree_util.keystr(path)
        assert isinstance(box, nn.LogicallyPartitioned), where
        assert len(box.names) == box.value.ndim, where
        assert set(box.names) - {None} <= set(names), where
        used = [names[name] for name in box.names if name and names[name]]
        assert len(used) == len(set(used)), where  # no mesh axis cuts an array twice
        if box.value.size >= 16 * 16:
            assert used, f"{where} is large and whole on every device"


def test_axes_that_do_not_divide_stay_whole():
    mesh = make_mesh("data=2 fsdp=2 tensor=2")
    axes = ("batch", "vocab", None)
    assert placement.spec(axes, (8, 4, 3), mesh) == PartitionSpec(("data", "fsdp"), "tensor", None)
    assert placement.spec(axes, (6, 4, 3), mesh) == PartitionSpec(None, "tensor", None)
    assert placement.spec(axes, (4, 3, 3), mesh) == PartitionSpec(("data", "fsdp"), None, None)
    assert mesh_lib.num_batch_shards(mesh) == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mesh.data=16"], "mesh data 16 x fsdp 1 x tensor 1 needs 16 devices, but there are 8"),
        (["mesh.fsdp=16"], "mesh data 1 x fsdp 16 x tensor 1 needs 16 devices, but there are 8"),
        (["mesh.data=2"], "mesh data 2 x fsdp 1 x tensor 1 needs 2 devices, but there are 8"),
        (["mesh.fsdp=0"], "mesh.fsdp 0 must be at least 1"),
        (["data.batch_size=12"], "data.batch_size 12 is not divisible by 8"),
        (["data.batch_size=24", "training.num_accumulations=2"], "is not divisible by 16"),
    ],
)
def test_meshes_that_cannot_be_end_in_one_line(overrides, message):
    with pytest.raises(build.ConfigError, match=message) as raised:
        build.training_mesh(tiny.config("joint", *overrides))
    assert "\n" not in str(raised.value)


def test_only_training_wants_its_batch_divided():
    config = tiny.config("joint", "data.batch_size=12")
    assert mesh_lib.num_batch_shards(build.mesh(config)) == 8


def test_batches_are_filled_up_to_what_the_devices_divide():
    mesh = make_mesh("three devices")
    assert [mesh_lib.spread_over(mesh, n) for n in (1, 3, 4, 64)] == [3, 3, 6, 66]
    assert mesh_lib.spread_over(make_mesh("one device"), 7) == 7


def test_pieces_are_those_that_the_compiler_cuts():
    (symbolic,) = jax.export.symbolic_shape("b")
    assert placement.num_pieces(16) == 1
    with jax.set_mesh(make_mesh("data=2 fsdp=2 tensor=2")):
        assert [placement.num_pieces(x) for x in (16, 13, symbolic)] == [4, 1, 1]
    for names, kind in (("xyz", AxisType.Auto), (placement.AXES, AxisType.Explicit)):
        with jax.set_mesh(jax.make_mesh((2, 2, 2), tuple(names), axis_types=(kind,) * 3)):
            assert placement.num_pieces(16) == 1


def test_a_program_may_be_compiled_before_there_are_arrays():
    mesh = make_mesh("data=8")
    double, place = compiled.Compiled(lambda x: 2 * x, mesh), mesh_lib.batch_sharding(mesh)
    x = jax.device_put(np.arange(8.0, dtype=np.float32), place)
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    np.testing.assert_array_equal(double.lower(shape).compile()(x), double(x))


@pytest.fixture(scope="module")
def images_on(config, tokenizer, first_state):
    """The fresh model gives every code the same chance: equal images are no accident."""

    @functools.cache
    def draw(name):
        mesh, label = make_mesh(name), np.arange(16, dtype=np.int32) % 10
        state = place(first_state, config, mesh)
        trained = restoring.Trained(config, mesh, tokenizer, state.ema, None, 0)
        return drawing.Drawer(trained).images(refiners.Identity(), label, seed=3)

    return draw


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("data=8", marks=pytest.mark.slow),
        pytest.param("data=2 fsdp=2 tensor=2", marks=pytest.mark.slow),
        # Which divide neither the 16 images nor the batch of training.
        pytest.param("three devices", marks=pytest.mark.long),
    ],
)
def test_images_are_the_same_on_one_device_and_many(name, images_on):
    alone = images_on("one device")
    assert alone.shape == (16, 8, 8, 1)
    assert len(np.unique(alone.reshape(16, -1), axis=0)) == 16
    np.testing.assert_array_equal(images_on(name), alone)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_drawn_whole(config, tokenizer, first_state):
    mesh = make_mesh("data=8")
    state = place(first_state, config, mesh)
    trained = restoring.Trained(config, mesh, tokenizer, state.ema, None, 0)
    drawer, label = drawing.Drawer(trained), np.arange(8, dtype=np.int32)
    whole = drawer.images(refiners.Identity(), label, seed=3)
    pieces = drawer.images(refiners.Identity(), label, seed=3, batch_size=3)
    np.testing.assert_array_equal(whole, pieces)
    other = drawing.Drawer(dataclasses.replace(trained)).images(refiners.Identity(), label, seed=4)
    assert np.any(whole != other)
