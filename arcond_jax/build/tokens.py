"""Images, tokenizers, and the grid of tokens they make."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from arcond_jax import checkpoint, types
from arcond_jax.config import Config, ConfigError
from arcond_jax.data import digits, folder, pipeline
from arcond_jax.tokenizers import kl, lfq, maskgit_vq, patches, vq
from arcond_jax.tokenizers import network as network_lib

WEIGHTS = "weights"  # within a folder of converted weights
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SOURCES = ("digits", "folder")
CODE_NETWORKS = {
    "vq": vq.VQAutoencoder,
    "maskgit_vq": maskgit_vq.MaskGITAutoencoder,
    "lfq": lfq.LFQAutoencoder,
}
MAX_PATCHES = 65_536  # to cluster, of images spread over the split
TOKENIZERS = ("patches", "kl", *CODE_NETWORKS)


def source(config: Config, split: str) -> pipeline.Source:
    """Random access to a split ("train" or "held_out") of the config's dataset.

    Raises:
      ConfigError: There is no such dataset, or it is not what the config says.
    """
    data = config.data
    if data.name == "digits":
        made = digits.Digits(split)
    elif data.directory is None:
        raise ConfigError("data.directory is not set: give the folder that holds the images")
    else:
        made = folder.ImageFolder(data.directory, split, image_size=data.image_size)
    found = dict(num_classes=made.num_classes, image_shape=tuple(made.image_shape))
    wanted = dict(num_classes=data.num_classes, image_shape=image_shape(config))
    for name, value in wanted.items():
        if found[name] != value:
            raise ConfigError(
                f"the {split} split of {data.name} has {name} {found[name]}, the data section of "
                f"the config says {value}"
            )
    return made


def image_shape(config: Config) -> tuple[int, int, int]:
    """Height, width and channels of the images."""
    return config.data.image_size, config.data.image_size, config.data.num_channels


def grid(config: Config) -> tuple[int, int]:
    """Rows and columns of tokens.

    Raises:
      ConfigError: Images of this size cannot be cut into tokens.
    """
    edge = config.tokenizer.patch_size if has_latents(config) else 1
    if config.tokenizer.name != "patches":
        edge *= tokenizer_network(config).design.stride
    side = config.data.image_size
    if side % edge:
        raise ConfigError(f"data.image_size {side} is not divisible by {edge}, the edge of a token")
    return side // edge, side // edge


def has_codes(config: Config) -> bool:
    """Whether the tokenizer gives codes."""
    return config.tokenizer.name != "kl"


def has_latents(config: Config) -> bool:
    """Whether the tokenizer gives latents."""
    return config.tokenizer.name in ("patches", "kl")


def num_codes(config: Config) -> int:
    """Size of the codebook."""
    if config.tokenizer.name == "patches":
        return config.tokenizer.num_codes
    return tokenizer_network(config).num_codes


def token_channels(config: Config) -> int:
    """Numbers in a latent."""
    channels = config.data.num_channels
    if config.tokenizer.name == "kl":
        channels = config.kl.latent_channels
    return channels * config.tokenizer.patch_size**2


def tokenizer_network(
    config: Config,
) -> kl.KLAutoencoder | vq.VQAutoencoder | maskgit_vq.MaskGITAutoencoder | lfq.LFQAutoencoder:
    """The Linen module of a tokenizer that is read from weights."""
    name = config.tokenizer.name
    sizes = {key: value for key, value in config[name].items() if key != "latent_scale"}
    sizes["multipliers"] = tuple(sizes["multipliers"])
    dtype = DTYPES[config.training.dtype]
    if name in CODE_NETWORKS:
        return CODE_NETWORKS[name](dtype=dtype, **sizes)
    # Attention at the lowest resolution, as in KL-16.
    last = len(sizes["multipliers"]) - 1
    return kl.KLAutoencoder(attention_levels=(last,), dtype=dtype, **sizes)


def tokenizer(config: Config) -> types.Tokenizer:
    """The tokenizer: "patches" is fitted to the training split, the others read from weights.

    Raises:
      ConfigError: No weights are named.
      checkpoint.CheckpointError: They cannot be read, or are of another model.
    """
    if config.tokenizer.name == "patches":
        split = source(config, "train")
        num_images = min(len(split), -(-MAX_PATCHES // int(np.prod(grid(config)))))
        chosen = np.linspace(0, len(split) - 1, num_images)
        return patches.fit(
            np.stack([split[int(i)]["image"] for i in chosen]),
            patch_size=config.tokenizer.patch_size,
            num_codes=config.tokenizer.num_codes,
            seed=config.seed,
        )
    if config.tokenizer.path is None:
        raise ConfigError(
            "tokenizer.path is not set: give the folder that `arcond convert` made of the "
            f"tokenizer {config.tokenizer.name}"
        )
    abstract = abstract_trained(config)
    params = load_weights(config.tokenizer.path, abstract.params)
    return dataclasses.replace(abstract, params=params)


def abstract_tokenizer(config: Config) -> patches.Patches | kl.KL | network_lib.Coded:
    """Shapes of the tokenizer, to restore a fitted or a converted one into."""
    if config.tokenizer.name != "patches":
        return abstract_trained(config)
    return patches.abstract(
        image_shape(config),
        patch_size=config.tokenizer.patch_size,
        num_codes=config.tokenizer.num_codes,
    )


def abstract_trained(config: Config) -> kl.KL | network_lib.Coded:
    """Shapes of a tokenizer that is read from weights."""
    network, image_size = tokenizer_network(config), image_shape(config)[:2]
    if isinstance(network, kl.KLAutoencoder):
        return kl.abstract(
            network,
            image_size=image_size,
            latent_scale=config.kl.latent_scale,
            patch_size=config.tokenizer.patch_size,
        )
    return network_lib.abstract(network, image_size=image_size)


def load_weights(directory: str, abstract: types.Params) -> types.Params:
    """Parameters that `arcond convert` wrote, on every device.

    Raises:
      checkpoint.CheckpointError: None there, damaged, or of another model.
    """
    return checkpoint.load_tree(f"{directory}/{WEIGHTS}", {"params": abstract})["params"]
