"""What a process holds of an array that lies on the devices of all."""

from typing import Any

import jax
from jax.sharding import Mesh

from arcond_jax.parallel import mesh as mesh_lib


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Process-local rows to global arrays, sharded over the batch axes."""
    sharding = mesh_lib.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)
