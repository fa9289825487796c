"""Opens what earlier versions saved: configs, and the trees that changed with them.

Version 1 (release 0.1.0): every config held the settings of all models, by a section `backbone`
pointed at; the joint model held its codes' pad as a last row of their table; patches always had
codes. `version_1.json` holds the defaults of its settings.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from arcond_jax.config import Config, ConfigError
from arcond_jax.tokenizers import patches

DEFAULTS = pathlib.Path(__file__).with_name("version_1.json")
# Where the settings of a backbone were.
SECTIONS = {"captioned": "gpt", "magvit2": "gpt"}


def config_of_version_1(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config of version 1, where they are now; more than a run uses.

    Raises:
      ConfigError: It has keys that version 1 did not know.
    """
    old = _nested(_known(saved))
    loss, sampling = old["loss"], old["sampling"]
    backbone, model = old["backbone"], _model_of_version_1(old)
    if sampling["guidance_schedule"] != "power_cosine":
        sampling["guidance_power"] = None
    if backbone == "dit":
        sampling["guidance_schedule"] = "constant"
    if backbone == "mar":
        sampling["guided_positions"] = None
    tokenizer = old["tokenizer"] | old.get(old["tokenizer"]["name"], {})
    if tokenizer["name"] == "patches" and model["name"] in ("ar", "mar", "dit"):
        tokenizer["name"] = "pixels"
    values = {name: old[name] for name in ("name", "seed", "data", "training", "mesh")} | {
        "tokenizer": tokenizer,
        "model": model,
        "diffusion_head": old["diffusion_head"],
        "loss": loss | old["rar"] | {"mask_rate_min": old["mar"]["mask_rate_min"]},
        "sampling": sampling,
        "transport": old["transport"],
    }
    if model["name"] in ("llamagen", "joint") and old["tensorar"]["window"] > 1:
        values["tensorar"] = old["tensorar"] | {"draft_weight": loss["draft_weight"]}
    return values


def _model_of_version_1(old: dict[str, Any]) -> dict[str, Any]:
    backbone, loss = str(old["backbone"]), old["loss"]
    section = SECTIONS.get(backbone, backbone)
    model = old[section] | {"token_dropout": loss["token_dropout"]}
    if backbone == "gpt":
        names = {(True, True): "joint", (False, True): "ar", (True, False): "llamagen"}
        return model | {"name": names[loss["w_tensor"] > 0, loss["w_diffusion"] > 0]}
    if backbone == "captioned":
        captioned = old["captioned"]
        return model | {
            "name": "llamagen_t2i",
            "num_caption_vectors": captioned["num_prefix"],
            "caption_width": captioned["caption_width"],
        }
    return model | old.get(backbone, {}) | {"name": backbone}


def _known(saved: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of version 1 by `section.key`; those not saved yet have their defaults."""
    known, flat = json.loads(DEFAULTS.read_text()), _flat(saved)
    unknown = sorted(flat.keys() - known)
    if unknown:
        raise ConfigError(f"the saved config is of another version: it has {unknown[0]}")
    return known | flat


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        section, _, leaf = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    return nested


def refiner_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a refiner was calibrated with, as a config has them now.

    Args:
      saved: By `section.key`, of this version or an earlier one.
    """
    changed = {}
    if saved.get("sampling.guidance_schedule") != "power_cosine":
        changed["sampling.guidance_power"] = None
    if saved.get("sampling.solver", "ancestral") != "ancestral":
        changed["sampling.latent_temperature"] = 1.0
    return {**saved, **changed}


# Trees of version 1. Parameters, their average and the optimizer's moments hold the same names.


def state_in_version_1(abstract: Any, config: Config, *, bank: Any) -> dict[str, Any]:
    """What a train state looked like in version 1, to restore into.

    Args:
      abstract: Shapes of today's, with their places on a mesh.
      bank: Shapes of the bank that lay in it.
    """

    def with_pad(model: dict[str, Any]) -> dict[str, Any]:
        table = model["code_embed"]["table"]
        num_rows, width = table.shape
        place = NamedSharding(table.sharding.mesh, PartitionSpec())
        table = jax.ShapeDtypeStruct((num_rows + 1, width), table.dtype, sharding=place)
        encoder = {k: x for k, x in model.get("window_encoder", {}).items() if k != "pad"}
        windows = {"window_encoder": encoder} if encoder else {}
        return model | {"code_embed": {"table": table}} | windows

    fields = {x.name: getattr(abstract, x.name) for x in dataclasses.fields(abstract)}
    return _in_each_model(fields, with_pad, config) | {"bank": bank}


def state_from_version_1(state: dict[str, Any], abstract: Any, config: Config) -> Any:
    """A state restored into `state_in_version_1`, as it is today; leaves may be missing (`...`)."""
    state = {name: x for name, x in state.items() if name != "bank"}

    def without_pad(model: dict[str, Any]) -> dict[str, Any]:
        table = model["code_embed"]["table"]
        kept, pad = (table, table) if table is ... else (table[:-1], table[-1])
        windows = {}
        if "window_encoder" in model:
            windows = {"window_encoder": model["window_encoder"] | {"pad": pad}}
        return model | {"code_embed": {"table": kept}} | windows

    state = type(abstract)(**_in_each_model(state, without_pad, config))
    return jax.tree.map(
        lambda x, to: x if x is ... else jax.device_put(x, to.sharding), state, abstract
    )


def tokenizer_in_version_1(abstract: Any, saved: Mapping[str, Any]) -> Any:
    """What a tokenizer looked like in version 1: patches had codes, used or not."""
    if not isinstance(abstract, patches.Patches) or abstract.codebook is not None:
        return abstract
    return patches.abstract(
        abstract.image_shape,
        patch_size=abstract.patch_size,
        num_codes=_known(saved)["tokenizer.num_codes"],
    )


def tokenizer_from_version_1(tokenizer: Any, abstract: Any) -> Any:
    """A tokenizer restored into `tokenizer_in_version_1`, as it is today."""
    if not isinstance(abstract, patches.Patches) or abstract.codebook is not None:
        return tokenizer
    return dataclasses.replace(tokenizer, codebook=None, code_mean=None, code_cholesky=None)


def _in_each_model(state: Any, change: Callable[[dict], dict], config: Config) -> Any:
    """Changes every tree of parameters within a state, if its codes had a pad."""
    if not ("tensorar" in config or config.model.name == "joint"):
        return state

    def is_model(node: Any) -> bool:
        return isinstance(node, dict) and "code_embed" in node

    return jax.tree.map(
        lambda node: change(node) if is_model(node) else node, state, is_leaf=is_model
    )
