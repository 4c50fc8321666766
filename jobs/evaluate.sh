#!/usr/bin/env bash
# Evaluate what a round has trained, on any problems: jobs/evaluate.sh RUN ROUND [key=value ...]
#
#   jobs/evaluate.sh /shared/runs/rstar-math-7b 4 problems.test_path=/shared/aime.jsonl evaluate.samples=64
#
# Round 0 is the base model. The table is in the job's log and in RUN/evaluations (see benchmarks/evaluation.py).
set -euo pipefail
if (($# < 2)); then
  echo "usage: jobs/evaluate.sh RUN ROUND [key=value ...]" >&2
  exit 2
fi
run=$1 round=$2
shift 2
cd "$(dirname "$0")/.."
exec ray job submit --working-dir . -- python -m benchmarks.evaluation "$run" --round "$round" "$@"
