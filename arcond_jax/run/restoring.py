"""What lies in a working directory, opened for sampling or to be continued.

A working directory holds `checkpoints/` (everything needed to continue), `bank/` (ideal
conditions, once training is done), `metrics.jsonl`, pictures, and `refiner/` once it is calibrated.
One of converted weights holds `weights/` instead of checkpoints, and can be sampled and calibrated
like any other.
"""

import dataclasses
import itertools
from collections.abc import Collection, Mapping
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from arcond_jax import build, checkpoint, types
from arcond_jax import config as config_lib
from arcond_jax.build import saved as saved_lib
from arcond_jax.build import tokens
from arcond_jax.data import class_names
from arcond_jax.parallel import memory, processes
from arcond_jax.parallel import mesh as mesh_lib
from arcond_jax.training import state as state_lib

# What may differ between a checkpoint and the config it is continued or sampled with.
FREE_SECTIONS = ("sampling", "mesh", "transport", "evaluation")
FREE_KEYS = (
    "data.directory",
    "data.captions",
    "data.copies",
    "data.max_copy_gb",
    "data.num_threads",
    "tokenizer.path",
    "tokenizer.kl_path",
    "tokenizer.vq_path",
    "training.num_train_steps",
    "training.learning_rate",
    "training.clip_norm",
    "training.log_every",
    "training.samples_every",
    "training.checkpoint_every",
    "training.checkpoints_kept",
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained model as sampling needs it; `params` is the average, not the last iterate.

    The bank is None until it is filled. `class_names` are those of the labels, None where they are
    not known.
    """

    config: build.Config
    mesh: Mesh
    tokenizer: types.Tokenizer
    params: types.Params
    bank: Any
    step: int
    class_names: tuple[str, ...] | None = None


def restore(
    workdir: epath.PathLike,
    *,
    config: build.Config | None = None,
    step: int | None = None,
    suited: bool = True,
) -> Trained:
    """Opens the checkpoint of a run, or converted weights.

    Args:
      config: None for the one it was trained with; otherwise only the sections `sampling`,
        `transport`, `mesh` and what says where things are may differ from that.
      step: None for the latest.
      suited: Whether converted weights are computed with as suits this machine, `for_platform`, or
        as their config says.

    Raises:
      checkpoint.CheckpointError: Nothing there, damaged, not finite, or of another model.
      build.ConfigError: The config is not that of the run, or names no tokenizer.
    """
    workdir = epath.Path(workdir)
    if is_converted(workdir):
        saved = checkpoint.load_metadata(f"{workdir}/{tokens.WEIGHTS}")["config"]
        config = config or saved_lib.load(saved)
        check_same_run(config, saved, workdir)
        mesh = build.mesh(config)
        params = params_of(workdir, config, mesh)
        config = for_platform(config, params, mesh) if suited else config
        tokenizer = processes.put(build.tokenizer(config), mesh_lib.replicated(mesh))
        bank = load_bank(workdir, config, mesh, step=0)
        return Trained(config, mesh, tokenizer, params, bank, 0, saved_lib.class_names(saved))
    with _checkpoints(workdir) as checkpoints:
        saved = checkpoints.config(step)
        config = config or saved_lib.load(saved)
        check_same_run(config, saved, workdir)
        mesh = build.mesh(config)
        # Only training needs the last iterate and the optimizer.
        restored = read_run(
            workdir, checkpoints, config, saved, mesh, step=step, unread=("params", "opt_state")
        )
    step, params = restored.step, restored.state.ema
    tokens.check_finite(params, f"{workdir} at step {step}")
    bank = load_bank(workdir, config, mesh, step=step)
    names = saved_lib.class_names(saved)
    return Trained(config, mesh, restored.tokenizer, params, bank, step, names)


def bank_folder(workdir: epath.PathLike, step: int) -> epath.Path:
    """Where the bank of a checkpoint lies, if it was filled."""
    return epath.Path(workdir) / "bank" / str(step)


def load_bank(workdir: epath.PathLike, config: build.Config, mesh: Mesh, *, step: int) -> Any:
    """The bank of a checkpoint; None if there is none of the config's slots, groups and atoms."""
    folder = bank_folder(workdir, step)
    shapes = jax.eval_shape(lambda: build.empty_bank(config))
    if shapes is None or not checkpoint.is_whole(folder):
        return None
    settings = bank_settings(config)
    if checkpoint.load_metadata(str(folder)) != settings:
        return None
    return checkpoint.load_tree(str(folder), mesh_lib.shapes_in(shapes, mesh_lib.replicated(mesh)))


def bank_settings(config: build.Config) -> dict[str, Any]:
    """What the shape of a bank follows from, as JSON."""
    leaves, structure = jax.tree.flatten(jax.eval_shape(lambda: build.empty_bank(config)))
    return {"kind": str(structure), "shapes": [list(x.shape) for x in leaves]}


def for_platform(config: build.Config, params: types.Params, mesh: Mesh) -> build.Config:
    """The config that converted weights are computed with: on a CPU its fast one.

    Their configs are those of training on accelerators: bfloat16, which CPUs emulate, and a scan
    over the layers, which cuts each layer's weights out of the stack at every token. On a CPU they
    compute in float32, and unrolled where there is memory for a second copy of the weights. Neither
    changes a parameter. Runs keep what they were trained with, as do the conditions in their banks.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return config
    settings: dict[str, Any] = {"training.dtype": "float32"}
    copied = sum(x.nbytes for x in jax.tree.leaves(params))
    room = memory.share(copied, beside=copied, mesh=mesh) <= memory.SHARE
    if room and "depth" in config.model:  # MAR has two
        settings["model.unroll"] = config.model.depth
    return build.changed(config, settings)


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
    if path is not None:
        return build.load_config(path, overrides)
    return build.with_overrides(saved_lib.load(saved_config(workdir)), overrides)


def saved_config(workdir: epath.PathLike) -> dict[str, Any]:
    """The config beside the latest checkpoint or the converted weights, as it was saved."""
    if is_converted(workdir):
        return checkpoint.load_metadata(f"{workdir}/{tokens.WEIGHTS}")["config"]
    with _checkpoints(epath.Path(workdir)) as checkpoints:
        return checkpoints.config()


def _checkpoints(workdir: epath.Path) -> checkpoint.Checkpoints:
    """Those of a run, to read; of a folder without any, says what it holds instead."""
    if workdir.is_dir():
        names = {child.name for child in workdir.iterdir()}
        if names <= {checkpoint.unfinished_name(tokens.WEIGHTS)}:
            raise checkpoint.CheckpointError(
                f"{workdir} holds no weights: a conversion was not finished there, so run `arcond "
                "convert` again"
            )
    return checkpoint.Checkpoints(f"{workdir}/checkpoints")


def read_run(
    workdir: epath.PathLike,
    checkpoints: checkpoint.Checkpoints,
    config: build.Config,
    saved: Mapping[str, Any],
    mesh: Mesh,
    *,
    step: int | None = None,
    unread: Collection[str] = (),
) -> checkpoint.Restored:
    """A checkpoint of this version or an earlier one, in the places of the mesh.

    Args:
      saved: The config beside it.
      unread: Branches of the state that stay on disk.

    Raises:
      checkpoint.CheckpointError: It is damaged, of another model, or the tokenizer of the run is
        gone or another one.
    """
    tokenizer = mesh_lib.shapes_in(build.abstract_tokenizer(config), mesh_lib.replicated(mesh))
    state = state_lib.abstract_on(build.abstract_state(config), mesh)
    unread = (*unread, *saved_lib.dropped(saved))
    known = saved_lib.tokenizer_sha256(saved)
    if known is not None:
        restored = checkpoints.restore(state, step=step, unread=unread)
        made = checkpoint.load_tree(str(_tokenizer_folder(workdir)), tokenizer)
        if tokens.sha256(made) != known:
            raise checkpoint.CheckpointError(
                f"{_tokenizer_folder(workdir)} is not the tokenizer that the checkpoints of "
                f"{workdir} were trained with: bring back the run's own"
            )
        return dataclasses.replace(restored, tokenizer=made)
    then = saved_lib.trees_then(saved, state, tokenizer, config)
    restored = checkpoints.restore(then[0], abstract_tokenizer=then[1], step=step, unread=unread)
    now = saved_lib.trees_now(
        saved, (restored.state, restored.tokenizer), (state, tokenizer), config
    )
    return dataclasses.replace(restored, state=now[0], tokenizer=now[1])


def keep_tokenizer(workdir: epath.PathLike, tokenizer: types.Tokenizer) -> str:
    """Writes the tokenizer of a run, once for all its checkpoints; returns its digest.

    Raises:
      checkpoint.CheckpointError: It cannot be written.
    """
    folder, sha256 = _tokenizer_folder(workdir), tokens.sha256(tokenizer)
    known = checkpoint.load_metadata(str(folder)) if checkpoint.is_whole(folder) else {}
    if known.get("sha256") == sha256:
        return sha256
    processes.together()
    if processes.is_first() and folder.is_dir():  # of a run whose checkpoints are gone
        folder.rmtree()
    checkpoint.save_tree(str(folder), tokenizer, {"sha256": sha256})
    return sha256


def _tokenizer_folder(workdir: epath.PathLike) -> epath.Path:
    return epath.Path(workdir) / tokens.FITTED


def class_names_of(workdir: epath.PathLike) -> tuple[str, ...] | None:
    """What the classes of a directory's model are called; None where nobody said.

    Official weights of 1,000 classes are of ImageNet.
    """
    saved = saved_config(workdir)
    names = saved_lib.class_names(saved)
    if names is not None:
        return class_names.spoken(names)
    if is_converted(workdir) and saved_lib.load(saved).data.num_classes == class_names.NUM_CLASSES:
        return class_names.imagenet()
    return None


def check_same_classes(
    names: tuple[str, ...] | None, saved: Mapping[str, Any], workdir: epath.PathLike
) -> None:
    """Raises ConfigError, naming the first that differs, if a directory's run has other classes.

    Args:
      names: Of the classes here; None where they are not known.
      saved: The config that was saved with the run.
    """
    known = saved_lib.class_names(saved)
    if names is None or known is None or names == known:
        return
    pairs = itertools.zip_longest(known, names)
    number, (theirs, ours) = next((i, x) for i, x in enumerate(pairs) if x[0] != x[1])
    raise build.ConfigError(
        f"{workdir} holds a run whose class {number} is {theirs!r}, here it is {ours!r}: a "
        "label is the number of a class folder in the order of names, so use the same folders"
    )


def check_same_run(config: build.Config, saved: Mapping[str, Any], workdir: epath.Path) -> None:
    """Raises ConfigError, naming the key, if a directory holds a run of another config."""
    ours, theirs = config_lib.flat(config), config_lib.flat(saved_lib.load(saved))
    clip_norm = "training.clip_norm"
    if (ours[clip_norm] is None) != (theirs[clip_norm] is None):
        raise build.ConfigError(
            f"{workdir} holds a run with {clip_norm}={theirs[clip_norm]}, the config says "
            f"{ours[clip_norm]}: a limit may change, but not come or go (1e9 limits nothing)"
        )
    for name in sorted(ours | theirs):
        section = name.split(".")[0]
        if section in FREE_SECTIONS or name in FREE_KEYS:
            continue
        if ours.get(name) != theirs.get(name):
            raise build.ConfigError(
                f"{workdir} holds a run with {name}={theirs.get(name)}, the config says "
                f"{ours.get(name)}: use its config or another workdir"
            )
