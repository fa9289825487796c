#!/usr/bin/env bash
# Runs on all workers of the TPU VM NAME by `gcloud ssh`, in a container of IMAGE.
#
#   launch/tpu_vm.sh [--dry-run] [--settings FILE] preflight|train|logs|stop
#
# train starts a container on every worker and comes back; Docker starts one that failed again, at most
# MAX_RESTARTS times. logs follows worker 0. stop has the run save first, and nothing starts it again. More than one
# slice: launch/queued_resource.sh train.
#
# https://docs.cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh
# https://docs.cloud.google.com/tpu/docs/run-in-container (Docker is on the VM; --privileged, --net=host)

# shellcheck source=launch/prelude.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/prelude.sh"
# shellcheck source=launch/workers.sh
source "$LAUNCH/workers.sh"

parse_options "$@"
load_settings PROJECT ZONE NAME ACCELERATOR TOPOLOGY IMAGE CONFIG WORKDIR BUCKET \
  MAX_RESTARTS GRACE_SECONDS
check_workdir
load_accelerator
load_flags
((${NUM_SLICES:-1} == 1)) || fail "NUM_SLICES=$NUM_SLICES in $SETTINGS: use launch/queued_resource.sh"

on_workers() { # all or a number, a command line
  run gcloud compute tpus tpu-vm ssh "$NAME" --project "$PROJECT" --zone "$ZONE" \
    --worker "$1" --command "$2"
}
work "${OPERANDS[@]+"${OPERANDS[@]}"}"
