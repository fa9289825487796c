"""50,000 images of Inception's widths take less than 1 GB beyond the network."""

import subprocess
import sys

import pytest

READ = """
import resource

import numpy as np

from arcond_jax.evaluation import features, summary

COUNT, WIDTHS = 50_000, (2048, 1008, 2023)


class Wide:
    description, num_classes = "as wide as Inception", WIDTHS[1]

    def __init__(self):
        rng = np.random.default_rng(0)
        self.kernels = [rng.standard_normal((48, x), np.float32) for x in WIDTHS]

    def __call__(self, image):
        pixels = image.reshape(len(image), -1).astype(np.float32) / 255
        return features.Outputs(*(np.abs(pixels @ kernel) for kernel in self.kernels))


def batches(count):
    rng = np.random.default_rng(1)
    for start in range(0, count, 500):
        yield rng.integers(0, 256, (500, 4, 4, 3), dtype=np.uint8), None


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GB of 2**30, on Linux


network = Wide()
network(next(batches(500))[0])
before = peak()
found = summary.summarise(batches(COUNT), network, total=COUNT)
assert found.rows.shape == (COUNT, 2048) and found.features.count == COUNT
print(peak() - before)
"""


@pytest.mark.slow
def test_fifty_thousand_images_in_less_than_a_gigabyte():
    done = subprocess.run([sys.executable, "-c", READ], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.95, done.stdout
    print(done.stdout)
