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
from arcond_jax import config as config_lib
from arcond_jax.build import data, keys
from arcond_jax.build import official as official_lib
from arcond_jax.config import Config, ConfigError
from arcond_jax.convert import kl16, vq16
from arcond_jax.convert import lfq as lfq_table
from arcond_jax.convert import maskgit_vq as maskgit_vq_table
from arcond_jax.data import images, pipeline, records, stored
from arcond_jax.tokenizers import kl, lfq, maskgit_vq, paired, patches, vq
from arcond_jax.tokenizers import network as network_lib

WEIGHTS = "weights"  # within a folder of converted weights
FITTED = "tokenizer"  # within a cache, a tokenizer that was fitted to its images
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MAX_PATCHES = 65_536  # to cluster, of images spread over the split

Codebook = Float[Array | np.ndarray, "v c"]  # on the host where a program is only compiled


def _abstract_patches(config: Config) -> patches.Patches:
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
      network: The Linen module of one that is read from weights; None for one that is fitted, and
        for a pair.
      parts: Of a pair, which kind of tokenizer gives which kind of token, by names of `TOKENIZERS`;
        its settings begin with that name.
      codebook: From the tokenizer itself, the vectors of its codes, centred where they have a
        common direction; None where there is no table, codes being signs.
      official: Its official weights.
    """

    section: keys.Section
    gives: tuple[str, ...]
    abstract: Callable[[Config], Any]
    network: Callable[..., Any] | None = None
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    codebook: Callable[[Any], Codebook] | None = None
    official: official_lib.Official | None = None

    @property
    def fitted(self) -> bool:
        """Whether it is made from the training images, and not read from weights."""
        return self.network is None and not self.parts


def _centred(fitted: patches.Patches) -> Float[Array, "v c"]:
    """Raw pixels share a direction, brightness, that would hide all others in a cosine."""
    assert fitted.codebook is not None
    return fitted.codebook - fitted.codebook.mean(axis=0)


def _quantiser(tokenizer: network_lib.Coded) -> Codebook:
    return tokenizer.params["codebook"]["table"]


def _pair(config: Config) -> paired.Paired:
    grid(config)  # raises where they have no common one
    latents, codes = _kl(part(config, "latents")), _coded(part(config, "codes"))
    return paired.abstract(latents, codes, with_law=config.data.name == "cache")


PATCH = {"patch_size": keys.integer(2)}
NUM_CODES = {"num_codes": keys.integer(64)}
LEVELS = {
    "path": keys.text(None, optional=True),  # folder of converted weights
    "width": keys.integer(128),
    "multipliers": keys.sizes((1, 1, 2, 2, 4)),
    "num_blocks": keys.integer(2),
}
KL = LEVELS | {
    "patch_size": keys.integer(1),
    "latent_channels": keys.integer(16),
    "latent_scale": keys.positive(kl.LATENT_SCALE),
}
VQ = LEVELS | {
    "latent_channels": keys.integer(256),
    "num_codes": keys.integer(16384),
    "code_width": keys.integer(8),
}
TOKENIZERS: Mapping[str, Tokenizer] = {
    "pixels": Tokenizer(PATCH, ("latents",), _abstract_patches),
    "patches": Tokenizer(
        PATCH | NUM_CODES, ("latents", "codes"), _abstract_patches, codebook=_centred
    ),
    "kl": Tokenizer(
        KL,
        ("latents",),
        _kl,
        kl.KLAutoencoder,
        official=official_lib.Official(
            "kl16", ("tokenizers:kl16",), kl16.rows, container=("model",), ignored=kl16.IGNORED
        ),
    ),
    "vq": Tokenizer(
        VQ,
        ("codes",),
        _coded,
        vq.VQAutoencoder,
        codebook=_quantiser,
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
        codebook=_quantiser,
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
    "paired": Tokenizer(
        {f"kl_{name}": key for name, key in KL.items()}
        | {f"vq_{name}": key for name, key in VQ.items()},
        ("latents", "codes"),
        _pair,
        parts={"latents": "kl", "codes": "vq"},
        codebook=lambda pair: _quantiser(pair.codes),
    ),
}
# Settings that are not the network's.
APART = ("name", "path", "patch_size", "latent_scale")
# Those that a cache does not depend on: moments are kept before they are cut and scaled, but the
# Gaussians behind codes are of latents that are cut.
OF_A_CACHE = {
    "kl": APART,
    "paired": ("name", "kl_path", "kl_latent_scale", "vq_path"),
}


def kind_of(config: Config) -> Tokenizer:
    """The record of the config's tokenizer."""
    return TOKENIZERS[config.tokenizer.name]


def part(config: Config, gives: str) -> Config:
    """The config of the tokenizer that gives "latents" or "codes": of a pair, one alone."""
    name = kind_of(config).parts.get(gives)
    if name is None:
        return config
    prefix, alone = f"{name}_", config.copy_and_resolve_references()
    settings = {x: value for x, value in config.tokenizer.items() if x.startswith(prefix)}
    section = {"name": name} | {x.removeprefix(prefix): y for x, y in settings.items()}
    alone.tokenizer = config_lib.made_of(section)
    return alone


def grid(config: Config) -> tuple[int, int]:
    """Rows and columns of tokens.

    Raises:
      ConfigError: Images of this size cannot be cut into tokens, or into those of a pair alike.
    """
    if kind_of(config).parts:
        latents, codes = (grid(part(config, gives)) for gives in ("latents", "codes"))
        if latents != codes:
            ours, theirs = ("x".join(map(str, x)) for x in (latents, codes))
            raise ConfigError(
                f"tokenizer {config.tokenizer.name} needs one grid: the kl_ settings give {ours} "
                f"latents, the vq_ settings {theirs} codes; take multipliers of equal length"
            )
        return latents
    edge = config.tokenizer.get("patch_size", 1)
    if kind_of(config).network is not None:
        edge *= tokenizer_network(config).design.stride
    side = config.data.image_size
    if side % edge:
        raise ConfigError(f"data.image_size {side} is not divisible by {edge}, the edge of a token")
    return side // edge, side // edge


def num_codes(config: Config) -> int:
    """Size of the codebook."""
    config = part(config, "codes")
    if kind_of(config).network is None:
        return config.tokenizer.num_codes
    return tokenizer_network(config).num_codes


def token_channels(config: Config) -> int:
    """Numbers in a latent."""
    config = part(config, "latents")
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

    A pair has the Gaussians behind its codes from a cache, and none without.

    Args:
      split: To fit it to; None for that of the config.

    Raises:
      ConfigError: No weights are named, or the cache was made by others.
      checkpoint.CheckpointError: They cannot be read, or are of another model.
    """
    if kind_of(config).fitted:
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
    made = from_weights(config)
    if kind_of(config).parts and config.data.name == "cache":
        check_cache(config, made)
        made = dataclasses.replace(made, code_law=_law_in(data.directory(config), config))
    return made


def from_weights(config: Config) -> Any:
    """A tokenizer that is not fitted, read from weights alone: a pair knows no Gaussians.

    Raises:
      ConfigError: No weights are named.
      checkpoint.CheckpointError: They cannot be read, or are of another model.
    """
    parts = kind_of(config).parts
    if not parts:
        return _read(config, "path")
    made = {gives: _read(part(config, gives), f"{name}_path") for gives, name in parts.items()}
    return dataclasses.replace(abstract_tokenizer(config), code_law=None, **made)


def _read(config: Config, key: str) -> Any:
    """The tokenizer whose weights a config names; `key` is what its user calls the setting."""
    path = config.tokenizer.path
    if path is None:
        raise ConfigError(
            f"tokenizer.{key} is not set: give the folder that `arcond convert` made of the "
            f"tokenizer {config.tokenizer.name}"
        )
    abstract = abstract_tokenizer(config)
    return dataclasses.replace(abstract, params=load_weights(path, abstract.params))


def _law_in(cache: pathlib.Path, config: Config) -> types.CodeLaw:
    """The Gaussians that a cache of this pair keeps, in the units of the config's latents."""
    scale = part(config, "latents").tokenizer.latent_scale
    law = stored.read_law(cache, records.read_manifest(cache, kind=stored.KIND))
    return jax.tree.map(lambda x: x * scale, law)


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


def described(config: Config, made: Any) -> dict[str, Any]:
    """What a cache says of its tokenizer: its kind and sizes, and a digest of its parameters."""
    apart = OF_A_CACHE.get(config.tokenizer.name, ("name", "path"))
    if kind_of(config).parts:  # the Gaussians follow from the images too
        made = dataclasses.replace(made, code_law=None)
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


def check_law(config: Config, made: types.Tokenizer) -> None:
    """Raises ConfigError if latents are to be drawn from Gaussians that are not known."""
    start = config.sampling.get("warm_start")
    if start is not None and made.code_law is None:
        raise ConfigError(
            f"sampling.warm_start {start} starts from the Gaussian behind each code, which `arcond "
            "encode` finds: train with data.name=cache, or set it to None"
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
