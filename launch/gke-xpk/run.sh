#!/usr/bin/env bash
# A TPU slice on GKE through xpk. Usage:
#   CLUSTER=name TPU_TYPE=v5litepod-16 launch/gke-xpk/run.sh CONFIG /shared/runs/x [...]
set -euo pipefail
[[ $# -ge 2 && -n ${CLUSTER:-} && -n ${TPU_TYPE:-} ]] || {
  echo "usage: CLUSTER=name TPU_TYPE=type $0 CONFIG WORKDIR [--config.key=value ...]" >&2
  exit 2
}
workload=${WORKLOAD:-moresjax-$(date +%m%d-%H%M%S)}
image=${IMAGE:?set IMAGE to a docker image with moresjax[tpu] installed}
train=$(printf ' %q' moresjax train --distributed --join-timeout 600 --config "$1" --workdir "$2" "${@:3}")

xpk config set send-telemetry false # no usage statistics
xpk workload create --cluster="$CLUSTER" --workload="$workload" --tpu-type="$TPU_TYPE" \
  --num-slices="${SLICES:-1}" --docker-image="$image" --command="$train"
