"""The start of a command: what is imported, and what XLA compiled before."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from arcond_jax.cli import compilation, main, paths

# Of what most commands do not need, each takes as long as a command without it.
HEAVY = ("sklearn", "ott", "torch", "tensorflow", "transformers", "pandas")


def imported_by(*arguments):
    """Top-level packages in memory after a command, in a process of its own."""
    code = (
        "import sys; from arcond_jax.cli import main\n"
        "try: main.main(sys.argv[1:])\n"
        "finally: print('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    return set(result.stdout.partition("MODULES ")[2].split())


def test_the_help_imports_no_library():
    imported = imported_by("--help")
    assert "arcond_jax" in imported
    assert not imported & {"jax", "numpy", "matplotlib", *HEAVY}


def test_a_command_imports_what_it_needs():
    imported = imported_by("config", "--config", "digits:joint")
    assert "jax" in imported
    assert not imported & {"matplotlib", *HEAVY}


def test_no_module_is_taken_from_the_current_folder(tmp_path):
    for name in ("numpy", "jax", "etils", "argparse", "ml_collections", "base", "digits"):
        (tmp_path / f"{name}.py").write_text("open('RUN', 'w').close()\nraise SystemExit(7)\n")
    command = [sys.executable, "-m", "arcond_jax", "config", "--config", "digits:ar"]
    checkout = pathlib.Path(main.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert not (tmp_path / "RUN").exists()
    # From a checkout alone, which is the current folder.
    os.symlink(checkout / "arcond_jax", tmp_path / "arcond_jax")
    os.symlink(checkout / "configs", tmp_path / "configs")
    del environment["PYTHONPATH"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert not (tmp_path / "RUN").exists()


@pytest.mark.parametrize("command", main.COMMANDS)
def test_the_help_says_what_a_command_s_docstring_says(command, capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    start, _, summary = main.module_of(command).__doc__.partition(": ")
    assert start == f"`arcond {command}`"
    assert f"{command} {' '.join(summary.split())}" in shown


def test_paths_are_those_that_were_typed(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(paths.folder("gs://bucket/run") / "checkpoints") == "gs://bucket/run/checkpoints"
    assert [str(typed("~/run")) for typed in (paths.folder, paths.file)] == 2 * [f"{tmp_path}/run"]


@pytest.mark.parametrize("text", ["file:///tmp/run", "memory://run"])
def test_places_of_another_kind_are_one_line(text, capsys):
    with pytest.raises(SystemExit):
        main.main(["train", "--config", "digits:base", "--workdir", text])
    assert f"{text} is no place known here: name one on this machine" in capsys.readouterr().err


def test_settings_may_stand_before_the_command(capsys):
    arguments = ["--config.model.depth=3", "config", "--config", "digits:joint"]
    assert main.main(arguments) == 0
    assert "model.depth = 3" in capsys.readouterr().out


@pytest.mark.slow
def test_64_bits_change_no_command(tmp_path):
    def run(*arguments):
        subprocess.run(
            [sys.executable, "-m", "arcond_jax", *arguments],
            env={**os.environ, "JAX_ENABLE_X64": "1"},
            check=True,
        )

    workdir, drawn = str(tmp_path / "run"), str(tmp_path / "drawn.npz")
    steps = [f"--config.training.num_{name}=4" for name in ("train_steps", "warmup_steps")]
    run("train", "--config", "digits:joint", "--workdir", workdir, *steps)
    run("calibrate", "--checkpoint", workdir)
    run("sample", "--checkpoint", workdir, "--num_images", "20", "--out", drawn)
    run("evaluate", "--samples", drawn, "--checkpoint", workdir)


@pytest.fixture
def no_cache():
    """jax as it is where nobody chose a folder."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def chosen():
    compilation.keep()
    return jax.config.values["jax_compilation_cache_dir"]


@pytest.mark.usefixtures("no_cache")
def test_programs_are_kept_in_the_user_s_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    folder = chosen()
    assert folder.startswith(str(tmp_path / "caches" / "arcond_jax" / "xla"))
    assert os.path.isdir(folder)


@pytest.mark.usefixtures("no_cache")
def test_without_a_cache_of_their_own_users_have_one_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert chosen().startswith(str(tmp_path / ".cache" / "arcond_jax" / "xla"))


@pytest.mark.usefixtures("no_cache")
def test_a_cache_that_cannot_be_written_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert chosen() is None
    # A folder of somebody else's, who could have put programs there.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "theirs"))
    monkeypatch.setattr(os, "getuid", lambda: -1)
    assert chosen() is None


@pytest.mark.usefixtures("no_cache")
def test_the_settings_of_jax_come_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert chosen() is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert chosen() == str(tmp_path / "mine")
    assert os.listdir(tmp_path) == []


def test_half_an_entry_is_replaced_without_a_word(tmp_path):
    code = (
        "import jax; from arcond_jax.cli import compilation\n"
        "compilation.keep(); print(jax.jit(lambda x: x + 1)(1))"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"]

    def entries():
        made = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert (made.stdout, made.stderr) == ("2\n", "")
        return {path: path.read_bytes() for path in tmp_path.rglob("*-cache")}

    whole = entries()
    assert whole
    for path, content in whole.items():
        path.write_bytes(content[: len(content) // 2])
    again = entries()
    assert again.keys() == whole.keys()
    assert all(len(again[path]) > len(whole[path]) // 2 for path in whole)
