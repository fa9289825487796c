"""The features of FID: Inception-v3 as the published evaluators run it.

Images of any size come in; 2,048 features, 1,008 logits and 2,023 spatial features go out. Two ways
of bringing an image to 299x299 pixels are in use, and their numbers differ:

- "tf": TensorFlow 1's bilinear resize, whose pixels lie on their upper left corners, then
  (x - 128) / 128. Of the TTUR code of FID's authors, ADM's evaluator and torch-fidelity.
- "pytorch_fid": x / 255, a bilinear resize whose pixels lie in their middle, then 2 x - 1.

Neither averages over the pixels that it leaves out of an image larger than 299.

Sources: Heusel et al. (2017); openai/guided-diffusion `evaluations/evaluator.py`; toshas/
torch-fidelity `interpolate_compat_tensorflow.py`; mseitzer/pytorch-fid `src/pytorch_fid/
inception.py`. That ADM's spatial features, `mixed_6/conv:0`, are the 1x1 branch of Mixed_6d is told
by that name and their number, 17 x 17 x 7.
"""

import functools
from typing import Any, Literal, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Shaped

from arcond_jax import checkpoint, types
from arcond_jax.evaluation import features
from arcond_jax.nn import inception as network_lib

FOLDER = "extractor"  # in that of the converted weights
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
PREPROCESSINGS = ("tf", "pytorch_fid")
CPU_ROWS = 8  # images at a time
SHOWN = 12  # digits of a sha256 on a card

Preprocessing = Literal["tf", "pytorch_fid"]
Dtype = Literal["float32", "bfloat16"]


@flax.struct.dataclass
class Inception:
    """The network with its weights, as `features.Features`; a tree, to be placed on devices.

    Attributes:
      params: As `nn.inception.folded` leaves them.
      preprocessing: How images are brought to the network's size; `PREPROCESSINGS`.
      dtype: Of its arithmetic; sums, features and logits are float32.
      sha256: Of the file that its weights are from.
      published: Whether that is the file that everybody's FID is measured with.
    """

    params: types.Params
    preprocessing: Preprocessing = flax.struct.field(pytree_node=False)
    dtype: Dtype = flax.struct.field(pytree_node=False)
    sha256: str = flax.struct.field(pytree_node=False)
    published: bool = flax.struct.field(pytree_node=False)

    @property
    def description(self) -> str:
        """For the evaluation card."""
        of = "" if self.published else ", NOT the published ones"
        return (
            f"Inception-v3, weights {self.sha256[:SHOWN]}{of}, preprocessing {self.preprocessing}, "
            f"{self.dtype}"
        )

    @property
    def num_classes(self) -> int:
        """Classes of the logits; which of ImageNet's they are is not published."""
        return network_lib.NUM_CLASSES

    @property
    def batch_size(self) -> int:
        """Images that suit a device at a time; see `features.batch_size`."""
        return CPU_ROWS if jax.default_backend() == "cpu" else features.BATCH_SIZE

    def __call__(
        self, image: Shaped[np.ndarray | Array, "b height width channels"]
    ) -> features.Outputs:
        """Reads images; compiled once for each number of images.

        Args:
          image: uint8, or floats in [-1, 1], which are rounded to the nearest uint8 first; grey (1
            channel) or in colour (3). On a mesh its rows may be cut over devices, if the weights
            lie on all of them.

        Raises:
          ValueError: Another type, or another number of channels.
        """
        if image.dtype != np.uint8 and not jnp.issubdtype(image.dtype, jnp.floating):
            raise ValueError(f"Images must be uint8 or floats in [-1, 1], got {image.dtype}.")
        if image.shape[-1] not in (1, 3):
            raise ValueError(f"Images must have 1 or 3 channels, got shape {image.shape}.")
        prepared = prepare(image, preprocessing=self.preprocessing)
        rows = _rows(prepared)
        return features.Outputs(*outputs(self.params, prepared, dtype=self.dtype, rows=rows))


def load(
    folder: epath.PathLike,
    *,
    preprocessing: str = "tf",
    dtype: str = "float32",
    place: jax.sharding.Sharding | None = None,
) -> Inception:
    """Opens what `arcond convert --family inception` wrote, here or in a bucket.

    Args:
      preprocessing: One of `PREPROCESSINGS`.
      dtype: Of the arithmetic; one of `DTYPES`.
      place: Where the weights go: on every device of a mesh, to read images cut over it; None for
        the first device.

    Raises:
      ValueError: No such preprocessing or type.
      checkpoint.CheckpointError: No such weights there, or damaged ones.
    """
    if preprocessing not in PREPROCESSINGS:
        raise ValueError(f"Preprocessing {preprocessing!r} is not one of {PREPROCESSINGS}.")
    if dtype not in DTYPES:
        raise ValueError(f"Inception computes in {' or '.join(DTYPES)}, not in {dtype!r}.")
    folder = epath.Path(folder)
    if not (folder / FOLDER).is_dir():
        raise checkpoint.CheckpointError(
            f"{folder} holds no Inception weights: make them with `arcond convert --family "
            f"inception --source FILE --out {folder if not folder.is_file() else 'FOLDER'}`"
        )
    known = checkpoint.load_metadata(f"{folder}/{FOLDER}")
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract_params()
    )
    params = checkpoint.load_tree(f"{folder}/{FOLDER}", {"params": shapes})["params"]
    return Inception(
        params=jax.jit(network_lib.folded)(params),
        preprocessing=cast(Preprocessing, preprocessing),
        dtype=cast(Dtype, dtype),
        sha256=known["source_sha256"],
        published=known["published"],
    )


def save(folder: epath.PathLike, params: types.Params, metadata: dict[str, Any]) -> None:
    """Writes weights for `load`, whole or not at all.

    Args:
      metadata: JSON; `source_sha256` of the file they are from and whether it is the `published`.

    Raises:
      checkpoint.CheckpointError: There are some already, or they cannot be written.
    """
    checkpoint.save_tree(f"{folder}/{FOLDER}", {"params": params}, metadata)


@functools.cache
def abstract_params() -> types.Params:
    """Shapes of the weights."""
    image = jax.ShapeDtypeStruct((1, network_lib.SIZE, network_lib.SIZE, 3), jnp.float32)
    made = jax.eval_shape(network_lib.Inception().init, jax.random.key(0), image)
    return nn.unbox(made)["params"]


# Two programs, so that images of all sizes and both preprocessings share that of the network.
@functools.partial(jax.jit, static_argnames=("dtype", "rows"))
def outputs(
    params: types.Params,
    prepared: Float[Array, "b size size 3"],
    *,
    dtype: Dtype = "float32",
    rows: int | None = None,
) -> network_lib.Outputs:
    """What the network reads off images that are prepared.

    Args:
      rows: Images at a time, one lot after another; None for all at once.
    """

    def read(lot: Array) -> network_lib.Outputs:
        made = network_lib.Inception(DTYPES[dtype]).apply({"params": params}, lot)
        return cast(network_lib.Outputs, made)

    if rows is None or rows >= len(prepared):
        return read(prepared)
    count = len(prepared)
    filled = jnp.pad(prepared, ((0, -count % rows), (0, 0), (0, 0), (0, 0)))
    lots = jax.lax.map(read, filled.reshape(-1, rows, *prepared.shape[1:]))
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[:count], lots)


def _rows(prepared: Array) -> int | None:
    """`CPU_ROWS` on one CPU, where a call gets its memory anew and pages are slow to come."""
    is_traced = isinstance(prepared, jax.core.Tracer)  # pyright: ignore[reportAttributeAccessIssue]
    if is_traced or len(prepared.devices()) > 1:
        return None
    return CPU_ROWS if next(iter(prepared.devices())).platform == "cpu" else None


@functools.partial(jax.jit, static_argnames="preprocessing")
def prepare(
    image: Shaped[np.ndarray | Array, "b height width channels"], *, preprocessing: Preprocessing
) -> Float[Array, "b size size 3"]:
    """Images as the first layer takes them; of uint8, or of floats in [-1, 1]."""
    level = jnp.asarray(image, jnp.float32)
    if image.dtype != jnp.uint8:
        level = jnp.clip(jnp.round((level + 1.0) * 127.5), 0.0, 255.0)
    level = jnp.broadcast_to(level, (*level.shape[:-1], 3))
    if preprocessing == "tf":
        return (_resized(level, middle=0.0) - 128.0) / 128.0
    return 2.0 * _resized(level / 255.0, middle=0.5) - 1.0


def _resized(
    image: Float[Array, "b height width 3"], *, middle: float
) -> Float[Array, "b size size 3"]:
    """Bilinear; the place of a pixel in it is `middle`, 0 for its corner."""
    for axis in (2, 1):  # rows first, as both sources
        image = _resized_along(image, axis, np.float32(middle))
    return image


def _resized_along(image: Array, axis: int, middle: np.float32) -> Array:
    size = image.shape[axis]
    if size == network_lib.SIZE:
        return image
    scale = np.float32(size / network_lib.SIZE)
    at = (np.arange(network_lib.SIZE, dtype=np.float32) + middle) * scale - middle
    at = np.maximum(at, np.float32(0.0))
    low = at.astype(np.int32)
    weight = np.expand_dims(at - low, [i for i in range(4) if i != axis])
    first, second = (jnp.take(image, i, axis=axis) for i in (low, np.minimum(low + 1, size - 1)))
    return first + (second - first) * weight
