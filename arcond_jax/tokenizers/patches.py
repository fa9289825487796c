"""Raw pixel patches as tokens: standardised latents, and k-means codes on the same grid if wanted.

Nothing is trained.

An image is cut into patch_size x patch_size squares in raster order. The c = patch_size^2 *
channels numbers of a square are its latent, ordered by row, then column, then channel. The code is
the nearest of v centroids, as in "color" tokens of Chen et al., Image GPT (2020), section 3.1, but
for whole patches. Latents lose nothing; codes alone give back the centroid.
"""

from typing import Any, no_type_check

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from arcond_jax import types

NUM_RESTARTS = 4  # of k-means; the best inertia is kept
MIN_STD = 1e-6  # a channel that never changes is only centred
COVARIANCE_JITTER = 1e-6  # of standardised latents: keeps the Cholesky factor of small codes finite


@no_type_check  # as a tree it also holds shapes or shardings where the arrays are
@flax.struct.dataclass
class Patches:
    """The fitted tokenizer, a pytree that is saved with the weights.

    `codebook` holds the k-means centroids; `code_mean` and `code_cholesky` the Gaussian of the
    training latents of each code (covariance = Cholesky times its transpose). All three are in
    standardised units, and None where there are no codes.
    """

    mean: Float[Array, " c"]
    std: Float[Array, " c"]
    codebook: Float[Array, "v c"] | None
    code_mean: Float[Array, "v c"] | None
    code_cholesky: Float[Array, "v c c"] | None
    patch_size: int = flax.struct.field(pytree_node=False)
    image_shape: tuple[int, int, int] = flax.struct.field(pytree_node=False)

    @property
    def code_law(self) -> types.CodeLaw | None:
        """The Gaussian of the training latents behind each code."""
        if self.code_mean is None or self.code_cholesky is None:
            return None
        return types.CodeLaw(mean=self.code_mean, cholesky=self.code_cholesky)

    def encode(
        self, image: Float[Array, "b height width channels"], rng: Key[Array, ""] | None = None
    ) -> types.Tokens:
        """Cuts into latents and looks up the nearest centroid; of equal ones the lowest id.

        Nothing is drawn, so `rng` is not looked at.
        """
        return self.tokens(self.store(image), rng)

    def store(self, image: Float[Array, "b height width channels"]) -> types.Stored:
        """The tokens, as `encode` gives them."""
        if image.shape[1:] != self.image_shape:
            raise ValueError(
                f"This tokenizer was fitted to images of shape {self.image_shape}, got"
                f" {image.shape[1:]}: fit one to this dataset."
            )
        latents = (_cut(image, self.patch_size) - self.mean) / self.std
        codes = None if self.codebook is None else _nearest(latents, self.codebook)
        return types.Stored(latents=latents, codes=codes)

    def tokens(self, stored: types.Stored, rng: Key[Array, ""] | None = None) -> types.Tokens:
        """What is stored, in full precision."""
        del rng
        if stored.latents is None or (stored.codes is None) != (self.codebook is None):
            raise ValueError("Other kinds of token are stored: store images with this tokenizer.")
        codes = None if stored.codes is None else jnp.asarray(stored.codes, jnp.int32)
        return types.Tokens(latents=jnp.asarray(stored.latents, jnp.float32), codes=codes)

    def decode(self, tokens: types.Tokens) -> Float[Array, "b height width channels"]:
        """Pastes latents where there are any, else the centroids of the codes.

        A code of v or more shows as NaN.
        """
        latents = tokens.latents
        if latents is None:
            if tokens.codes is None or self.codebook is None:
                raise ValueError("Tokens hold no latents, and no codes of this tokenizer.")
            latents = jnp.take(self.codebook, tokens.codes, axis=0, mode="fill")
        return _paste(latents * self.std + self.mean, self.patch_size, self.image_shape)


def fit(
    image: Float[np.ndarray | Array, "n height width channels"],
    *,
    patch_size: int,
    num_codes: int | None,
    seed: int,
) -> Patches:
    """Measures one mean and deviation per channel of the patch, then clusters the latents.

    Args:
      image: The training images, in [-1, 1]; all patches of all of them are clustered at once in
        float64, about 100 bytes times c each.
      patch_size: Edge of a square, in pixels; divides height and width.
      num_codes: Size of the codebook, at most the number of different patches; None for no codes.
      seed: Of the k-means initialisation.

    Raises:
      ValueError: For sizes that do not divide, or more codes than different patches.
    """
    _, height, width, channels = image.shape
    image_shape = (height, width, channels)
    _check_divides(image_shape, patch_size)
    patches = _cut(np.asarray(image, np.float64), patch_size)
    patches = patches.reshape(-1, patches.shape[-1])
    num_distinct = len(np.unique(patches, axis=0)) if num_codes is not None else 0
    if num_codes is not None and num_codes > num_distinct:
        raise ValueError(
            f"num_codes {num_codes} is more than the {num_distinct} different patches of these"
            f" images: use at most {num_distinct}."
        )
    mean, std = patches.mean(axis=0), patches.std(axis=0)
    std = np.where(std > MIN_STD, std, 1.0)
    clusters = (None, None, None)
    if num_codes is not None:
        clusters = _clusters((patches - mean) / std, num_codes, seed=seed)
    leaves: Any = [
        None if x is None else jnp.asarray(x, jnp.float32) for x in (mean, std, *clusters)
    ]
    return Patches(*leaves, patch_size=patch_size, image_shape=image_shape)


def _clusters(
    latents: Float[np.ndarray, "n c"], num_codes: int, *, seed: int
) -> tuple[Float[np.ndarray, "v c"], Float[np.ndarray, "v c"], Float[np.ndarray, "v c c"]]:
    """Centroids, and the mean and Cholesky factor of the latents nearest to each."""
    import sklearn.cluster  # takes a second, and a fitted tokenizer does not need it

    kmeans = sklearn.cluster.KMeans(
        num_codes,
        n_init=NUM_RESTARTS,  # pyright: ignore[reportArgumentType]  # untyped; inferred as str
        random_state=seed,
    ).fit(latents)
    width = latents.shape[1]
    code_mean, code_cholesky = np.zeros((num_codes, width)), np.zeros((num_codes, width, width))
    for code in range(num_codes):
        members = latents[kmeans.labels_ == code]
        code_mean[code] = members.mean(axis=0)
        centred = members - code_mean[code]
        covariance = centred.T @ centred / len(members)
        code_cholesky[code] = np.linalg.cholesky(covariance + COVARIANCE_JITTER * np.eye(width))
    return kmeans.cluster_centers_, code_mean, code_cholesky


def abstract(
    image_shape: tuple[int, int, int], *, patch_size: int, num_codes: int | None
) -> Patches:
    """The shapes of a fitted tokenizer, without data: what a checkpoint is restored into."""
    _check_divides(image_shape, patch_size)
    width = patch_size**2 * image_shape[2]

    shapes: list[tuple[int, ...] | None] = [(width,), (width,), None, None, None]
    if num_codes is not None:
        shapes[2:] = (num_codes, width), (num_codes, width), (num_codes, width, width)
    leaves: Any = [None if x is None else jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes]
    return Patches(*leaves, patch_size=patch_size, image_shape=image_shape)


def _check_divides(image_shape: tuple[int, ...], patch_size: int) -> None:
    height, width, _ = image_shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size {patch_size} does not divide images of {height}x{width}:"
            " use a common divisor."
        )


def _cut(image, patch_size: int):
    """[b, height, width, channels] to [b, l, c], for numpy and JAX arrays alike."""
    b, height, width, channels = image.shape
    rows, columns = height // patch_size, width // patch_size
    squares = image.reshape(b, rows, patch_size, columns, patch_size, channels)
    return squares.swapaxes(2, 3).reshape(b, rows * columns, patch_size**2 * channels)


def _paste(
    patches: Float[Array, "b l c"], patch_size: int, image_shape: tuple[int, int, int]
) -> Float[Array, "b height width channels"]:
    height, width, channels = image_shape
    rows, columns = height // patch_size, width // patch_size
    squares = patches.reshape(-1, rows, columns, patch_size, patch_size, channels)
    return squares.swapaxes(2, 3).reshape(-1, height, width, channels)


def _nearest(latents: Float[Array, "b l c"], codebook: Float[Array, "v c"]) -> Int[Array, "b l"]:
    # |x - y|^2 without |x|^2, which is the same for every code.
    products = jnp.einsum("blc,vc->blv", latents, codebook, precision="highest")
    return jnp.argmin(jnp.sum(codebook**2, axis=-1) - 2 * products, axis=-1)
