"""Folders of checkpoints with a file changed, cut or gone: restored whole, or refused."""

import random
import shutil

import jax
import numpy as np
import pytest

from arcond_jax import checkpoint


@pytest.mark.parametrize("count", [25, pytest.param(600, marks=pytest.mark.slow)])
def test_mutated_folders(count, tmp_path):
    rng, refusals = random.Random(0), []
    tree = {"kernel": jax.random.normal(jax.random.key(0), (32, 16)), "bias": jax.numpy.ones(3)}
    metadata = {"config": {"name": "x", "rate": 0.5}}
    checkpoint.save_tree(str(tmp_path / "whole"), tree, metadata)
    for _ in range(count):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "copy")
        files = sorted(path for path in (tmp_path / "copy").rglob("*") if path.is_file())
        chosen = rng.choice(files)
        data = bytearray(chosen.read_bytes())
        what = rng.choice(("gone", "cut", "bytes", "bytes"))
        if what == "gone" or not data:
            chosen.unlink()
        else:
            if what == "cut":
                del data[rng.randrange(len(data)) :]
            else:
                data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
            chosen.write_bytes(data)
        try:
            loaded = checkpoint.load_tree(str(tmp_path / "copy"), jax.eval_shape(lambda: tree))
            jax.tree.map(np.testing.assert_array_equal, loaded, tree)
            assert checkpoint.load_metadata(str(tmp_path / "copy")) == metadata
        except checkpoint.CheckpointError as error:
            refusals.append(str(error))
    assert len(refusals) > count // 3 and not any("\n" in line for line in refusals)
