"""Laws of the log: a resumed run leaves the rows of one that never stopped."""

import json
import math

import pytest

from arcond_jax import config
from arcond_jax.training import writer


def write(path, *rows, resume_at):
    lines = writer.JsonLines(path, resume_at=resume_at)
    for step, scalars in rows:
        lines.write_scalars(step, scalars)
    lines.close()


def test_rows_are_json_objects_with_sorted_names(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, (1, {"loss": 2.0, "accuracy": 0.5}), (2, {"loss": 1.0}), resume_at=0)
    assert path.read_text() == (
        '{"step": 1, "accuracy": 0.5, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    )


def test_values_that_are_not_finite_become_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, (1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.0}), resume_at=0)
    assert json.loads(path.read_text()) == {"step": 1, "a": None, "b": None, "c": None, "d": 0.0}


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path):
    lines = writer.JsonLines(tmp_path / "metrics.jsonl", resume_at=0)
    lines._file.close()
    lines._file = open("/dev/full", "a")  # noqa: SIM115  # a disk without room
    lines.write_scalars(1, {"loss": 1.0})
    for end in (lines.flush, lines.close):
        with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: No space left"):
            end()


def test_resuming_drops_later_and_half_written_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, *((step, {"loss": 1.0 / step}) for step in (1, 2, 3, 4)), resume_at=0)
    path.write_text(path.read_text() + '{"step": 5, "lo')
    assert [row["step"] for row in writer.read_rows(path)] == [1, 2, 3, 4]
    write(path, (3, {"loss": 7.0}), resume_at=2)
    assert [(row["step"], row["loss"]) for row in writer.read_rows(path)] == [
        (1, 1.0),
        (2, 0.5),
        (3, 7.0),
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_file_has_no_rows(tmp_path):
    assert writer.read_rows(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("content", [b'{"step": 1}\n\xff\xfe', b"[1]\n", b'{"loss": 1}\n'])
def test_a_file_of_something_else_is_named(content, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl is damaged \(.*\): move it away or del"):
        writer.JsonLines(path, resume_at=5)


def scalars_of(folder):
    """What TensorBoard reads back: {name: {step: value}}."""
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    read = event_accumulator.EventAccumulator(str(folder), {"tensors": 0})
    read.Reload()
    from tensorboard.util import tensor_util

    return {
        name: {e.step: float(tensor_util.make_ndarray(e.tensor_proto)) for e in read.Tensors(name)}
        for name in read.Tags()["tensors"]
    }


def test_tensorboard_shows_what_was_written(tmp_path):
    pytest.importorskip("tensorflow")
    for resume_at in (0, 2):
        writers = writer.make_writers(tmp_path, resume_at=resume_at)
        for one in writers:
            one.write_scalars(resume_at + 1, {"loss": 2.5, "a/b": resume_at})
            one.write_scalars(resume_at + 2, {"loss": 1.5, "a/b": -1.0})
            one.flush()
            one.close()
    found = scalars_of(tmp_path / "tensorboard")
    assert found == {"loss": {1: 2.5, 2: 1.5, 3: 2.5, 4: 1.5}, "a/b": {1: 0, 2: -1, 3: 2, 4: -1}}
    assert [row["step"] for row in writer.read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_wandb_keeps_one_run_through_resumes(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for resume_at in (0, 1):
        writers = writer.make_writers(
            tmp_path, resume_at=resume_at, wandb_project="digits", settings={"seed": 3}
        )
        for one in writers:
            one.write_scalars(resume_at + 1, {"loss": 2.5})
            one.flush()
            one.close()
    number = (tmp_path / "wandb_id.txt").read_text().strip()
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert [run.name.rpartition("-")[2] for run in runs] == [number] * 2
    assert [row["step"] for row in writer.read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_wandb_that_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(writer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(config.ConfigError, match=r"pip install 'arcond_jax\[wandb\]'"):
        writer.check_wandb()
