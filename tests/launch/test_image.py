"""The steps of the Dockerfile, of which nothing is built here."""

import fnmatch
import pathlib
import re
import tomllib

ROOT = pathlib.Path(__file__).parents[2]
DOCKERFILE = (ROOT / "launch" / "Dockerfile").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def copied():
    """Sources of COPY from the checkout."""
    for line in re.findall("^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        yield from line.split()[:-1]


def test_what_is_copied_is_there_and_sent():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    sent = [line[1:] for line in lines if line.startswith("!")]
    assert "*" in lines
    for source in copied():
        assert (ROOT / source).exists()
        assert any(fnmatch.fnmatch(source, pattern) for pattern in sent)
    assert sorted(sent) == sorted(copied())


def test_what_the_build_of_the_package_reads_is_copied():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    needed |= {*wheel["packages"], *wheel["force-include"]}
    assert needed <= set(copied())


def test_the_values_of_its_argument_are_extras():
    values = set(re.findall("EXTRA=([a-z]+)", DOCKERFILE))
    assert values == {"tpu", "cuda"}
    assert {*values, "gcs"} <= set(EXTRAS)


def test_versions_are_those_of_the_lock():
    lock = (ROOT / "requirements.lock").read_text()
    kept = [line for line in lock.splitlines() if "--hash=" not in line]
    constraints = [re.sub(r" *\\$", "", line) for line in kept]  # as its sed does
    pins = [line for line in constraints if line and not line.lstrip().startswith("#")]
    assert all(re.match(r"[a-z0-9._-]+==\S+( ; .*)?$", pin) for pin in pins), pins
    assert any(pin.startswith("jax==") for pin in pins)
