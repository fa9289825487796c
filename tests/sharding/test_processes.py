"""What processes hold, fetch and agree on: two of them, with four CPU devices each."""

import hosts

TOGETHER = """
import argparse
import sys

import jax
import numpy as np

from arcond_jax import checkpoint
from arcond_jax.cli import joining
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.parallel import processes

given = dict.fromkeys(("coordinator_address", "num_processes", "process_id", "config"))
joining.join(argparse.Namespace(**given, initialization_timeout=300, overrides=[]), [])
me = jax.process_index()
assert processes.are_several() and processes.is_first() == (me == 0)

mesh, x = mesh_lib.make_mesh(), np.arange(8, dtype=np.float32)
cut = processes.put(x, mesh_lib.batch_sharding(mesh))
assert cut.shape == (8,) and cut.addressable_shards[0].data.shape == (1,)
np.testing.assert_array_equal(processes.fetch({"x": cut})["x"], x)
np.testing.assert_array_equal(processes.fetch(processes.put_batch(x[:4], mesh)), [*x[:4]] * 2)

# Also where the devices of processes take turns, and where a row lies on devices of both.
turns = sorted(jax.devices(), key=lambda device: device.id % 1000 % 4)
assert [device.process_index for device in turns] == [0, 1] * 4
for axes, devices, rows in (
    ({}, turns, x[me::2]), ({"tensor": 2}, turns, x), ({"tensor": 8}, None, x),
    ({"data": 2, "tensor": 4}, None, x[4 * me : 4 * me + 4]),
):
    other = mesh_lib.make_mesh(devices=devices, **axes)
    np.testing.assert_array_equal(x[processes.local_rows(other, 8)], rows)
    np.testing.assert_array_equal(processes.fetch(processes.put_batch(rows, other)), x)

abstract = {"a": jax.ShapeDtypeStruct(x.shape, x.dtype)}
made = processes.from_first(lambda: {"a": x + me + 1}, abstract)
np.testing.assert_array_equal(made["a"], x + 1)
assert processes.least(2**40 - me) == 2**40 - 1
assert processes.anywhere(me == 1) and not processes.anywhere(False)
told = processes.Agreed(lambda: me == 1)
assert [told(), told()] == [False, True]

placed = processes.put(made, mesh_lib.replicated(mesh))
checkpoint.save_tree(sys.argv[1], placed, {"b": 1})
read = checkpoint.load_tree(sys.argv[1], placed)
np.testing.assert_array_equal(processes.fetch(read["a"]), x + 1)
print("done")
"""


def test_what_they_hold_fetch_and_agree_on(tmp_path):
    started = hosts.start(tmp_path / "tree", program=("-c", TOGETHER))
    codes, outputs, errors = hosts.ended(started)
    assert codes == [0, 0], errors
    assert outputs[0].endswith("done\n") and "done" not in outputs[1]
