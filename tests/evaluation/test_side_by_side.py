"""FID and Inception Score beside pytorch-fid and torch-fidelity, where they are installed."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

SCRIPT = pathlib.Path(__file__).parents[2] / "benchmarks" / "inception.py"
NUM_IMAGES = 24  # in each of two sets


@pytest.mark.slow
def test_scores_equal_those_of_the_usual_programs(tmp_path):
    for name in ("torch", "pytorch_fid", "torch_fidelity"):
        pytest.importorskip(name)
    rng = np.random.default_rng(0)
    for number in range(2 * NUM_IMAGES):
        blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = np.repeat(np.repeat(blocks, 8, axis=0), 8, axis=1)
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    command = [sys.executable, SCRIPT, tmp_path, "--only=scores", f"--num_images={NUM_IMAGES}"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    apart = [float(found) for found in re.findall(r"apart by (\S+)", printed)]
    assert len(apart) == 3, printed
    assert max(apart) <= 1e-3, printed
