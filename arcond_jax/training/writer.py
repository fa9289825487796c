"""Where numbers go while a run is under way: lines of JSON; TensorBoard, Weights & Biases."""

import importlib.util
import json
import math
import uuid
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from etils import epath

from arcond_jax import atomic
from arcond_jax.config import ConfigError
from arcond_jax.training import appending


@runtime_checkable  # annotations are checked at run time in the tests
class Writer(Protocol):
    """Where scalars go; `flush` after each log line, `close` at the end."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, `{"step": ..., name: value}`; a value that is not finite is null."""

    def __init__(self, path: epath.PathLike, *, resume_at: int) -> None:
        """Opens the file for appending, after dropping what an interrupted run wrote too much.

        Args:
          resume_at: Lines of later steps, and a last line cut short, are dropped.

        Raises:
          OSError: In one line that names the file, here and at every later write.
        """
        self._path = path = epath.Path(path)
        kept = [row for row in read_rows(path) if row["step"] <= resume_at]
        atomic.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = appending.opened(path)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        values = {
            name: float(x) if math.isfinite(x) else None for name, x in sorted(scalars.items())
        }
        with atomic.named(self._path):
            self._file.write(json.dumps({"step": step} | values) + "\n")

    def flush(self) -> None:
        with atomic.named(self._path):
            self._file.flush()

    def close(self) -> None:
        with atomic.named(self._path):
            self._file.close()


def read_rows(path: epath.PathLike) -> list[dict]:
    """The rows of a JSON lines file; none if it does not exist, and no half-written last one.

    Raises:
      ValueError: It holds something else.
    """
    path = epath.Path(path)
    if not path.exists():
        return []
    rows = []
    try:
        lines = path.read_bytes().decode().splitlines()
    except UnicodeDecodeError:
        raise ValueError(
            f"{path} is damaged (it is not UTF-8): move it away or delete it"
        ) from None
    for line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not (isinstance(row, dict) and type(row.get("step")) is int):
            raise ValueError(f"{path} is damaged (a line has no step): move it away or delete it")
        rows.append(row)
    return rows


def check_wandb() -> None:
    """Raises ConfigError where the `wandb` extra is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError("--wandb needs the package: pip install 'arcond_jax[wandb]'")


class Wandb:
    """A run of Weights & Biases, the same one each time that training goes on."""

    def __init__(self, workdir: epath.PathLike, project: str, settings: Mapping[str, Any]) -> None:
        """Begins a run of a project or goes on with it; its number is kept in `wandb_id.txt`.

        Args:
          settings: Shown beside the run.
        """
        import wandb  # pyright: ignore[reportMissingImports]

        workdir = epath.Path(workdir)
        kept = workdir / "wandb_id.txt"
        number = kept.read_text().strip() if kept.exists() else uuid.uuid4().hex[:12]
        atomic.write_text(kept, number + "\n")
        local = "://" not in str(workdir)
        self._run = wandb.init(
            project=project,
            id=number,
            name=workdir.name,
            resume="allow",
            dir=str(workdir) if local else None,
            config=dict(settings),
        )

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=step)

    def flush(self) -> None:
        """Is left to wandb, which sends from a process of its own."""

    def close(self) -> None:
        self._run.finish()


def make_writers(
    workdir: epath.PathLike,
    *,
    resume_at: int,
    wandb_project: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[Writer]:
    """JSON lines always; clu's TensorBoard writer where TensorFlow is there to write it.

    Args:
      resume_at: Step that is logged already.
      wandb_project: Of Weights & Biases; None for no run there.
      settings: That such a run shows.
    """
    writers: list[Writer] = []
    if wandb_project is not None:
        writers.append(Wandb(workdir, wandb_project, settings or {}))
    writers.append(JsonLines(epath.Path(workdir) / "metrics.jsonl", resume_at=resume_at))
    try:
        # clu.metric_writers imports TensorFlow, which only the `tensorboard` extra installs.
        from clu import metric_writers
    except ImportError:
        return writers
    return [*writers, metric_writers.SummaryWriter(str(epath.Path(workdir) / "tensorboard"))]
