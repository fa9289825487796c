# shellcheck shell=bash disable=SC2034
# What the scripts here begin with: the settings, --dry-run, and errors of one line. Not run itself.
set -euo pipefail

LAUNCH=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
SETTINGS=$LAUNCH/settings.sh
DRY_RUN=""

fail() { # what is wrong, where, what to do
  printf '%s: %s\n' "$(basename -- "$0")" "$*" >&2
  exit 2
}

quoted() { # words as a shell reads them back
  local word separator=""
  for word in "$@"; do
    printf '%s' "$separator"
    separator=" "
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      printf '%s' "$word"
    else
      local rest=$word
      printf "'"
      while [[ $rest == *\'* ]]; do
        printf '%s' "${rest%%\'*}'\\''"
        rest=${rest#*\'}
      done
      printf "%s'" "$rest"
    fi
  done
}

run() { # a command; with --dry-run it is printed
  if [[ -n $DRY_RUN ]]; then
    quoted "$@"
    echo
    return
  fi
  command -v "$1" >/dev/null || fail "$1 is not on PATH: install it first (launch/README.md)"
  "$@"
}

usage() { # the comment at the top of the script, to its first blank line
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

common_option() { # takes $1 $2 if every script has them; CONSUMED is how many
  CONSUMED=0
  case ${1:-} in
    --dry-run) DRY_RUN=yes CONSUMED=1 ;;
    --settings)
      [[ -n ${2:-} ]] || fail "--settings needs a file"
      SETTINGS=$2 CONSUMED=2
      ;;
    -h | --help)
      usage
      exit 0
      ;;
  esac
}

parse_options() { # of a script that has no others; OPERANDS are the rest
  OPERANDS=()
  while (($#)); do
    common_option "$@"
    if ((CONSUMED)); then
      shift "$CONSUMED"
    elif [[ $1 == -* ]]; then
      fail "unknown option $1: --help shows what there is"
    else
      OPERANDS+=("$1")
      shift
    fi
  done
}

load_settings() { # the names that must have a value
  [[ -r $SETTINGS ]] || fail "cannot read the settings $SETTINGS: give a file with --settings"
  [[ $SETTINGS == */* ]] || SETTINGS=./$SETTINGS # or bash looks along PATH first
  # shellcheck source=launch/settings.sh
  source "$SETTINGS"
  local name
  for name in "$@"; do
    [[ -n ${!name:-} ]] || fail "$name is not set in $SETTINGS: give it a value"
  done
  if [[ -n ${NAME:-} && ! $NAME =~ ^[a-z]([a-z0-9-]{0,26}[a-z0-9])?$ ]]; then
    fail "NAME=$NAME in $SETTINGS: take at most 28 lower case letters, digits and hyphens"
  fi
  for name in NUM_SLICES MAX_RESTARTS GRACE_SECONDS; do
    [[ ${!name:-1} =~ ^[0-9]+$ ]] || fail "$name=${!name} in $SETTINGS is no number: give one"
  done
  ((${NUM_SLICES:-1} > 0)) || fail "NUM_SLICES=$NUM_SLICES in $SETTINGS: there is at least one"
  case ${PROVISIONING:-on-demand} in
    on-demand | spot | reserved) ;;
    *) fail "PROVISIONING=$PROVISIONING in $SETTINGS is none of on-demand, spot and reserved" ;;
  esac
  case ${FLAGS:-off} in on | off) ;; *) fail "FLAGS=$FLAGS in $SETTINGS is neither off nor on" ;; esac
}

# Google Cloud's names of a generation: accelerator type, runtime version, GKE's label and machine.
# https://cloud.google.com/tpu/docs/runtimes
# https://docs.cloud.google.com/kubernetes-engine/docs/concepts/tpus
load_accelerator() {
  GENERATION=${ACCELERATOR%-*}
  local cores=1 size side
  case $GENERATION in
    v5e)
      GCLOUD_TYPE=v5litepod-${ACCELERATOR##*-} RUNTIME=v2-alpha-tpuv5-lite
      LABEL=tpu-v5-lite-podslice MACHINE=ct5lp-hightpu-4t
      ;;
    v5p)
      GCLOUD_TYPE=$ACCELERATOR RUNTIME=v2-alpha-tpuv5
      LABEL=tpu-v5p-slice MACHINE=ct5p-hightpu-4t cores=2
      ;;
    v6e)
      GCLOUD_TYPE=$ACCELERATOR RUNTIME=v2-alpha-tpuv6e
      LABEL=tpu-v6e-slice MACHINE=ct6e-standard-4t
      ;;
    *) fail "ACCELERATOR=$ACCELERATOR in $SETTINGS is none of v5e-N, v5p-N and v6e-N" ;;
  esac
  [[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    fail "TOPOLOGY=$TOPOLOGY in $SETTINGS is none: write 4x4, or 2x2x4 for v5p"
  CHIPS=1
  for side in ${TOPOLOGY//x/ }; do CHIPS=$((CHIPS * side)); done
  size=$((CHIPS * cores))
  [[ $ACCELERATOR == "$GENERATION-$size" ]] ||
    fail "TOPOLOGY=$TOPOLOGY is $GENERATION-$size, but ACCELERATOR=$ACCELERATOR in $SETTINGS: change one"
}

check_nodes() { # of GKE, whose machines above have four chips
  ((CHIPS % 4 == 0)) || fail "TOPOLOGY=$TOPOLOGY in $SETTINGS is not of whole nodes, 4 chips each"
}

check_workdir() { # of a container, which goes with all that is in it
  [[ $WORKDIR == gs://* ]] || fail "WORKDIR=$WORKDIR in $SETTINGS would be lost with its container, and" \
    "each host would have its own: name one in a bucket, gs://..."
}

load_flags() { # LIBTPU_INIT_ARGS is empty unless FLAGS=on
  LIBTPU_INIT_ARGS=""
  if [[ ${FLAGS:-off} == on ]]; then
    # shellcheck source=launch/env.sh
    source "$LAUNCH/env.sh" "$GENERATION" "$NUM_SLICES"
  fi
}

# COMMAND is what every host runs, to train or before. ARGS splits at spaces: no path that has one.
load_command() {
  local arguments
  case $1 in
    train)
      read -r -a arguments <<<"${ARGS:-}"
      COMMAND=(arcond train --config "$CONFIG" --workdir "$WORKDIR"
        ${arguments[@]+"${arguments[@]}"})
      ;;
    preflight)
      COMMAND=(python launch/preflight.py --bucket "$BUCKET")
      if [[ -n ${DATA:-} ]]; then COMMAND+=(--data "$DATA"); fi
      ;;
    *) fail "$1 is neither train nor preflight: --help shows what there is" ;;
  esac
}
