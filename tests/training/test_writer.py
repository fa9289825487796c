"""Laws of the log: a resumed run leaves the rows of one that never stopped."""

import json
import math

import pytest

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
