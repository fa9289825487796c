"""A small classifier of small images, trained in seconds, whose features carry the metrics.

Images come in as float32 in [-1, 1], NHWC, and are averaged to at most 32 pixels a side; features
(32 tanh units) and logits go out. It stands where Inception stands for ImageNet: a Frechet distance
of its features is comparable only with others of the same trained classifier.
"""

import functools
import os
from typing import Any, cast

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, Shaped

from arcond_jax import types
from arcond_jax.data import images
from arcond_jax.evaluation import features, npz

HIDDEN_WIDTH = 128
NUM_FEATURES = 32
BATCH_SIZE = 128
# Chosen on scikit-learn's digits by held-out accuracy; the optimum is flat.
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2
PIXEL_NOISE = 0.2  # standard deviation, where pixels span [-1, 1]
MAX_SHIFT = 1  # pixels, each way
MAX_SIZE = 2**16  # pixels a side and classes that a file may name


class Network(nn.Module):
    """Pixels -> 128 GELU -> 32 tanh features -> logits; the tanh keeps every feature bounded."""

    num_classes: int

    @nn.compact
    def __call__(
        self, image: Float[Array, "b height width channels"]
    ) -> tuple[Float[Array, "b features"], Float[Array, "b classes"]]:
        """Returns features and logits."""
        dense = functools.partial(nn.Dense, precision="highest")
        hidden = nn.gelu(dense(HIDDEN_WIDTH, name="hidden")(image.reshape(image.shape[0], -1)))
        features = jnp.tanh(dense(NUM_FEATURES, name="features")(hidden))
        return features, dense(self.num_classes, name="logits")(features)


@flax.struct.dataclass
class Classifier:
    """A trained network, as `features.Features`.

    Attributes:
      image_shape, num_classes: Of what it was trained on after averaging.
      trained_on: That in words.
    """

    params: types.Params
    image_shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    num_classes: int = flax.struct.field(pytree_node=False)
    trained_on: str = flax.struct.field(pytree_node=False, default="the training images")

    @property
    def description(self) -> str:
        """For the evaluation card."""
        return f"a small classifier trained on {self.trained_on}"

    def __call__(
        self, image: Shaped[np.ndarray | Array, "b height width channels"]
    ) -> features.Outputs:
        """Activations of the last hidden layer, in (-1, 1), and logits.

        Args:
          image: uint8, or floats in [-1, 1].

        Raises:
          ValueError: The images are not of the trained shape, or do not become so.
        """
        image = images.shrink(images.as_float(image), max(features.SMALL, *self.image_shape[:2]))
        if image.shape[1:] != self.image_shape:
            raise ValueError(
                f"The classifier was trained on images of shape {self.image_shape}, "
                f"got {image.shape[1:]}."
            )
        return features.Outputs(
            *_apply(self.params, jnp.asarray(image), num_classes=self.num_classes)
        )

    def save(self, path: str | os.PathLike) -> None:
        """Writes an npz file; `load` reads it back bit for bit."""
        arrays = {
            f"params/{name}": np.asarray(value)
            for name, value in flax.traverse_util.flatten_dict(self.params, sep="/").items()
        }
        arrays["image_shape"] = np.asarray(self.image_shape)
        arrays["num_classes"] = np.asarray(self.num_classes)
        npz.write(path, arrays)


def load(path: str | os.PathLike) -> Classifier:
    """Reads a classifier; raises a one-line ValueError for a wrong or truncated file."""
    what = "classifier file"
    sizes = npz.read(path, "image_shape", "num_classes", what=what)
    where = f"{path}: num_classes"
    num_classes = npz.whole_number(sizes["num_classes"], where=where, at_least=1)
    image_shape = tuple(sizes["image_shape"].ravel().tolist())
    whole = all(type(size) is int and 0 < size <= MAX_SIZE for size in image_shape)
    if not whole or len(image_shape) != 3 or num_classes > MAX_SIZE:
        raise ValueError(
            f"{path} is not a {what}: image_shape {image_shape}, num_classes {num_classes}."
        )

    variables = jax.eval_shape(
        Network(num_classes).init, jax.random.key(0), jnp.zeros((1, *image_shape))
    )
    flat: dict[str, Any] = flax.traverse_util.flatten_dict(variables, sep="/")
    expected = {name: value.shape for name, value in flat.items()}
    arrays = npz.read(path, *expected, what=what)
    found = {name: value.shape for name, value in arrays.items()}
    if any(value.dtype != np.float32 or not np.isfinite(value).all() for value in arrays.values()):
        raise ValueError(f"{path} is not a {what}: its weights are not finite float32.")
    if found != expected:
        wrong = sorted(set(found.items()) ^ set(expected.items()))
        raise ValueError(f"{path} is not a {what} of this version: it differs in {wrong}.")
    params = {name.removeprefix("params/"): jnp.asarray(value) for name, value in arrays.items()}
    return Classifier(
        params=flax.traverse_util.unflatten_dict(params, sep="/"),
        image_shape=image_shape,
        num_classes=num_classes,
    )


def train_classifier(
    image: Float[np.ndarray | Array, "n height width channels"],
    label: Int[np.ndarray | Array, " labels"],
    *,
    num_classes: int,
    seed: int = 0,
    num_train_steps: int = 2000,
) -> Classifier:
    """Trains on the given images only; the same arguments give the same classifier.

    Adam with decoupled weight decay (Loshchilov and Hutter, 2019), cosine learning rate, batches
    drawn with replacement, each image shifted by up to one pixel and given pixel noise.

    Args:
      image: Training images in [-1, 1]; held-out images must not be among them.
      label: Class ids in [0, num_classes).
      num_classes: Number of classes.
      seed: Seed of the initial weights, the batches and the augmentation.
      num_train_steps: Updates, each on 128 images.

    Raises:
      ValueError: Images and labels differ in number, or a label is out of range.
    """
    if len(image) != len(label):
        raise ValueError(f"{len(image)} images came with {len(label)} labels.")
    if np.min(label) < 0 or np.max(label) >= num_classes:
        raise ValueError(
            f"Labels span {np.min(label)} to {np.max(label)}, outside [0, {num_classes})."
        )
    image = images.shrink(image, features.SMALL)
    params = _train(
        jnp.asarray(image),
        jnp.asarray(label),
        jax.random.key(seed),
        num_classes=num_classes,
        num_train_steps=num_train_steps,
    )
    return Classifier(params=params, image_shape=image.shape[1:], num_classes=num_classes)


def _outputs(network: Network, params: types.Params, image: Array) -> tuple[Array, Array]:
    return cast(tuple[Array, Array], network.apply({"params": params}, image))


@functools.partial(jax.jit, static_argnames="num_classes")
def _apply(params, image, *, num_classes):
    return _outputs(Network(num_classes), params, image)


@functools.partial(jax.jit, static_argnames=("num_classes", "num_train_steps"))
def _train(image, label, rng, *, num_classes, num_train_steps):
    network = Network(num_classes)
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(LEARNING_RATE, num_train_steps), weight_decay=WEIGHT_DECAY
    )

    def loss(params, batch_image, batch_label):
        _, logits = _outputs(network, params, batch_image)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch_label).mean()

    def update(carry, step_rng):
        params, optimizer_state = carry
        rows_rng, augment_rng = jax.random.split(step_rng)
        rows = jax.random.randint(rows_rng, (BATCH_SIZE,), 0, image.shape[0])
        gradient = jax.grad(loss)(params, _augment(image[rows], augment_rng), label[rows])
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), None

    init_rng, scan_rng = jax.random.split(rng)
    params = network.init(init_rng, image[:1])["params"]
    carry = (params, optimizer.init(params))
    (params, _), _ = jax.lax.scan(update, carry, jax.random.split(scan_rng, num_train_steps))
    return params


def _augment(
    image: Float[Array, "b height width channels"], rng: Key[Array, ""]
) -> Float[Array, "b height width channels"]:
    """Shifts each image by at most `MAX_SHIFT` pixels, repeating its edge, and adds noise."""
    shift_rng, noise_rng = jax.random.split(rng)
    margin = (MAX_SHIFT, MAX_SHIFT)
    padded = jnp.pad(image, ((0, 0), margin, margin, (0, 0)), mode="edge")
    offset = jax.random.randint(shift_rng, (image.shape[0], 2), 0, 2 * MAX_SHIFT + 1)

    def crop(one, corner):
        return jax.lax.dynamic_slice(one, (corner[0], corner[1], 0), image.shape[1:])

    shifted = jax.vmap(crop)(padded, offset)
    return shifted + PIXEL_NOISE * jax.random.normal(noise_rng, image.shape, image.dtype)
