"""Inception-v3 as FID measures by it: images of 299x299 pixels in, features and logits out.

Names, and channels of each layer, are those of torchvision's `Inception3`, as the published weights
have them. What differs is of TensorFlow's graph of 2015-12-05: averages leave padding out, the last
block takes a maximum where the paper has an average, and there are 1,008 classes.

Batch normalisations are folded into the convolutions before them. Maps of 1x1 that read the same
input are one product, and that after an average is taken before it, where channels are fewer;
neither changes more than a rounding.

Sources: Szegedy et al. (2015), Rethinking the Inception Architecture; mseitzer/pytorch-fid
`src/pytorch_fid/inception.py`; toshas/torch-fidelity `feature_extractor_inceptionv3.py`.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float

from arcond_jax.nn import parameter

SIZE = 299  # pixels a side
NUM_CLASSES = 1008
EPSILON = 1e-3  # of every batch normalisation
NUM_SPATIAL = 7  # channels of 17x17 positions that sFID takes (Nash et al., 2021, section 4)
kernel_init = nn.initializers.lecun_normal()

Size = tuple[int, int]
POINT: Size = (1, 1)
ROW, COLUMN = (1, 7), (7, 1)
SHORT_ROW, SHORT_COLUMN = (1, 3), (3, 1)
SQUARE, LARGE_SQUARE = (3, 3), (5, 5)

Maps = Float[Array, "b height width c"]
NewMaps = Float[Array, "b rows columns d"]  # of another size or width


class Outputs(NamedTuple):
    """What the network reads off images, float32.

    Attributes:
      features: Means over positions of the last block.
      logits: Without the bias of the last layer, as the Inception Score takes them.
      spatial: The first channels of the 1x1 branch of Mixed_6d, by row, column, channel.
    """

    features: Float[Array, "b features"]
    logits: Float[Array, "b classes"]
    spatial: Float[Array, "b spatial"]


class Unit(nn.Module):
    """Kernel and bias of a convolution and the batch normalisation after it.

    Its weights may also be given as `folded` leaves them.
    """

    features: int
    size: Size = POINT

    @nn.compact
    def __call__(self, channels: int) -> tuple[Float[Array, "m n c d"], Float[Array, " d"]]:
        shape = (*self.size, channels, self.features)
        kernel = parameter.parameter(self, "kernel", kernel_init, shape, (None,) * 4)
        bias = self._of_outputs("bias", parameter.zeros_init)
        if not self.is_initializing() and not self.has_variable("params", "scale"):
            return kernel, bias
        scale = self._of_outputs("scale", parameter.ones_init)
        mean = self._of_outputs("mean", parameter.zeros_init)
        variance = self._of_outputs("variance", parameter.ones_init)
        return _fold(kernel, bias, scale=scale, mean=mean, variance=variance)

    def _of_outputs(self, name: str, init: parameter.Initializer) -> Float[Array, " d"]:
        return parameter.parameter(self, name, init, (self.features,), (None,))


def _fold(
    kernel: Array, bias: Array, *, scale: Array, mean: Array, variance: Array
) -> tuple[Array, Array]:
    factor = scale * jax.lax.rsqrt(variance + EPSILON)
    return kernel * factor, bias - mean * factor


def folded(params: Mapping[str, Any]) -> dict[str, Any]:
    """The weights with batch normalisations folded into kernels, once for all calls."""
    made = {}
    for name, value in params.items():
        if not isinstance(value, Mapping):
            made[name] = value
        elif "variance" in value:
            made[name] = dict(zip(("kernel", "bias"), _fold(**value), strict=True))
        else:
            made[name] = folded(value)
    return made


class Block(nn.Module):
    """Convolution, batch normalisation and ReLU; arithmetic in `dtype`, sums in float32."""

    dtype: DTypeLike = jnp.float32

    def unit(
        self,
        x: Maps,
        name: str,
        features: int,
        size: Size = POINT,
        stride: int = 1,
        padding: str = "SAME",
    ) -> NewMaps:
        """One of them."""
        kernel, bias = Unit(features, size, name=name)(x.shape[-1])
        return self._active(self._convolved(x, kernel, stride, padding), bias)

    def units(
        self, x: Maps, features: dict[str, int], *, pooled: int | None = None
    ) -> list[Float[Array, "b height width _"]]:
        """Those of 1x1 that read the same input, by name.

        Args:
          pooled: Features of a `branch_pool` after the average around each position, which is last.
        """
        if pooled is not None:
            features = features | {"branch_pool": pooled}
        made = [Unit(d, name=name)(x.shape[-1]) for name, d in features.items()]
        y = self._convolved(x, jnp.concatenate([kernel for kernel, _ in made], axis=-1))
        parts = jnp.split(y, np.cumsum([*features.values()])[:-1], axis=-1)
        if pooled is not None:
            parts[-1] = average(parts[-1])
        return [self._active(part, bias) for part, (_, bias) in zip(parts, made, strict=True)]

    def _convolved(
        self, x: Maps, kernel: Array, stride: int = 1, padding: str = "VALID"
    ) -> NewMaps:
        kernel, float32 = kernel.astype(self.dtype), jnp.float32
        if kernel.shape[:2] == POINT:
            return jnp.dot(x, kernel[0, 0], precision="highest", preferred_element_type=float32)
        # With no padding at all, XLA's convolutions take up to four times as long on a CPU: a row
        # and a column more, which leave what is kept as it is.
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            padding if padding == "SAME" else [(0, 1), (0, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
            preferred_element_type=float32,
        )
        if padding == "SAME":
            return y
        rows, columns = ((x.shape[i] - kernel.shape[i - 1]) // stride + 1 for i in (1, 2))
        return y[:, :rows, :columns]

    def _active(self, x: Maps, bias: Float[Array, " c"]) -> Maps:
        return jax.nn.relu(x + bias).astype(self.dtype)


class A(Block):
    """35x35 positions: branches of 1x1, 5x5 and 3x3 twice."""

    pooled: int = 64

    @nn.compact
    def __call__(self, x: Maps) -> NewMaps:
        widths = {"branch1x1": 64, "branch5x5_1": 48, "branch3x3dbl_1": 64}
        one, five, double, pool = self.units(x, widths, pooled=self.pooled)
        five = self.unit(five, "branch5x5_2", 64, LARGE_SQUARE)
        double = self.unit(double, "branch3x3dbl_2", 96, SQUARE)
        double = self.unit(double, "branch3x3dbl_3", 96, SQUARE)
        return jnp.concatenate([one, five, double, pool], axis=-1)


class B(Block):
    """35x35 to 17x17 positions."""

    @nn.compact
    def __call__(self, x: Maps) -> NewMaps:
        three = self.unit(x, "branch3x3", 384, SQUARE, 2, "VALID")
        double = self.unit(x, "branch3x3dbl_1", 64)
        double = self.unit(double, "branch3x3dbl_2", 96, SQUARE)
        double = self.unit(double, "branch3x3dbl_3", 96, SQUARE, 2, "VALID")
        return jnp.concatenate([three, double, halved(x)], axis=-1)


class C(Block):
    """17x17 positions: branches of 1x1, and of 7x7 once and twice, as rows and columns."""

    width: int = 192

    @nn.compact
    def __call__(self, x: Maps) -> NewMaps:
        widths = {"branch1x1": 192, "branch7x7_1": self.width, "branch7x7dbl_1": self.width}
        one, seven, double, pool = self.units(x, widths, pooled=192)
        seven = self.unit(seven, "branch7x7_2", self.width, ROW)
        seven = self.unit(seven, "branch7x7_3", 192, COLUMN)
        double = self.unit(double, "branch7x7dbl_2", self.width, COLUMN)
        double = self.unit(double, "branch7x7dbl_3", self.width, ROW)
        double = self.unit(double, "branch7x7dbl_4", self.width, COLUMN)
        double = self.unit(double, "branch7x7dbl_5", 192, ROW)
        return jnp.concatenate([one, seven, double, pool], axis=-1)


class D(Block):
    """17x17 to 8x8 positions."""

    @nn.compact
    def __call__(self, x: Maps) -> NewMaps:
        three, seven = self.units(x, {"branch3x3_1": 192, "branch7x7x3_1": 192})
        three = self.unit(three, "branch3x3_2", 320, SQUARE, 2, "VALID")
        seven = self.unit(seven, "branch7x7x3_2", 192, ROW)
        seven = self.unit(seven, "branch7x7x3_3", 192, COLUMN)
        seven = self.unit(seven, "branch7x7x3_4", 192, SQUARE, 2, "VALID")
        return jnp.concatenate([three, seven, halved(x)], axis=-1)


class E(Block):
    """8x8 positions: branches of 1x1, and of 3x3 once and twice, that fork into row and column."""

    maximum: bool = False  # around each position, in the place of the average

    @nn.compact
    def __call__(self, x: Maps) -> NewMaps:
        widths = {"branch1x1": 320, "branch3x3_1": 384, "branch3x3dbl_1": 448}
        if self.maximum:
            one, three, double = self.units(x, widths)
            around = nn.max_pool(x, SQUARE, (1, 1), "SAME")
            pool = self.unit(around, "branch_pool", 192)
        else:
            one, three, double, pool = self.units(x, widths, pooled=192)
        double = self.unit(double, "branch3x3dbl_2", 384, SQUARE)
        branches = [
            one,
            self.unit(three, "branch3x3_2a", 384, SHORT_ROW),
            self.unit(three, "branch3x3_2b", 384, SHORT_COLUMN),
            self.unit(double, "branch3x3dbl_3a", 384, SHORT_ROW),
            self.unit(double, "branch3x3dbl_3b", 384, SHORT_COLUMN),
            pool,
        ]
        return jnp.concatenate(branches, axis=-1)


class Inception(Block):
    """The whole network, for images that are prepared as its first layer takes them."""

    @nn.compact
    def __call__(self, image: Float[Array, "b height width 3"]) -> Outputs:
        x = image.astype(self.dtype)
        x = self.unit(x, "Conv2d_1a_3x3", 32, SQUARE, 2, "VALID")
        x = self.unit(x, "Conv2d_2a_3x3", 32, SQUARE, 1, "VALID")
        x = halved(self.unit(x, "Conv2d_2b_3x3", 64, SQUARE))
        x = self.unit(x, "Conv2d_3b_1x1", 80)
        x = halved(self.unit(x, "Conv2d_4a_3x3", 192, SQUARE, 1, "VALID"))
        for name, pooled in {"Mixed_5b": 32, "Mixed_5c": 64, "Mixed_5d": 64}.items():
            x = A(self.dtype, pooled, name=name)(x)
        x = B(self.dtype, name="Mixed_6a")(x)
        for name, width in {"Mixed_6b": 128, "Mixed_6c": 160, "Mixed_6d": 160}.items():
            x = C(self.dtype, width, name=name)(x)
        spatial = x[..., :NUM_SPATIAL].reshape(len(x), -1)
        x = C(self.dtype, 192, name="Mixed_6e")(x)
        x = D(self.dtype, name="Mixed_7a")(x)
        x = E(self.dtype, name="Mixed_7b")(x)
        x = E(self.dtype, True, name="Mixed_7c")(x)
        features = x.astype(jnp.float32).mean(axis=(1, 2))
        return Outputs(features, Logits(name="fc")(features), spatial.astype(jnp.float32))


class Logits(nn.Module):
    """The last layer; its bias is kept with the weights and not added."""

    @nn.compact
    def __call__(self, features: Float[Array, "b d"]) -> Float[Array, "b classes"]:
        shape = (features.shape[-1], NUM_CLASSES)
        kernel = parameter.parameter(self, "kernel", kernel_init, shape, (None, None))
        parameter.parameter(self, "bias", parameter.zeros_init, (NUM_CLASSES,), (None,))
        return jnp.dot(features, kernel, precision="highest")


# By slices, which on a CPU take a third of the time of a window that is reduced.


def average(x: Maps) -> Maps:
    """Mean of the 3x3 square around each position, of what is inside the image."""
    for axis in (1, 2):
        size = x.shape[axis]
        edges = [(int(i == axis),) * 2 for i in range(x.ndim)]
        first, second, third = _slices(jnp.pad(x, edges), axis, size, 1)
        inside = np.full(size, 3, x.dtype)
        inside[[0, -1]] = 2
        x = (first + second + third) / np.expand_dims(inside, [i for i in range(4) if i != axis])
    return x


def halved(x: Maps) -> NewMaps:
    """Maximum of every other 3x3 square."""
    for axis in (1, 2):
        x = functools.reduce(jnp.maximum, _slices(x, axis, (x.shape[axis] - 1) // 2, 2))
    return x


def _slices(x: Array, axis: int, count: int, stride: int) -> list[Array]:
    """The first, second and third of `count` triples that are `stride` apart."""
    end = stride * (count - 1) + 1
    return [jax.lax.slice_in_dim(x, i, i + end, stride, axis) for i in range(3)]
