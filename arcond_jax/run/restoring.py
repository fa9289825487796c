"""What lies in a working directory, opened for sampling or to be continued."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from arcond_jax import build, checkpoint, sharding, types
from arcond_jax import config as config_lib
from arcond_jax.training import state as state_lib
from arcond_jax.transport import bank as bank_lib
from arcond_jax.transport import residual

# What may differ between a checkpoint and the config it is continued or sampled with.
FREE_SECTIONS = ("sampling", "mesh", "transport")
FREE_KEYS = (
    "data.directory",
    "tokenizer.path",
    "training.num_train_steps",
    "training.log_every",
    "training.samples_every",
    "training.checkpoint_every",
    "training.checkpoints_kept",
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model as sampling needs it; `params` is the average, not the last iterate.

    The bank is None, or of another shape than the config's, until it is calibrated.
    """

    config: build.Config
    mesh: Mesh
    tokenizer: types.Tokenizer
    params: types.Params
    bank: bank_lib.Bank | residual.ResidualBank | None
    step: int


def restore(
    workdir: pathlib.Path, *, config: build.Config | None = None, step: int | None = None
) -> Trained:
    """Opens the checkpoint of a run, or converted weights.

    Args:
      config: None for the one it was trained with; otherwise only the sections `sampling`,
        `transport`, `mesh` and what says where things are may differ from that.
      step: None for the latest.

    Raises:
      checkpoint.CheckpointError: Nothing there, damaged, or of another model.
      build.ConfigError: The config is not that of the run, or names no tokenizer.
    """
    if is_converted(workdir):
        saved = checkpoint.load_metadata(str(workdir / build.WEIGHTS))["config"]
        config = config or config_lib.from_dict(saved)
        check_same_run(config, saved, workdir)
        mesh = build.mesh(config)
        params = params_of(workdir, config, mesh)
        tokenizer = jax.device_put(build.tokenizer(config), sharding.replicated(mesh))
        return Trained(config, mesh, tokenizer, params, bank=None, step=0)
    with checkpoint.Checkpoints(str(workdir / "checkpoints")) as checkpoints:
        saved = checkpoints.config(step)
        config = config or config_lib.from_dict(saved)
        check_same_run(config, saved, workdir)
        mesh = build.mesh(config)
        abstract_state, abstract_tokenizer = abstract_run(config, saved, mesh)
        restored = checkpoints.restore(
            abstract_state,
            abstract_tokenizer=abstract_tokenizer,
            step=step,
            unread=("params", "opt_state"),  # only training needs them
        )
    state = restored.state
    return Trained(config, mesh, restored.tokenizer, state.ema, state.bank, restored.step)


def is_converted(workdir: pathlib.Path) -> bool:
    """Whether a directory holds converted weights rather than the checkpoints of a run."""
    return (workdir / build.WEIGHTS).is_dir()


def params_of(workdir: pathlib.Path, config: build.Config, mesh: Mesh) -> types.Params:
    """The parameters that a directory is sampled with, in the places of the mesh."""
    if not is_converted(workdir):
        return restore(workdir).params
    abstract = state_lib.abstract_on(build.abstract_params(config), mesh)
    return build.load_weights(str(workdir), abstract)


def config_for(workdir: pathlib.Path, path: str | None, overrides: list[str]) -> build.Config:
    """The config to sample a run with: a file's, or the run's own, with overrides on top."""
    if path is not None:
        return build.load_config(path, overrides)
    if is_converted(workdir):
        saved = checkpoint.load_metadata(str(workdir / build.WEIGHTS))["config"]
    else:
        with checkpoint.Checkpoints(str(workdir / "checkpoints")) as checkpoints:
            saved = checkpoints.config()
    return build.with_overrides(config_lib.from_dict(saved), overrides)


def abstract_run(config: build.Config, saved: Mapping[str, Any], mesh: Mesh) -> tuple[Any, Any]:
    """What to restore a run into, state and tokenizer: shapes with their places on the mesh.

    The bank has the shape of the config it was saved with.
    """
    whole = sharding.replicated(mesh)
    tokenizer = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        build.abstract_tokenizer(config),
    )
    abstract = build.abstract_state(config_lib.from_dict(saved))
    return state_lib.abstract_on(abstract, mesh), tokenizer


def check_same_run(config: build.Config, saved: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Raises ConfigError, naming the key, if a directory holds a run of another config."""
    ours, theirs = config_lib.flat(config), config_lib.flat(config_lib.from_dict(saved))
    for name in sorted(ours | theirs):
        section = name.split(".")[0]
        if section in FREE_SECTIONS or name in FREE_KEYS:
            continue
        if ours.get(name) != theirs.get(name):
            raise build.ConfigError(
                f"{workdir} holds a run with {name}={theirs.get(name)}, the config says "
                f"{ours.get(name)}: use its config or another workdir"
            )
