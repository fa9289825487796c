"""What `arcond compile` says of a program is what the program is."""

import importlib.util
import json

import jax
import numpy as np
import pytest
import tiny

from arcond_jax import aot, build
from arcond_jax.cli import main as cli
from arcond_jax.parallel import collectives, processes, topology
from arcond_jax.parallel import mesh as mesh_lib


@pytest.fixture(scope="module")
def config():
    return tiny.config("base", "mesh.fsdp=4")


@pytest.fixture(scope="module")
def report(config):
    return aot.compile_for(config, topology.named("cpu"))


@pytest.mark.long
def test_memory_is_that_of_the_program_that_runs(config, report):
    mesh, tokenizer = build.training_mesh(config), build.tokenizer(config)
    state = build.train_state(config, mesh)
    batch = processes.put_batch(tiny.batch(config), mesh)
    tokenizer = jax.device_put(tokenizer, mesh_lib.replicated(mesh))
    step = build.train_step(config, mesh, tokenizer)
    sizes = step.lower(state, tokenizer, batch).compile().memory_analysis()
    assert report.fits and report.spare > 0.9
    left = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    assert report.temporary == sizes.temp_size_in_bytes + left
    held = {"parameters": state.params, "average": state.ema, "optimizer": state.opt_state}
    first = jax.devices()[0]
    for name, tree in held.items():
        shards = [
            shard.data.nbytes
            for leaf in jax.tree.leaves(tree)
            for shard in leaf.addressable_shards
            if shard.device == first
        ]
        assert report.parts[name] == sum(shards)


def test_the_batch_is_the_one_that_training_places(config):
    found = jax.tree.map(lambda x: (x.shape, x.dtype), aot.abstract_batch(config))
    given = tiny.batch(config)
    assert found.image == (given.image.shape, np.uint8)
    assert found.prompt == (given.prompt.shape, given.prompt.dtype)


@pytest.mark.parametrize("what", ["sample", "calibrate"])
def test_sampling_and_calibration_compile(config, what):
    settings = ("transport.kind=residual", "transport.inverse_weight=0.1", "mesh.fsdp=1")
    config = build.with_overrides(config, settings)
    report = aot.compile_for(config, topology.named("cpu"), what=what)
    assert report.fits and report.operations > 0
    assert report.parts["refiner"] > 0
    if what == "sample":
        assert report.collectives == []


def test_a_batch_that_does_not_divide_is_drawn_by_all(config):
    def operations(batch_size):
        settings = ("transport.kind=none", f"data.batch_size={batch_size}")
        changed = build.with_overrides(config, settings)
        return aot.compile_for(changed, topology.named("cpu"), what="sample").operations

    assert operations(13) == pytest.approx(operations(16) * 13 * 8 / 16, rel=0.1)


def test_a_program_of_the_command_line(tmp_path, capsys):
    overrides = [f"--config.{x}" for x in tiny.overrides("base")]
    out = tmp_path / "report.json"
    command = ["compile", "--config", "digits:base", "--topology", "cpu", "--json", str(out)]
    assert cli.main([*command, *overrides]) == 0
    text = capsys.readouterr().out
    (plain,) = json.loads(out.read_text())
    assert "It fits" in text and "Attention, queries x keys: einsum of " in text
    assert list(plain["attention"]) == ["einsum"]
    assert plain["fits"] and plain["mesh"] == {"data": 8, "fsdp": 1, "tensor": 1}
    assert set(plain["collectives"]) == {"all-reduce over data"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x2"], "topology 'v9:2x2' is none of v4:2x2x1 ... 8x8x8, v5e:2x2"),
        (["--topology", "v5e-17"], "v5e-N with N = 4, 8, 16, 32, 64, 128, 256"),
        (["--topology", "gpu"], "this machine has no gpu for jax"),
        (["--topology", "cpu", "--config.mesh.fsdp=3"], "needs 6 devices, but there are 8"),
        (["--topology", "cpu", "--config.mesh.tensor=8"], "mesh.tensor 8 does not divide"),
        (["--topology", "cpu", "--config.data.batch_size=61"], "the nearest that is, is 64"),
        (
            ["--topology", "cpu", "--what", "calibrate", "--config.transport.kind=none"],
            "there is nothing to calibrate",
        ),
        (["--topology", "cpu", "--slices", "0"], "--slices 0 must be from 1 to 1024"),
        (["--topology", "v5e:2x2", "--slices", "1000000"], "must be from 1 to 1024"),
        (
            ["--topology", "cpu", "--what", "sample", "--config.transport.kind=in_batch"],
            "data.batch_size 64: A batch of 64 rows does not give each of 10 groups",
        ),
        (
            ["--topology", "cpu", "--what", "sample", "--config.transport.num_sources=1"],
            "transport.num_sources 1 is too few",
        ),
        (["--topology", "CPU", "--slices", "2"], "this machine, which has no slices"),
        (["--topology", "v5e"], "topology 'v5e' has no size: v5e:2x2"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, capsys):
    assert cli.main(["compile", "--config", "digits:ar", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="it is installed")
def test_a_tpu_needs_its_compiler(capsys):
    assert cli.main(["compile", "--config", "digits:ar", "--topology", "v5e:4x4"]) == 2
    assert "pip install 'arcond_jax[tpu]'" in capsys.readouterr().err


def too_much(**changes):
    """A report of an update that takes twice what there is."""
    base = dict(config="", topology="v5e:2x2", what="train", num_accumulations=1, remat="none")
    base |= dict(mesh={"data": 8, "fsdp": 1, "tensor": 1}, slices=2, batch_size=64)
    base |= dict(parts={"parameters": 20}, temporary=0, limit=10, fits=False, operations=None)
    base |= dict(attention={})
    return aot.Report(**base | dict(collectives=None, compile_seconds=1.0) | changes)


def test_a_search_changes_what_costs_least_and_ends(config):
    change = aot._change(too_much(), config)
    assert change == {"mesh.fsdp": 4, "mesh.data": None}  # not over the border of a slice
    cut = dict(mesh={"data": 2, "fsdp": 4, "tensor": 1})
    assert aot._change(too_much(**cut), config) == {"model.remat": "full"}
    cut |= dict(remat="full")
    assert aot._change(too_much(**cut), config) == {"training.num_accumulations": 2}
    cut |= dict(num_accumulations=8)
    assert not aot.left_to_change(too_much(**cut), config)
    sampled = too_much(**cut, what="sample")
    assert aot._change(sampled, config) == {"data.batch_size": 32}


@pytest.mark.parametrize(
    "text",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 78.50G of 15.75G hbm.",
        "the total memory required for HLO temporaries (78.50G) exceeds available HBM (15.75G).",
    ],
)
def test_what_the_compiler_says_of_too_much_is_read(text):
    assert aot._TOO_MUCH.search(text).groups() == ("78.50", "G")
    assert aot._TOO_MUCH.search("Used 20.00M of 16.00M vmem") is None


def test_three_spellings_of_a_topology():
    assert {topology.canonical(x) for x in ("v5e:16x16", "v5e-256", "v5litepod-256")} == {
        "v5e:16x16"
    }
    assert topology.canonical("v5p-32") == "v5p:2x2x4"  # counts cores
    assert topology.canonical("v6e-16") == "v6e:4x4"


PROGRAM = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %p = (s32[], f32[2,8]{1,0}) parameter(0)
  %x = f32[2,8]{1,0} get-tuple-element(%p), index=1
  %gather = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %part = bf16[8,8]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], attributes={chain_id="1"}
  %rest = bf16[8,8]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], attributes={chain_id="1"}
  ROOT %t = (s32[], f32[2,8]{1,0}) tuple(%x, %x)
}

%condition (p: (s32[], f32[2,8])) -> pred[] {
  %p = (s32[], f32[2,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%all-reduce-scatter.1 (whole: f32[2,8]) -> f32[2,2] {
  %whole = f32[2,8]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %summed = f32[2,8]{1,0} all-reduce(%whole), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %own = f32[2,2]{1,0} dynamic-slice(%summed, %zero, %zero), dynamic_slice_sizes={2,2}
}

ENTRY %main (x: f32[2,8]) -> f32[2,8] {
  %x = f32[2,8]{1,0} parameter(0)
  %loop = (s32[], f32[2,8]{1,0}) while(%x), condition=%condition, body=%body
  %sum = f32[2,8]{1,0} all-reduce(%x), replica_groups=NAMED, to_apply=%add
  %cut = f32[2,2]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %sent = (f32[2,8]{1,0}, f32[2,8]{1,0}) collective-permute-start(%x), source_target_pairs=PAIRS
  ROOT %r = f32[2,8]{1,0} get-tuple-element(%loop), index=1
}
"""
PROGRAM = PROGRAM.replace("NAMED", "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}")
PROGRAM = PROGRAM.replace("PAIRS", "{{0,1},{1,0}}")


def test_collectives_are_read_from_the_text_of_a_program():
    mesh = mesh_lib.make_mesh(data=2, fsdp=4)
    found = {(x.kind, x.bytes, x.times, x.axes) for x in collectives.of_program(PROGRAM, mesh)}
    assert found == {
        ("all-gather", 128, 5, ("fsdp",)),
        ("all-reduce", 64, 1, ("data",)),
        ("reduce-scatter", 64, 1, ("fsdp",)),
        ("collective-permute", 64, 1, ("fsdp",)),
    }
    assert len(collectives.of_program(PROGRAM, mesh)) == 5  # the one in two pieces counts once
