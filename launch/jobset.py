#!/usr/bin/env python3
"""Submits the run to a GKE cluster with JobSet by kubectl, where there is no Cluster Toolkit.

    python launch/jobset.py [--dry-run] [--settings FILE] [train|preflight]

--dry-run prints the manifest; launch/jobset.yaml is what it prints for the settings as they come.
A slice is a Job, and a Job has a node pool of its own. When a host fails all start again, at most
MAX_RESTARTS times; a run that stopped and saved (exit code 75) is not counted, one that refuses its
command (2) is not started again. jax finds the other hosts by what GKE tells a TPU's pods.

JobSet, 0.10 or newer: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/ and
https://jobset.sigs.k8s.io/docs/tasks/failure_policy/. Pod failure policy:
https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy. TPUs:
https://docs.cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice
"""

import argparse
import json
import pathlib
import shutil
import string
import subprocess
import sys

LAUNCH = pathlib.Path(__file__).resolve().parent
CHIPS_PER_NODE = 4  # of the machines named in prelude.sh

# What prelude.sh makes of the settings, a value after another.
READ = r"""
source "$1/prelude.sh"
SETTINGS=$2
load_settings NAME ACCELERATOR TOPOLOGY NUM_SLICES PROVISIONING IMAGE CONFIG WORKDIR BUCKET \
  MAX_RESTARTS GRACE_SECONDS
check_workdir
load_accelerator
check_nodes
load_flags
load_command "$3"
printf '%s\0' "$NAME" "$TOPOLOGY" "$NUM_SLICES" "$PROVISIONING" "$IMAGE" "$MAX_RESTARTS" \
  "$GRACE_SECONDS" "$LABEL" "$CHIPS" "$LIBTPU_INIT_ARGS" "${COMMAND[@]}"
"""

MANIFEST = string.Template("""\
# Written by launch/jobset.py, which says what it is and where the fields are explained.
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $max_restarts
    rules:
      # What a Job says that a rule of podFailurePolicy ended.
      - name: stoppedAndSaved
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: [".*exit code 75 .*"]
      - name: refused
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $num_slices
      template:
        spec:
          completionMode: Indexed
          parallelism: $num_nodes
          completions: $num_nodes
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: arcond, operator: In, values: [75]}
              - action: FailJob
                onExitCodes: {containerName: arcond, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $grace_seconds
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $label
                cloud.google.com/gke-tpu-topology: "$topology"
$spot\
              containers:
                - name: arcond
                  image: $image
                  command: $command
$env\
                  securityContext:
                    privileged: true
                  resources:
                    limits:
                      google.com/tpu: $chips_per_node
""")
SPOT = """\
                cloud.google.com/gke-spot: "true"
"""
ENV = """\
                  env:
                    - name: LIBTPU_INIT_ARGS
                      value: {}
"""


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="train", choices=("train", "preflight"))
    parser.add_argument("--dry-run", action="store_true", help="print the manifest")
    parser.add_argument("--settings", default=LAUNCH / "settings.sh", type=pathlib.Path)
    args = parser.parse_args(argv)

    read = subprocess.run(
        ["bash", "-c", READ, "jobset.py", LAUNCH, args.settings, args.what],
        stdout=subprocess.PIPE,
        text=True,
    )
    if read.returncode:
        return read.returncode
    text = manifest(*read.stdout.split("\0")[:-1])
    if args.dry_run:
        print(text, end="")
        return 0
    if shutil.which("kubectl") is None:
        print("jobset.py: kubectl is not on PATH: install it first", file=sys.stderr)
        return 2
    return subprocess.run(["kubectl", "create", "-f", "-"], input=text, text=True).returncode


def manifest(
    name: str,
    topology: str,
    num_slices: str,
    provisioning: str,
    image: str,
    max_restarts: str,
    grace_seconds: str,
    label: str,
    chips: str,
    flags: str,
    *command: str,
) -> str:
    """The JobSet, as YAML; a string of JSON is one of YAML."""
    return MANIFEST.substitute(
        name=name,
        topology=topology,
        num_slices=num_slices,
        image=json.dumps(image),
        max_restarts=max_restarts,
        grace_seconds=grace_seconds,
        label=label,
        num_nodes=int(chips) // CHIPS_PER_NODE,
        chips_per_node=CHIPS_PER_NODE,
        command=json.dumps(command),
        spot=SPOT if provisioning == "spot" else "",
        env=ENV.format(json.dumps(flags)) if flags else "",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
