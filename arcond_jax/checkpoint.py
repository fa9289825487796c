"""Saves what a run needs to continue, and restores it on any mesh; the only door to Orbax.

A checkpoint of a run holds `state` (a tree of arrays, written shard by shard), `data` (the position
of the data iterator) and `config` (both plain JSON), and `digests` of all of them, by which a bit
that flipped on the disk is found when it is read. It may hold a `tokenizer` too, as those of
earlier versions do. It is written in the background and appears under its step number only when it
is whole, so a killed run leaves every earlier one intact. Directories may be local or a bucket
(`gs://...`).
"""

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from arcond_jax import atomic, digest

Tree = Any  # a tree of arrays, or of jax.ShapeDtypeStruct where the name says abstract


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, found or read; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a run continues from; the tokenizer is None where none was asked for."""

    step: int
    state: Tree
    tokenizer: Tree
    data: dict[str, Any]


class Checkpoints:
    """The numbered checkpoints of one run."""

    def __init__(self, directory: str, *, every: int | None = None, keep: int | None = None):
        """Opens a directory; to write, creates it and tries to write to it.

        Args:
          directory: Of the run; one numbered folder a checkpoint.
          every: Training steps between two checkpoints; None opens for reading only.
          keep: How many of the newest checkpoints stay; None keeps all.

        Raises:
          CheckpointError: If the directory cannot be written, or read where `every` is None.
        """
        self._directory = _absolute(directory)
        self._position: int | None = None  # the step this run last saved or restored
        self._read_only = every is None
        self._failed = False  # whether a write has
        if every is None:
            if not self._directory.is_dir():
                raise CheckpointError(f"{self._directory} does not exist: train there first.")
            policies = []
        else:
            _check_writable(self._directory)
            policies = [checkpoint_managers.FixedIntervalPolicy(every)]
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                create=False,
                cleanup_tmp_directories=not self._read_only,  # what a killed run left behind
                save_decision_policy=checkpoint_managers.AnySavePolicy(policies),
                preservation_policy=checkpoint_managers.LatestN(keep),
            ),
            handler_registry=_registry(
                arrays=("state", "tokenizer"), json=("data", "config", "digests")
            ),
        )

    def save(
        self,
        step: int,
        *,
        state: Tree,
        tokenizer: Tree | None,
        data: dict[str, Any],
        config: dict[str, Any],
        force: bool = False,
    ) -> bool:
        """Starts a checkpoint if one is due, and returns whether it did.

        One is due at multiples of `every`, and with `force`. The arrays are copied before this
        returns, so they may be donated; the files are written in the background. A step that this
        run already saved is not written again.

        Raises:
          CheckpointError: If the directory holds this step or a later one from another run, or a
            write failed (that of an earlier step shows here too).
        """
        if self._read_only:
            raise CheckpointError(f"{self._directory} is open for reading only: pass `every`.")
        if step == self._position:
            return False
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"{self._directory} already holds step {latest}, cannot save step {step}: continue"
                " from it, delete the later steps or use another directory."
            )
        if not (force or self._manager.should_save(step)):
            return False
        trees = {"state": state} | ({} if tokenizer is None else {"tokenizer": tokenizer})
        plain = {"data": data, "config": config}
        with self._writing():
            saved = self._manager.save(step, args=_save_args(trees, plain), force=force)
        if saved:
            self._position = step
        return saved

    def restore(
        self,
        abstract_state: Tree,
        *,
        abstract_tokenizer: Tree | None = None,
        step: int | None = None,
        unread: Collection[str] = (),
    ) -> Restored:
        """Reads a checkpoint into the shapes, types and shardings of the abstract trees.

        Args:
          abstract_state: A tree of `jax.ShapeDtypeStruct`; the shardings may be of another mesh
            than the one that saved. A leaf without one goes to the first local device.
          abstract_tokenizer: The same for the tokenizer; None does not read it.
          step: Which one; None takes the latest.
          unread: Branches at the top of the state that stay on disk: their shapes are checked, and
            each of their leaves becomes `...`.

        Raises:
          CheckpointError: If there is none, it is damaged, or it belongs to another model.
        """
        step = self._existing(step)
        trees = {"state": abstract_state}
        if abstract_tokenizer is not None:
            trees["tokenizer"] = abstract_tokenizer
        with self._reading(step):
            metadata = self._manager.item_metadata(step)
            _check_matches(
                trees,
                {name: metadata[name] for name in trees},
                where=f"Step {step} in {self._directory}",
            )
            trees = {name: _placed(tree) for name, tree in trees.items()}
            trees["state"] = _without(trees["state"], unread)
            items: dict[str, ocp.args.CheckpointArgs] = {
                name: _restore_args(tree) for name, tree in trees.items()
            }
            plain = _plain(self._directory / str(step), "data", "config")
            restored = self._manager.restore(step, args=ocp.args.Composite(**items, **plain))
            _check_digests({name: restored[name] for name in items}, restored)
        self._position = step
        return Restored(
            step=step,
            state=restored["state"],
            tokenizer=restored["tokenizer"] if "tokenizer" in items else None,
            data=restored["data"],
        )

    def config(self, step: int | None = None) -> dict[str, Any]:
        """The config saved with a step (None: the latest); reads no arrays."""
        step = self._existing(step)
        with self._reading(step):
            items = ocp.args.Composite(**_plain(self._directory / str(step), "data", "config"))
            restored = self._manager.restore(step, args=items)
            _check_digests({}, restored)
            return restored["config"]

    def remove_after(self, step: int) -> list[int]:
        """Removes every later checkpoint, and returns their steps."""
        later = [known for known in sorted(self._manager.all_steps()) if known > step]
        with self._writing():
            for known in reversed(later):
                self._manager.delete(known)
        return later

    def latest_step(self) -> int | None:
        """The newest step saved, None if there is none."""
        return self._manager.latest_step()

    def is_writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._manager.is_saving_in_progress()

    def check(self) -> None:
        """Asks, without waiting, whether the last checkpoint that was started has failed.

        Raises:
          CheckpointError: It has.
        """
        if not self.is_writing():
            self.wait()

    def wait(self) -> None:
        """Returns when every started checkpoint is whole.

        Raises:
          CheckpointError: One failed.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, stops the background threads, and removes what they left of a failed write."""
        try:
            with self._writing():
                self._manager.close()
        finally:
            if self._failed and jax.process_index() == 0:
                self._remove_unfinished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *unused) -> None:
        if kind is not None and jax.process_count() > 1:
            return  # the others do not come to close it, so that to wait for them would be for ever
        self.close()

    def _existing(self, step: int | None) -> int:
        known = sorted(self._manager.all_steps())
        if not known:
            raise CheckpointError(f"No checkpoint in {self._directory}: train there first.")
        if step is None:
            return known[-1]
        if step not in known:
            raise CheckpointError(
                f"No checkpoint of step {step} in {self._directory}: it has"
                f" {', '.join(map(str, known))}."
            )
        return step

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        with _one_line(f"Writing to {self._directory} failed", "free space or use another one"):
            try:
                yield
            except Exception:
                self._failed = True
                raise

    def _remove_unfinished(self) -> None:
        for _ in range(10):  # writes that nothing waits for may go on for a moment
            for half in self._directory.glob(unfinished_name("*")):
                atomic.remove(half)
            time.sleep(0.1)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        with _one_line(
            f"The checkpoint of step {step} in {self._directory} is damaged",
            f"delete {self._directory / str(step)}, or go on from an earlier one by `arcond train "
            "--restart_from STEP`",
        ):
            yield


def has_steps(directory: str) -> bool:
    """Whether a directory holds a checkpoint of a run."""
    return bool(steps_of(directory))


def steps_of(directory: str) -> dict[int, float]:
    """Steps of the checkpoints in a directory, and when each was written, in seconds since 1970."""
    path = _absolute(directory)
    if not path.is_dir():
        return {}
    found = (x for x in path.iterdir() if x.name.isdigit() and is_whole(x))
    return {int(x.name): float(x.stat().mtime) for x in found}


def is_whole(directory: epath.PathLike) -> bool:
    """Whether a checkpoint or tree lies there that was written to its end."""
    path = _absolute(str(directory))
    # In a bucket nothing is renamed in the end, and Orbax writes a file last that says so.
    return path.is_dir() and ocp.utils.is_checkpoint_finalized(path)


def unfinished_name(name: str) -> str:
    """What `name` is called while it is written, and is left as by a process that was killed."""
    return f"{name}{ocp.path.step.TMP_DIR_SUFFIX}"


def save_tree(directory: str, tree: Tree, metadata: dict[str, Any]) -> None:
    """Writes one tree and its JSON description; the directory appears only when both are whole.

    Raises:
      CheckpointError: If the directory exists or cannot be written.
    """
    path = _absolute(directory)
    # The first process looks, before it lets the others write; they may come when it has begun.
    if jax.process_index() == 0 and path.exists():
        raise CheckpointError(f"{path} exists: delete it or use another directory.")
    _check_writable(path.parent)
    items = _save_args({"tree": tree}, {"metadata": metadata})
    writing = _one_line(f"Writing {path} failed", "free space or use another directory")
    temporary = path.parent / unfinished_name(path.name)
    with writing, atomic.unfinished(temporary), _tree_checkpointer() as checkpointer:
        checkpointer.save(path, args=items)


def load_tree(directory: str, abstract: Tree) -> Tree:
    """Reads a tree of `save_tree` into the shapes and shardings of an abstract one.

    Raises:
      CheckpointError: If it is not there, is damaged, or has other shapes.
    """
    path = _absolute(directory)
    with _reading_tree(path) as checkpointer:
        # None if the files that describe it are gone; the TypeError then says "damaged".
        saved = checkpointer.metadata(path).item_metadata["tree"]  # pyright: ignore[reportOptionalSubscript]
        _check_matches({"tree": abstract}, {"tree": saved}, where=str(path))
        items: dict[str, ocp.args.CheckpointArgs] = {
            "tree": ocp.args.StandardRestore(_placed(abstract))
        }
        restored = checkpointer.restore(path, args=ocp.args.Composite(**items, **_plain(path)))
        _check_digests({"tree": restored["tree"]}, restored)
        return restored["tree"]


def load_metadata(directory: str) -> dict[str, Any]:
    """Reads the description given to `save_tree`, and no arrays."""
    path = _absolute(directory)
    with _reading_tree(path) as checkpointer:
        restored = checkpointer.restore(path, args=ocp.args.Composite(**_plain(path, "metadata")))
        _check_digests({}, restored)
        return restored["metadata"]


@contextlib.contextmanager
def _reading_tree(path: epath.Path) -> Iterator[ocp.Checkpointer]:
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist.")
    reading = _one_line(f"{path} is damaged", "delete it and make it again")
    with reading, _tree_checkpointer() as checkpointer:
        yield checkpointer


def _tree_checkpointer() -> ocp.Checkpointer:
    registry = _registry(arrays=("tree",), json=("metadata", "digests"))
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(handler_registry=registry))


def _save_args(trees: dict[str, Tree], plain: dict[str, Any]) -> ocp.args.Composite:
    """Trees and plain JSON by item, and the digests of all."""
    digests = {name: digest.of_tree(tree) for name, tree in trees.items()}
    digests |= {name: digest.of_json(value) for name, value in plain.items()}
    return ocp.args.Composite(
        **{name: ocp.args.StandardSave(tree) for name, tree in trees.items()},
        **{name: ocp.args.JsonSave(value) for name, value in plain.items()},
        digests=ocp.args.JsonSave(digests),
    )


def _plain(folder: epath.Path, *names: str) -> dict[str, ocp.args.JsonRestore]:
    """Items of plain JSON to restore, and their digests; earlier versions saved none."""
    if (folder / "digests").is_dir():
        names += ("digests",)
    return {name: ocp.args.JsonRestore() for name in names}


def _check_digests(
    trees: dict[str, Tree], restored: Mapping[str, Any] | ocp.args.Composite
) -> None:
    """Raises ValueError, naming the item, if what was restored is not what was saved."""
    if "digests" not in restored:
        return
    saved = restored["digests"]
    for name, tree in trees.items():
        for path, found in digest.of_tree(tree).items():
            if saved[name][path] != found:
                raise ValueError(f"{name}/{path} is not what was saved")
    for name in ("data", "config", "metadata"):
        if name in restored and saved[name] != digest.of_json(restored[name]):
            raise ValueError(f"{name} is not what was saved")


def _registry(*, arrays: tuple[str, ...], json: tuple[str, ...]):
    """Tells Orbax the kind of each item, so that it can describe one without restoring it."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for name in arrays:
        handler = ocp.StandardCheckpointHandler()
        registry.add(name, ocp.args.StandardSave, handler)
        registry.add(name, ocp.args.StandardRestore, handler)
        registry.add(name, ocp.args.PyTreeRestore, ocp.PyTreeCheckpointHandler())
    for name in json:
        handler = ocp.JsonCheckpointHandler()
        registry.add(name, ocp.args.JsonSave, handler)
        registry.add(name, ocp.args.JsonRestore, handler)
    return registry


def _absolute(directory: str) -> epath.Path:
    path = epath.Path(directory)
    return path if "://" in directory else path.expanduser().resolve()  # a bucket is absolute


def _check_writable(directory: epath.Path) -> None:
    # Only a write proves it: permission bits say nothing to root or about a bucket.
    probe = directory / f".write_test_{uuid.uuid4().hex}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or _first_line(error)
        raise CheckpointError(
            f"Cannot write to {directory} ({reason}): use another one."
        ) from error


def _placed(abstract: Tree) -> Tree:
    # Orbax would place an unsharded leaf as it was saved, on devices that may not exist here.
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default
        ),
        abstract,
    )


def _check_matches(expected: dict[str, Tree], saved: dict[str, Tree], *, where: str) -> None:
    """Orbax reports a wrong shape without saying of which leaf; this names the first one."""
    in_model = _shapes(expected)
    in_checkpoint = _shapes({name: metadata.tree for name, metadata in saved.items()})
    for name in in_model | in_checkpoint:
        ours, theirs = in_model.get(name, "absent"), in_checkpoint.get(name, "absent")
        if ours != theirs:
            raise CheckpointError(
                f"{where} is of another model: {name} is {theirs} in the checkpoint, {ours} here."
                " Use the config it was made with."
            )


def _restore_args(tree: Tree) -> ocp.args.PyTreeRestore:
    """For a tree with places, of which, unlike with `StandardRestore`, leaves may stay on disk."""
    return ocp.args.PyTreeRestore(
        item=tree,
        restore_args=jax.tree.map(
            lambda leaf: (
                ocp.RestoreArgs()
                if leaf is ocp.PLACEHOLDER
                else ocp.ArrayRestoreArgs(
                    sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
                )
            ),
            tree,
        ),
    )


def _without(tree: Tree, branches: Collection[str]) -> Tree:
    """A tree with some of its branches to be left on disk."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            ocp.PLACEHOLDER if jax.tree_util.keystr(path[:1], simple=True) in branches else leaf
        ),
        tree,
    )


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _stored_shape(leaf)
        for path, leaf in leaves
    }


def _stored_shape(leaf: Any) -> tuple[int, ...]:
    if isinstance(leaf, jax.ShapeDtypeStruct) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)  # keys are stored as their numbers
    return tuple(leaf.shape)


@contextlib.contextmanager
def _one_line(what: str, remedy: str) -> Iterator[None]:
    # Orbax raises many types for bad files, plain Exception among them.
    try:
        yield
    except (CheckpointError, jax.errors.JaxRuntimeError):
        raise  # already clear; or the device is out of memory, and the files are not to blame
    except Exception as error:
        raise CheckpointError(f"{what} ({_first_line(error)}): {remedy}.") from error


def _first_line(error: Exception) -> str:
    """What happened and, of a long line, its end too, where the cause stands."""
    text = f"{type(error).__name__}: {error}".splitlines()[0].partition(" [tensorstore_spec=")[0]
    return text if len(text) < 240 else f"{text[:100]} ... {text[-130:]}"
