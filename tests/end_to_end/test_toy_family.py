"""A backbone takes a model file, a record and a config; every command then knows it."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy
from test_converted import call, convert

from arcond_jax.convert import files
from arcond_jax.evaluation import samples
from arcond_jax.training import writer

CONFIG = pathlib.Path(__file__).parents[1] / "toy_family.py"


@pytest.mark.long
def test_one_model_file_and_one_record_do(tmp_path, capsys):
    run, out = tmp_path / "run", tmp_path / "out.npz"
    call(["train", "--config", CONFIG, "--workdir", run])
    loss = [row["loss"] for row in writer.read_rows(run / "metrics.jsonl")]
    assert np.mean(loss[-5:]) < np.mean(loss[:5]) - 0.1

    guided = "--config.sampling.guidance_scale=1.5"
    call(["calibrate", "--checkpoint", run, guided])
    call(["sample", "--checkpoint", run, "--num_images", 20, "--out", out, guided])
    drawn = samples.read_samples(out)
    assert drawn.metadata["sampling"]["guidance_scale"] == 1.5
    assert drawn.metadata["refinement"]["kind"] == "bures"

    target = tmp_path / "bag.safetensors"
    call(["export", "--checkpoint", run, "--out", target])
    call([*convert("bag", target, tmp_path / "weights"), "--config", CONFIG])
    again = tmp_path / "again.safetensors"
    call(["export", "--checkpoint", tmp_path / "weights", "--out", again])
    exported = safetensors.numpy.load_file(target)
    for name, array in files.load_state(again).items():
        np.testing.assert_array_equal(array, exported[name])

    table = tmp_path / "bench.json"
    call(["bench", "--config", CONFIG, "--batch_size", 2, "--out", table])
    assert json.loads(table.read_text())[0]["name"] == "bag"
