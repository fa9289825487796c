"""A network of a few numbers, as `features.Features`; a tree that may lie on every device."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from arcond_jax.evaluation import features

WIDTH, NUM_CLASSES, SPATIAL = 12, 5, 7


@flax.struct.dataclass
class Network:
    """A tanh of random sums of pixels."""

    kernel: jax.Array
    description: str = flax.struct.field(pytree_node=False, default="random sums of pixels")
    num_classes: int = flax.struct.field(pytree_node=False, default=NUM_CLASSES)

    def __call__(self, image):
        return _read(self.kernel, image)


@jax.jit
def _read(kernel, image):
    flat = image.reshape(image.shape[0], -1).astype(jnp.float32) / 128.0 - 1.0
    read = jnp.tanh(jnp.dot(flat, kernel, precision="highest"))
    return features.Outputs(*jnp.split(read, [WIDTH, WIDTH + NUM_CLASSES], axis=1))


def make(pixels=4 * 4 * 3):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((pixels, WIDTH + NUM_CLASSES + SPATIAL)) / np.sqrt(pixels)
    return Network(jnp.asarray(kernel, jnp.float32))


def images(count, seed=0, size=4, high=256):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, high, (count, size, size, 3), dtype=np.uint8)
    return image, rng.integers(NUM_CLASSES, size=count).astype(np.int32)
