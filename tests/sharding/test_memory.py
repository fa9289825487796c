"""Laws of batches by memory: as few equal batches as fit, whatever the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arcond_jax.parallel import compiled, memory
from arcond_jax.parallel import mesh as mesh_lib

WIDTH = 1000


def lower_on(mesh):
    """A program that needs a square matrix for each row; the product before it stays apart."""

    def program(x):
        squares = jnp.cumsum(x[:, :, None] * x[:, None, :], axis=1)
        return jnp.sort(squares, axis=2).sum(axis=(1, 2))

    run, place = compiled.Compiled(program, mesh), mesh_lib.batch_sharding(mesh)
    return lambda n: run.lower(jax.ShapeDtypeStruct((n, WIDTH), jnp.float32, sharding=place))


def needed(lowered):
    sizes = lowered.compile().memory_analysis()
    return sizes.temp_size_in_bytes + sizes.output_size_in_bytes


@pytest.mark.parametrize("num_devices", [1, 3])
def test_a_batch_is_the_largest_even_one_that_fits(num_devices, monkeypatch):
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:num_devices])
    lower = lower_on(mesh)

    def batch_size(num_rows, *, at_most):
        return memory.batch_size(lower, num_rows, at_most=at_most, mesh=mesh)

    assert batch_size(12, at_most=100) == 12
    assert batch_size(30, at_most=20) == 15  # two equal ones rather than 20 and 10
    a_row = needed(lower(12)) * num_devices / 12
    monkeypatch.setattr(memory, "of_device", lambda mesh: int(4.5 * a_row / memory.SHARE))
    chosen = batch_size(24, at_most=100)
    assert chosen == {1: 4, 3: 12}[num_devices]  # four rows on each device
    monkeypatch.setattr(memory, "of_device", lambda mesh: 1)
    assert batch_size(24, at_most=100) == num_devices  # a row on each, at least


@pytest.mark.parametrize("num_devices", [1, 3])
def test_rows_on_a_device_are_halved_until_they_fit(num_devices, monkeypatch):
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:num_devices])
    lower = lower_on(mesh)
    assert memory.halved(lower, 12, mesh=mesh) == 12
    a_row = needed(lower(4 * num_devices)) / 4
    monkeypatch.setattr(memory, "of_device", lambda mesh: int(4.5 * a_row / memory.SHARE))
    assert memory.halved(lower, 12, mesh=mesh) == 3
    monkeypatch.setattr(memory, "of_device", lambda mesh: 1)
    assert memory.halved(lower, 12, mesh=mesh) == 1


def test_devices_of_one_machine_share_its_memory(tmp_path, monkeypatch):
    one, eight = (mesh_lib.make_mesh(devices=jax.devices()[:n]) for n in (1, 8))
    whole = memory.of_device(one)
    assert whole > 2**28
    assert memory.of_device(eight) == whole // 8
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CONTAINER_LIMIT", limit)
    limit.write_text("123456789\n")
    assert memory.of_device(one) == 123456789
    limit.write_text("max\n")
    assert memory.of_device(one) >= whole


def test_what_lies_there_already_counts(monkeypatch):
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(memory, "of_device", lambda mesh: 100)
    np.testing.assert_allclose(memory.share(20, beside=60, mesh=mesh), 0.5)
    assert memory.share(1, beside=100, mesh=mesh) >= 1.0
