#!/usr/bin/env bash
# A benchmark on a node of the cluster: jobs/benchmark.sh NAME [arguments ...]
#
#   jobs/benchmark.sh verifier --check
#
# NAME is a module of benchmarks/. It gets a core of its own and, with GPUS=N, so many GPUs of one node.
set -euo pipefail
cd "$(dirname "$0")/.."
if (($# < 1)) || [[ ! -f benchmarks/$1.py && ! -f benchmarks/$1/__main__.py ]]; then
  echo "usage: jobs/benchmark.sh NAME [arguments ...]; NAME is a module of benchmarks/" >&2
  exit 2
fi
name=$1
shift
exec ray job submit --working-dir . --entrypoint-num-cpus 1 --entrypoint-num-gpus "${GPUS:-0}" -- \
  python -m "benchmarks.$name" "$@"
