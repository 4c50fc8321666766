#!/usr/bin/env bash
# One round (or all that are not done) as a Ray job: jobs/round.sh ROUND|all [conf=NAME] [key=value ...]
#
#   export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265    # see cluster.yaml
#   jobs/round.sh 3 conf=rstar_math problems.path=/shared/problems.parquet
#
# This directory travels with the job, without what .gitignore names; models, data and runs stay on shared storage. Ray
# does not start a dead driver again: the same command does, and continues where it was. `ray job stop` ends in good order,
# for which Ray leaves 3 s by itself, and a minute here; then it kills the driver, which costs trees that still grow.
set -euo pipefail
if (($# < 1)); then
  echo "usage: jobs/round.sh ROUND|all [conf=NAME] [key=value ...]" >&2
  exit 2
fi
round=$1
shift
[[ $round == all ]] || set -- "$@" "round=$round"
cd "$(dirname "$0")/.."
stop='{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}'
exec ray job submit --working-dir . --runtime-env-json "$stop" -- python -m evolve.driver "$@"
