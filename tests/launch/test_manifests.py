"""Manifests against the fields that the APIs have.

The schemas hold what is used here, of
  JobSet   https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
  Job      https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/job-v1/
  Pod      https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/
  SkyPilot https://docs.skypilot.co/en/latest/reference/yaml-spec.html
in the words of JSON Schema; a field that is not in them is refused.
"""

import pathlib
import re
import subprocess
import sys

import pytest
import yaml

from arcond_jax import build

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"

TEXT = {"type": str}
COUNT = {"type": int, "minimum": 0}


def record(_required=(), **properties):
    return {"type": dict, "properties": properties, "required": _required}


def listed(items):
    return {"type": list, "items": items}


def one_of(*values):
    return {"type": type(values[0]), "enum": values}


LABELS = {"type": dict, "values": TEXT}
RULE_NAME = {"type": str, "pattern": r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"}
RESTARTS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
POD = record(
    ("restartPolicy", "containers"),
    restartPolicy=one_of("Never"),  # what podFailurePolicy asks for
    terminationGracePeriodSeconds=COUNT,
    nodeSelector=LABELS,
    containers=listed(
        record(
            ("name", "image"),
            name=TEXT,
            image=TEXT,
            command=listed(TEXT),
            env=listed(record(("name", "value"), name=TEXT, value=TEXT)),
            securityContext=record(privileged={"type": bool}),
            resources=record(limits={"type": dict, "values": COUNT}),
        )
    ),
)
JOB = record(
    ("template",),
    completionMode=one_of("Indexed", "NonIndexed"),
    parallelism=COUNT,
    completions=COUNT,
    backoffLimit=COUNT,
    podFailurePolicy=record(
        ("rules",),
        rules=listed(
            record(
                ("action", "onExitCodes"),
                action=one_of("FailJob", "FailIndex", "Ignore", "Count"),
                onExitCodes=record(
                    ("operator", "values"),
                    containerName=TEXT,
                    operator=one_of("In", "NotIn"),
                    values=listed({"type": int, "minimum": 1}),
                ),
            )
        ),
    ),
    template=record(("spec",), spec=POD),
)
JOBSET = record(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion=one_of("jobset.x-k8s.io/v1alpha2"),
    kind=one_of("JobSet"),
    metadata=record(
        ("name",), name={"type": str, "pattern": r"[a-z]([-a-z0-9]*[a-z0-9])?"}, annotations=LABELS
    ),
    spec=record(
        failurePolicy=record(
            maxRestarts=COUNT,
            rules=listed(
                record(
                    ("action",),
                    name=RULE_NAME,
                    action=one_of(*RESTARTS),
                    onJobFailureReasons=listed(
                        one_of("BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy")
                    ),
                    onJobFailureMessagePatterns=listed(TEXT),
                )
            ),
        ),
        replicatedJobs=listed(
            record(
                ("name", "template"),
                name=TEXT,
                replicas=COUNT,
                template=record(("spec",), spec=JOB),
            )
        ),
    ),
)
SKY = record(
    name=TEXT,
    workdir=TEXT,
    envs=LABELS,
    setup=TEXT,
    run=TEXT,
    resources=record(
        accelerators=TEXT,
        use_spot={"type": bool},
        job_recovery=record(max_restarts_on_errors=COUNT, recover_on_exit_codes=listed(COUNT)),
    ),
)


def faults(value, schema, where="manifest"):
    """What is wrong with a value, a line each."""
    if type(value) is not schema["type"]:
        return [f"{where} is {value!r}, no {schema['type'].__name__}"]
    found = []
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where} is {value!r}, none of {schema['enum']}")
    if "minimum" in schema and value < schema["minimum"]:
        found.append(f"{where} is {value}, less than {schema['minimum']}")
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        found.append(f"{where} is {value!r}, not {schema['pattern']}")
    if "items" in schema:
        for i, item in enumerate(value):
            found += faults(item, schema["items"], f"{where}[{i}]")
    if "values" in schema:
        for name, item in value.items():
            found += faults(item, schema["values"], f"{where}.{name}")
    if "properties" in schema:
        found += [f"{where} has no {name}" for name in schema["required"] if name not in value]
        for name, item in value.items():
            if name not in schema["properties"]:
                found.append(f"{where}.{name} is no field")
            else:
                found += faults(item, schema["properties"][name], f"{where}.{name}")
    return found


def jobset(folder, **changed):
    path = folder / "settings.sh"
    lines = "".join(f"{name}='{value}'\n" for name, value in changed.items())
    path.write_text((LAUNCH / "settings.sh").read_text() + lines)
    done = subprocess.run(
        [sys.executable, LAUNCH / "jobset.py", "--dry-run", "--settings", path],
        stdout=subprocess.PIPE,
        check=True,
    )
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"FLAGS": "on", "ACCELERATOR": "v6e-256", "NUM_SLICES": "4", "PROVISIONING": "on-demand"},
        {"ACCELERATOR": "v5p-8", "TOPOLOGY": "2x2x1", "IMAGE": 'a"b: c', "ARGS": '--name="x: {y}"'},
    ],
)
def test_a_jobset(changed, tmp_path):
    manifest = jobset(tmp_path, **changed)
    assert faults(manifest, JOBSET) == []
    job = manifest["spec"]["replicatedJobs"][0]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert job["replicas"] == int(changed.get("NUM_SLICES", 1))
    # Together the pods of a slice ask for the chips of its topology.
    chips = container["resources"]["limits"]["google.com/tpu"] * spec["parallelism"]
    assert chips == {"16x16": 256, "2x2x1": 4}[changed.get("TOPOLOGY", "16x16")]
    assert spec["completions"] == spec["parallelism"]
    assert spec["backoffLimit"] == 0
    if "IMAGE" in changed:
        assert container["image"] == 'a"b: c'
        assert container["command"][-2:] == ['--name="x:', '{y}"']  # split at spaces, as said


def test_what_a_jobset_does_about_exit_codes():
    """By the message of a Job: KEP 262 of JobSet, https://github.com/kubernetes-sigs/jobset."""
    spec = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]
    rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["FailJob"] * 2

    def action(code):
        if not any(code in rule["onExitCodes"]["values"] for rule in rules):
            return "RestartJobSet"  # backoffLimit 0: the Job failed, and no rule is of that
        message = f"Container arcond for pod ns/p failed with exit code {code} matching it"
        for rule in spec["failurePolicy"]["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [".*"])
            if any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]
        return "RestartJobSet"

    assert action(75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(2) == "FailJobSet"
    assert [action(code) for code in (1, 134, 137, 143)] == ["RestartJobSet"] * 4


def test_a_task_of_skypilot(tmp_path):
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert faults(task, SKY) == []
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    said = subprocess.run(
        ["bash"],
        input=task["run"],
        env={**task["envs"], "HOME": "/"},
        text=True,
        capture_output=True,
    )
    assert (said.returncode, said.stderr.count("\n")) == (2, 1)
    # What it asks of its environment is in the settings.
    names = re.findall("^[A-Z_]+(?==)", (LAUNCH / "settings.sh").read_text(), re.MULTILINE)
    assert set(task["envs"]) <= set(names)


def test_a_wrong_manifest_is_found():
    manifest = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    manifest["spec"]["failurePolicy"]["maxRestart"] = 3
    manifest["spec"]["replicatedJobs"][0]["replicas"] = "two"
    del manifest["metadata"]["name"]
    assert sorted(faults(manifest, JOBSET)) == [
        "manifest.metadata has no name",
        "manifest.spec.failurePolicy.maxRestart is no field",
        "manifest.spec.replicatedJobs[0].replicas is 'two', no int",
    ]


def test_the_settings_are_lines_that_all_read_alike():
    """Bash and python-dotenv, which SkyPilot has: nothing to expand, quotes around spaces."""
    for line in (LAUNCH / "settings.sh").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"""[A-Z_]+=([^\s"'$`\\#]+|"[^"$`\\]*")""", line), line


def test_the_settings_are_of_a_config_that_there_is():
    text = (LAUNCH / "settings.sh").read_text()
    config = re.search("^CONFIG=(.*)$", text, re.MULTILINE)[1]
    arguments = re.search('^ARGS="(.*)"$', text, re.MULTILINE)[1].split()
    overrides = [argument.removeprefix("--config.") for argument in arguments]
    build.load_config(config, overrides)
