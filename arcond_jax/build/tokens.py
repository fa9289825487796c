"""Tokenizers, and the grid of tokens they make.

Each kind says what its section of a config holds, what tokens it gives, and how it is made.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from arcond_jax import checkpoint, digest, types
from arcond_jax.build import data, keys
from arcond_jax.build import official as official_lib
from arcond_jax.config import Config, ConfigError
from arcond_jax.convert import kl16, vq16
from arcond_jax.convert import lfq as lfq_table
from arcond_jax.convert import maskgit_vq as maskgit_vq_table
from arcond_jax.data import images, pipeline, records, stored
from arcond_jax.tokenizers import kl, lfq, maskgit_vq, patches, vq
from arcond_jax.tokenizers import network as network_lib

WEIGHTS = "weights"  # within a folder of converted weights
FITTED = "tokenizer"  # within a cache, a tokenizer that was fitted to its images
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MAX_PATCHES = 65_536  # to cluster, of images spread over the split


def _fitted(config: Config) -> patches.Patches:
    section = config.tokenizer
    return patches.abstract(
        data.image_shape(config),
        patch_size=section.patch_size,
        num_codes=section.get("num_codes"),
    )


def _kl(config: Config) -> kl.KL:
    return kl.abstract(
        tokenizer_network(config),
        image_size=data.image_shape(config)[:2],
        latent_scale=config.tokenizer.latent_scale,
        patch_size=config.tokenizer.patch_size,
    )


def _coded(config: Config) -> network_lib.Coded:
    network = tokenizer_network(config)
    return network_lib.abstract(network, image_size=data.image_shape(config)[:2])


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """One kind of tokenizer.

    Attributes:
      section: Settings besides its name.
      gives: Kinds of token, of "latents" and "codes".
      abstract: Its shapes, for a config.
      network: The Linen module of one that is read from weights; None for one that is fitted.
      codebook: From the tokenizer itself, the vectors of its codes, centred where they have a
        common direction; None where there is no table, codes being signs.
      official: Its official weights.
    """

    section: keys.Section
    gives: tuple[str, ...]
    abstract: Callable[[Config], Any]
    network: Callable[..., Any] | None = None
    codebook: Callable[[Any], Float[Array, "v c"]] | None = None
    official: official_lib.Official | None = None


def _centred(fitted: patches.Patches) -> Float[Array, "v c"]:
    """Raw pixels share a direction, brightness, that would hide all others in a cosine."""
    assert fitted.codebook is not None
    return fitted.codebook - fitted.codebook.mean(axis=0)


def _quantiser(tokenizer: network_lib.Coded) -> Float[Array, "v c"]:
    return tokenizer.params["codebook"]["table"]


PATCH = {"patch_size": keys.integer(2)}
NUM_CODES = {"num_codes": keys.integer(64)}
LEVELS = {
    "path": keys.text(None, optional=True),  # folder of converted weights
    "width": keys.integer(128),
    "multipliers": keys.sizes((1, 1, 2, 2, 4)),
    "num_blocks": keys.integer(2),
}
TOKENIZERS: Mapping[str, Tokenizer] = {
    "pixels": Tokenizer(PATCH, ("latents",), _fitted),
    "patches": Tokenizer(PATCH | NUM_CODES, ("latents", "codes"), _fitted, codebook=_centred),
    "kl": Tokenizer(
        LEVELS
        | {
            "patch_size": keys.integer(1),
            "latent_channels": keys.integer(16),
            "latent_scale": keys.positive(kl.LATENT_SCALE),
        },
        ("latents",),
        _kl,
        kl.KLAutoencoder,
        official=official_lib.Official(
            "kl16", ("tokenizers:kl16",), kl16.rows, container=("model",), ignored=kl16.IGNORED
        ),
    ),
    "vq": Tokenizer(
        LEVELS
        | {
            "latent_channels": keys.integer(256),
            "num_codes": keys.integer(16384),
            "code_width": keys.integer(8),
        },
        ("codes",),
        _coded,
        vq.VQAutoencoder,
        _quantiser,
        official=official_lib.Official(
            "vq",
            ("tokenizers:vq16", "tokenizers:vq8"),
            vq16.rows,
            container=("model",),
            ignored=vq16.IGNORED,
        ),
    ),
    "maskgit_vq": Tokenizer(
        LEVELS | {"num_codes": keys.integer(1024), "code_width": keys.integer(256)},
        ("codes",),
        _coded,
        maskgit_vq.MaskGITAutoencoder,
        _quantiser,
        official=official_lib.Official(
            "maskgit_vq", ("tokenizers:maskgit_vq",), maskgit_vq_table.rows
        ),
    ),
    "lfq": Tokenizer(
        LEVELS | {"num_blocks": keys.integer(4), "num_bits": keys.integer(18, high=31)},
        ("codes",),
        _coded,
        lfq.LFQAutoencoder,
        official=official_lib.Official(
            "lfq",
            ("tokenizers:lfq256", "tokenizers:lfq128"),
            lfq_table.rows,
            container=("state_dict",),
            ignored=lfq_table.IGNORED,
            averaged=lfq_table.averaged,
        ),
    ),
}
# Settings that are not the network's.
APART = ("name", "path", "patch_size", "latent_scale")


def kind_of(config: Config) -> Tokenizer:
    """The record of the config's tokenizer."""
    return TOKENIZERS[config.tokenizer.name]


def grid(config: Config) -> tuple[int, int]:
    """Rows and columns of tokens.

    Raises:
      ConfigError: Images of this size cannot be cut into tokens.
    """
    edge = config.tokenizer.get("patch_size", 1)
    if kind_of(config).network is not None:
        edge *= tokenizer_network(config).design.stride
    side = config.data.image_size
    if side % edge:
        raise ConfigError(f"data.image_size {side} is not divisible by {edge}, the edge of a token")
    return side // edge, side // edge


def num_codes(config: Config) -> int:
    """Size of the codebook."""
    if kind_of(config).network is None:
        return config.tokenizer.num_codes
    return tokenizer_network(config).num_codes


def token_channels(config: Config) -> int:
    """Numbers in a latent."""
    channels = config.tokenizer.get("latent_channels", config.data.num_channels)
    return channels * config.tokenizer.patch_size**2


def tokenizer_network(config: Config) -> Any:
    """The Linen module of a tokenizer that is read from weights."""
    make, section = kind_of(config).network, config.tokenizer
    assert make is not None
    sizes = {name: value for name, value in section.items() if name not in APART}
    sizes["multipliers"] = tuple(sizes["multipliers"])
    return make(dtype=DTYPES[config.training.dtype], **sizes)


def tokenizer(config: Config, split: pipeline.Source | None = None) -> types.Tokenizer:
    """The tokenizer, fitted to the training split or read from weights or from a cache.

    Args:
      split: To fit it to; None for that of the config.

    Raises:
      ConfigError: No weights are named.
      checkpoint.CheckpointError: They cannot be read, or are of another model.
    """
    if kind_of(config).network is None:
        if split is None and config.data.name == "cache":
            return fitted_in(data.directory(config), config)
        split = split or data.source(config, "train")
        num_images = min(len(split), -(-MAX_PATCHES // int(np.prod(grid(config)))))
        chosen = np.linspace(0, len(split) - 1, num_images)
        return patches.fit(
            images.as_float(np.stack([split[int(i)]["image"] for i in chosen])),
            patch_size=config.tokenizer.patch_size,
            num_codes=config.tokenizer.get("num_codes"),
            seed=config.seed,
        )
    if config.tokenizer.path is None:
        raise ConfigError(
            "tokenizer.path is not set: give the folder that `arcond convert` made of the "
            f"tokenizer {config.tokenizer.name}"
        )
    abstract = abstract_tokenizer(config)
    return dataclasses.replace(
        abstract, params=load_weights(config.tokenizer.path, abstract.params)
    )


def abstract_tokenizer(config: Config) -> Any:
    """Shapes of the tokenizer, to restore a fitted or a converted one into."""
    return kind_of(config).abstract(config)


def fitted_in(cache: pathlib.Path, config: Config) -> types.Tokenizer:
    """The tokenizer that was fitted to the images of a cache, and is kept in it.

    Raises:
      checkpoint.CheckpointError: It cannot be read, or has other sizes.
    """
    return checkpoint.load_tree(str(cache / FITTED), abstract_tokenizer(config))


def sha256(made: types.Tokenizer) -> str:
    """A digest of a tokenizer's parameters."""
    return digest.of_json(digest.of_tree(made))


def described(config: Config, made: types.Tokenizer) -> dict[str, Any]:
    """What a cache says of its tokenizer: its kind and sizes, and a digest of its parameters."""
    # Moments are kept before they are cut into tokens and scaled.
    apart = APART if config.tokenizer.name == "kl" else ("name", "path")
    return {
        "name": config.tokenizer.name,
        "sha256": sha256(made),
        "dtype": config.training.dtype,
        "network": {name: x for name, x in config.tokenizer.to_dict().items() if name not in apart},
    }


def check_cache(config: Config, made: types.Tokenizer) -> None:
    """Raises ConfigError if the config trains on a cache that another tokenizer made."""
    if config.data.name != "cache":
        return
    directory = data.directory(config)
    found = records.read_manifest(directory, kind=stored.KIND)["tokenizer"]["sha256"]
    ours = described(config, made)["sha256"]
    if found != ours:
        raise ConfigError(
            f"{directory} was encoded by a tokenizer with parameters {found[:12]}, those of this "
            f"run are {ours[:12]}: name the same tokenizer, or encode anew by `arcond encode`"
        )


def load_weights(directory: str, abstract: types.Params) -> types.Params:
    """Parameters that `arcond convert` wrote, on every device.

    Raises:
      checkpoint.CheckpointError: None there, damaged, not finite, or of another model.
    """
    params = checkpoint.load_tree(f"{directory}/{WEIGHTS}", {"params": abstract})["params"]
    check_finite(params, directory)
    return params


@jax.jit
def _finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def check_finite(params: types.Params, where: str) -> None:
    """Weights with a NaN would draw the same picture for every image, without an error.

    Args:
      params: Any tree of arrays, in any places.
      where: They were read from, for the message.

    Raises:
      checkpoint.CheckpointError: One is not finite; names the first.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    finite = jax.device_get(_finite([leaf for _, leaf in leaves]))
    broken = [path for (path, _), ok in zip(leaves, finite, strict=True) if not ok]
    if broken:
        name = jax.tree_util.keystr(broken[0], simple=True, separator="/")
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise checkpoint.CheckpointError(
            f"{where} holds weights that are not finite, in {name}{more}: the training diverged, "
            "or the weights were damaged before they were converted; take others"
        )


def tokens_of(
    tokenizer: types.Tokenizer, batch: types.Batch, rng: Key[Array, ""] | None = None
) -> types.Tokens:
    """The tokens of a batch, of images or of what is stored of them, on the device.

    Where the tokenizer has a distribution of them they are drawn, or its mode without `rng`.
    """
    if batch.stored is not None:
        return tokenizer.tokens(batch.stored, rng)
    assert batch.image is not None
    return tokenizer.encode(images.as_float(batch.image), rng)
