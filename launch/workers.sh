# shellcheck shell=bash
# What tpu_vm.sh and queued_resource.sh do on workers; on_workers is theirs. Not run itself.

# Artifact Registry asks who pulls: https://cloud.google.com/artifact-registry/docs/docker/authentication
pull() {
  local registry=${IMAGE%%/*}
  if [[ $registry == *.pkg.dev ]]; then
    printf '%s && ' "$(quoted sudo gcloud auth configure-docker "$registry" --quiet)"
  fi
  quoted sudo docker pull "$IMAGE"
}

container() { # flags of docker run; then a command
  local options=(--privileged --net=host)
  if [[ -n $LIBTPU_INIT_ARGS ]]; then options+=(--env "LIBTPU_INIT_ARGS=$LIBTPU_INIT_ARGS"); fi
  quoted sudo docker run "${options[@]}" "$@"
}

work() {
  case ${1:-} in
    preflight)
      load_command preflight
      on_workers all "$(pull) && $(container --rm "$IMAGE" "${COMMAND[@]}")"
      ;;
    train)
      load_command train
      # What ended leaves its container, which goes; one that runs stays, and Docker says so.
      on_workers all "$(pull) && { sudo docker rm arcond 2>/dev/null; $(container --detach \
        --name arcond --restart "on-failure:$MAX_RESTARTS" --log-opt max-size=100m \
        "$IMAGE" "${COMMAND[@]}"); }"
      ;;
    logs) on_workers 0 "sudo docker logs --follow --tail 100 arcond" ;;
    stop) on_workers all "sudo docker stop --time $GRACE_SECONDS arcond" ;;
    *) fail "${1:-no command} is none of ${VERBS:-preflight, train, logs and stop}: --help shows what they do" ;;
  esac
}
