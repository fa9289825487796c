"""Eight fake CPU devices for every test; the package itself is not imported here.

Nearly all of a test's time is compilation, so XLA optimises less and keeps what it compiled, for
the other workers and child processes too. Its older emitters, no costly passes, and code that is
short, not fast, more than halve the time. Level 0 would not add to that: with jaxlib 0.10.2 it also
miscompiles the sampling loop.
"""

import os
import tempfile

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
    + " --xla_cpu_use_fusion_emitters=false --xla_llvm_disable_expensive_passes=true"
    + " --xla_backend_extra_options=xla_cpu_optimize_for_size,xla_cpu_disable_loop_unrolling,"
    + "xla_cpu_disable_slp_vectorizer"
)
if "PYTEST_XDIST_WORKER" not in os.environ:  # a worker has the folder of the process above it
    _compiled = tempfile.TemporaryDirectory(prefix="compiled_")  # removed at exit
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_configure(config):
    """A worker that reads what another one is just writing compiles it itself."""
    reading = "Error reading persistent compilation cache entry"
    config.addinivalue_line("filterwarnings", f"ignore:{reading}:UserWarning")


@pytest.fixture
def sizes_unchecked():
    """For programs of any number of rows: a symbolic size is no int, as annotations have it."""
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
