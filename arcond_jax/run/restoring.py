"""What lies in a working directory, opened for sampling or to be continued.

A working directory holds `checkpoints/` (everything needed to continue, and the bank once training
is done), `metrics.jsonl`, pictures, and `refiner/` once it is calibrated. One of converted weights
holds `weights/` instead of checkpoints, and can be sampled and calibrated like any other.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from arcond_jax import build, checkpoint, types
from arcond_jax import config as config_lib
from arcond_jax.build import saved as saved_lib
from arcond_jax.build import tokens
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.training import state as state_lib

# What may differ between a checkpoint and the config it is continued or sampled with.
FREE_SECTIONS = ("sampling", "mesh", "transport")
FREE_KEYS = (
    "data.directory",
    "data.captions",
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
    bank: Any
    step: int


def restore(
    workdir: epath.PathLike, *, config: build.Config | None = None, step: int | None = None
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
    workdir = epath.Path(workdir)
    if is_converted(workdir):
        saved = checkpoint.load_metadata(f"{workdir}/{tokens.WEIGHTS}")["config"]
        config = config or saved_lib.load(saved)
        check_same_run(config, saved, workdir)
        mesh = build.mesh(config)
        params = params_of(workdir, config, mesh)
        tokenizer = jax.device_put(build.tokenizer(config), mesh_lib.replicated(mesh))
        return Trained(config, mesh, tokenizer, params, bank=None, step=0)
    with checkpoint.Checkpoints(f"{workdir}/checkpoints") as checkpoints:
        saved = checkpoints.config(step)
        config = config or saved_lib.load(saved)
        check_same_run(config, saved, workdir)
        mesh = build.mesh(config)
        # Only training needs the last iterate and the optimizer.
        restored = read_run(
            checkpoints, config, saved, mesh, step=step, unread=("params", "opt_state")
        )
    state = restored.state
    return Trained(config, mesh, restored.tokenizer, state.ema, state.bank, restored.step)


def is_converted(workdir: epath.PathLike) -> bool:
    """Whether a directory holds converted weights rather than the checkpoints of a run."""
    return (epath.Path(workdir) / tokens.WEIGHTS).is_dir()


def params_of(workdir: epath.PathLike, config: build.Config, mesh: Mesh) -> types.Params:
    """The parameters that a directory is sampled with, in the places of the mesh."""
    if not is_converted(workdir):
        return restore(workdir).params
    abstract = state_lib.abstract_on(build.abstract_params(config), mesh)
    return tokens.load_weights(str(workdir), abstract)


def config_for(workdir: epath.PathLike, path: str | None, overrides: list[str]) -> build.Config:
    """The config to sample a run with: a file's, or the run's own, with overrides on top."""
    workdir = epath.Path(workdir)
    if path is not None:
        return build.load_config(path, overrides)
    if is_converted(workdir):
        saved = checkpoint.load_metadata(f"{workdir}/{tokens.WEIGHTS}")["config"]
    else:
        with checkpoint.Checkpoints(f"{workdir}/checkpoints") as checkpoints:
            saved = checkpoints.config()
    return build.with_overrides(saved_lib.load(saved), overrides)


def read_run(
    checkpoints: checkpoint.Checkpoints,
    config: build.Config,
    saved: Mapping[str, Any],
    mesh: Mesh,
    *,
    step: int | None = None,
    unread: Collection[str] = (),
) -> checkpoint.Restored:
    """A checkpoint of this version or an earlier one, in the places of the mesh.

    The bank has the shape of the config it was saved with.

    Args:
      saved: The config beside it.
      unread: Branches of the state that stay on disk.
    """
    whole = mesh_lib.replicated(mesh)
    tokenizer = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        build.abstract_tokenizer(config),
    )
    state = state_lib.abstract_on(build.abstract_state(saved_lib.load(saved)), mesh)
    then = saved_lib.trees_then(saved, state, tokenizer, config)
    restored = checkpoints.restore(then[0], abstract_tokenizer=then[1], step=step, unread=unread)
    now = saved_lib.trees_now(
        saved, (restored.state, restored.tokenizer), (state, tokenizer), config
    )
    return dataclasses.replace(restored, state=now[0], tokenizer=now[1])


def check_same_run(config: build.Config, saved: Mapping[str, Any], workdir: epath.Path) -> None:
    """Raises ConfigError, naming the key, if a directory holds a run of another config."""
    ours, theirs = config_lib.flat(config), config_lib.flat(saved_lib.load(saved))
    for name in sorted(ours | theirs):
        section = name.split(".")[0]
        if section in FREE_SECTIONS or name in FREE_KEYS:
            continue
        if ours.get(name) != theirs.get(name):
            raise build.ConfigError(
                f"{workdir} holds a run with {name}={theirs.get(name)}, the config says "
                f"{ours.get(name)}: use its config or another workdir"
            )
