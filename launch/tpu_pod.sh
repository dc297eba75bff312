#!/usr/bin/env bash
# A training run on a Cloud TPU pod slice.
#
#   launch/tpu_pod.sh create            make the slice (a queued resource) and wait for it
#   launch/tpu_pod.sh install           copy this checkout to every host and install it
#   launch/tpu_pod.sh run configs/lvm_3b.py /mnt/shared/runs/lvm_3b [--config.a.b=v ...]
#   launch/tpu_pod.sh logs | stop | delete
#
# Settings, all from the environment: TPU_NAME, TPU_ZONE, TPU_TYPE (v5litepod-256), TPU_PROJECT,
# TPU_VERSION (v2-alpha-tpuv5-lite), TPU_SPOT=1. Every command may be repeated.
set -euo pipefail

: "${TPU_NAME:?name of the slice}" "${TPU_ZONE:?zone, for example us-west4-a}"
: "${TPU_PROJECT:=$(gcloud config get-value project)}"
: "${TPU_TYPE:=v5litepod-256}" "${TPU_VERSION:=v2-alpha-tpuv5-lite}"
where=(--zone="$TPU_ZONE" --project="$TPU_PROJECT")

# Saves a checkpoint and waits for the end. Brackets: the pattern must not match this very command.
stop='pkill -TERM -f "[v]lm_jax[.]main"; while pgrep -f "[v]lm_jax[.]main" >/dev/null; do sleep 1; done'

on_all() { gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker=all --command="$1"; }

case "${1:-}" in
  create)
    if ! gcloud compute tpus queued-resources describe "$TPU_NAME" "${where[@]}" >/dev/null 2>&1; then
      gcloud compute tpus queued-resources create "$TPU_NAME" "${where[@]}" --node-id="$TPU_NAME" \
        --accelerator-type="$TPU_TYPE" --runtime-version="$TPU_VERSION" ${TPU_SPOT:+--spot}
    fi
    until gcloud compute tpus tpu-vm describe "$TPU_NAME" "${where[@]}" --format='value(state)' \
      2>/dev/null | grep -qx READY; do
      echo "waiting for $TPU_NAME ..."; sleep 30
    done ;;
  install)
    root=$(cd "$(dirname "$0")/.." && pwd)
    archive=$(mktemp --suffix=.tar.gz)
    git -C "$root" archive --format=tar.gz --prefix=vlm_jax_src/ -o "$archive" HEAD
    gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:vlm_jax.tar.gz" "${where[@]}" --worker=all
    on_all 'tar xzf vlm_jax.tar.gz && python3 -m venv --upgrade-deps env &&
      env/bin/pip install -q -e "vlm_jax_src[data,logging,tpu]" -c vlm_jax_src/constraints.txt' ;;
  run)
    config=${2:?recipe} workdir=${3:?work directory that all hosts see}; shift 3
    flags=$(printf ' %q' "$@")
    # nohup: the run outlives the connection. One process a host; main finds the others itself.
    on_all "$stop"
    on_all "cd vlm_jax_src && nohup ../env/bin/python -m vlm_jax.main \
      --config=$(printf %q "$config") --workdir=$(printf %q "$workdir")$flags > ../run.log 2>&1 &" ;;
  logs) gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${where[@]}" --worker=0 --command='tail -f run.log' ;;
  stop) on_all "$stop" ;;
  delete) gcloud compute tpus queued-resources delete "$TPU_NAME" "${where[@]}" --force ;;
  *) sed -n '2,11p' "$0"; exit 2 ;;
esac
