"""Every archive of official outputs in a folder: a new file is a new test.

The folder is `tests/golden/parity`, or that of the environment variable ARCOND_GOLDENS. The check
is chosen by the longest prefix of the file's name.
"""

import os
import pathlib

import golden as golden_lib
import pytest
from checks import CHECKS

FOLDER = pathlib.Path(
    os.environ.get("ARCOND_GOLDENS", pathlib.Path(__file__).parents[1] / "golden" / "parity")
)
FILES = sorted(FOLDER.glob("*.npz"))
LONG = {
    "fid_inception",
    "kl16",
    "llamagen_gpt",
    "magvit2_gpt",
    "magvit2_tokenizer",
    "magvit2_tokenizer_factorized",
    "mar_forward",
    "maskgit_vqgan",
    "rar",
    "vq16",
}


def prefix_of(name: str) -> str | None:
    return max((p for p in CHECKS if name.startswith(p)), key=len, default=None)


def marks_of(path: pathlib.Path) -> list[pytest.MarkDecorator]:
    """Of the archives of MAR's sampler the one with guidance and a temperature shows the most."""
    repeated = path.stem.startswith("mar_sample") and path.stem != "mar_sample_cfg2_temp0.9"
    if repeated:
        return [pytest.mark.slow]
    return [pytest.mark.long] if path.stem in LONG else []


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=marks_of(path)) for path in FILES]
)
def test_agrees_with_the_official_model(path):
    prefix = prefix_of(path.name)
    if prefix is None:
        pytest.skip(f"no part of the library is checked against {path.name}")
    CHECKS[prefix](golden_lib.load(path))


def test_there_are_files_and_every_check_has_one():
    assert FILES, f"no archives in {FOLDER}"
    if "ARCOND_GOLDENS" not in os.environ:
        assert {prefix_of(path.name) for path in FILES} - {None} == set(CHECKS)
