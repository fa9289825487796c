# shellcheck shell=bash disable=SC2034
# Settings of every script in this folder; plain NAME=value lines, which bash, SkyPilot's --env-file
# and jobset.py read alike, so that nothing may refer to anything else. Keep a copy for each run:
#
#     launch/gcluster.sh --settings my_run.sh

# Google Cloud: LOCATION is the region or zone of the GKE cluster, ZONE that of TPU VMs.
PROJECT=my-project
ZONE=us-west4-a
CLUSTER=my-cluster
LOCATION=us-west4

# The job, its TPU VM or queued resource: lower case letters, digits and hyphens, at most 28.
NAME=ar-xl

# Chips. ACCELERATOR is v5e-N, v5p-N or v6e-N; N counts chips, of v5p cores, two a chip.
# TOPOLOGY is how the chips of one slice lie. PROVISIONING is on-demand, spot or reserved.
ACCELERATOR=v5e-256
TOPOLOGY=16x16
NUM_SLICES=1
PROVISIONING=spot

# What runs: `docker build -f launch/Dockerfile --build-arg EXTRA=tpu` makes the image.
IMAGE=us-docker.pkg.dev/my-project/arcond/arcond:tpu
CONFIG=ar_xl_imagenet256
WORKDIR=gs://my-bucket/runs/ar-xl
# Further flags of `arcond train`, separated by spaces.
ARGS="--config.mesh.fsdp=16 --config.data.name=records --config.data.directory=gs://my-bucket/imagenet --config.tokenizer.path=gs://my-bucket/weights/kl16"

# For preflight.py: a bucket to write to, and data to read.
BUCKET=gs://my-bucket
DATA=gs://my-bucket/imagenet

# How often a run that ended without being complete is started again.
MAX_RESTARTS=10
# Seconds from the signal to the kill: as long as a checkpoint takes.
GRACE_SECONDS=300
# Compiler flags of env.sh: off or on.
FLAGS=off
