#!/usr/bin/env bash
# Every worker of a TPU VM or pod slice, over ssh. Usage:
#   TPU=name ZONE=zone launch/tpu-vm/run.sh CONFIG /shared/runs/x [--config.key=value ...]
set -euo pipefail
[[ $# -ge 2 && -n ${TPU:-} && -n ${ZONE:-} ]] || {
  echo "usage: TPU=name ZONE=zone $0 CONFIG WORKDIR [--config.key=value ...]" >&2
  exit 2
}
tpu() { gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }

# The checkout, without what git ignores, goes to every worker.
archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz -o "$archive" HEAD
tpu scp "$archive" "$TPU:moresjax.tar.gz" --worker=all

train=$(printf ' %q' train --distributed --join-timeout 120 --config "$1" --workdir "$2" "${@:3}")
tpu ssh "$TPU" --worker=all --command "
  set -e
  mkdir -p moresjax && tar xzf moresjax.tar.gz -C moresjax && cd moresjax
  [ -d ~/venv ] || python3 -m venv ~/venv
  ~/venv/bin/pip install --quiet -e '.[tpu]'
  ~/venv/bin/moresjax$train"
