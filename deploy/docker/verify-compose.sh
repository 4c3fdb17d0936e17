#!/usr/bin/env bash
# Tests the containers end to end: build, start, a run inside, the inspector from outside, stop, and nothing left over.
# Prints PASS, or FAIL and what failed; exit code 0 or 1. Needs docker, docker-compose (1.29 or 2) and curl.
#
#   NETWORK=host       for Docker engines without bridge networks (default: bridge)
#   BASE_IMAGE=...     the base image, if the default can't be downloaded
#   SKIP_BUILD=1       use the existing image
#   ARGS='--set ...'   settings of the run (default: a short one)
#   *_PORT             see docker-compose.override.yml and docker-compose.host.yml
set -uo pipefail
cd "$(dirname "$0")/../.."

project=adaswitch-verify-$$
network=${NETWORK:-bridge}
files=(-f deploy/docker/docker-compose.yml -f "deploy/docker/docker-compose.${network/bridge/override}.yml")

if docker compose version >/dev/null 2>&1; then compose=(docker compose); else compose=(docker-compose); fi
compose+=(-p "$project" "${files[@]}")

ADASWITCH_INSPECTOR_TOKEN=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
export ADASWITCH_INSPECTOR_TOKEN
export ARGS=${ARGS---set trainer.num_steps=3 --set trainer.prompts_per_step=16 --set trainer.warmup_steps=0 --set evaluation.data.max_prompts=16}
inspector=http://127.0.0.1:${INSPECTOR_PORT:-8642}

build_timeout_s=2400 healthy_timeout_s=600 run_timeout_s=1200 down_timeout_s=120

say() { printf '%s  %s\n' "$(date +%T)" "$*"; }
fail() {
  printf '\n'; say "FAIL: $*"
  timeout 60 "${compose[@]}" ps
  timeout 60 "${compose[@]}" logs --tail 40
  # An engine's own messages are in Ray's files, not in the job's log.
  timeout 60 "${compose[@]}" exec -T head sh -c 'grep -h -A 3 -E "Error|ERROR" /tmp/ray/session_latest/logs/worker-*.err | tail -n 40'
  bring_down
  exit 1
}
bring_down() { timeout "$down_timeout_s" "${compose[@]}" down --volumes --remove-orphans >/dev/null 2>&1; }
trap 'bring_down; exit 130' INT TERM

container() { "${compose[@]}" ps -q "$1"; }
health() { docker inspect --format '{{.State.Health.Status}}' "$(container "$1")" 2>/dev/null; }
api() { curl --silent --show-error --fail --max-time 20 -H "Authorization: Bearer $ADASWITCH_INSPECTOR_TOKEN" "$inspector/api/v1$1"; }
left() {  # everything with this project's name
  docker ps --all --quiet --filter "label=com.docker.compose.project=$project"
  docker volume ls --quiet --filter "label=com.docker.compose.project=$project"
  docker network ls --quiet --filter "label=com.docker.compose.project=$project"
}

if [ -z "${SKIP_BUILD:-}" ]; then
  say "building the image"
  timeout "$build_timeout_s" "${compose[@]}" build head || fail "the image can't be built"
fi

say "starting the services"
timeout "$healthy_timeout_s" "${compose[@]}" up --detach --no-build || fail "the services do not start"
for service in head worker inspector; do
  deadline=$((SECONDS + healthy_timeout_s))
  until [ "$(health "$service")" = healthy ]; do
    [ $SECONDS -lt $deadline ] || fail "$service is not healthy after $healthy_timeout_s s; its state is $(health "$service")"
    sleep 2
  done
  say "$service is healthy"
done

say "the run"
job=$(container job)
[ -n "$job" ] || job=$(docker ps --all --quiet --filter "label=com.docker.compose.project=$project" --filter "label=com.docker.compose.service=job")
code=$(timeout "$run_timeout_s" docker wait "$job") || fail "the job has not ended after $run_timeout_s s"
docker logs "$job" 2>&1 | grep -E 'step [0-9]+/|held out|accuracy|run folder'
[ "$code" = 0 ] || fail "the job ended with exit code $code"

say "the inspector, from outside"
user=$(docker exec "$(container head)" id -un) && [ "$user" != root ] || fail "the services run as ${user:-an unknown user}"
[ "$(curl --silent --output /dev/null --write-out '%{http_code}' --max-time 20 "$inspector/api/v1/runs")" = 401 ] ||
  fail "the inspector answers without a token"
sequences=$(api '/runs/demo/sequences?switched=true&limit=1') || fail "the inspector does not list the run's sequences"
sequence=$(python3 -c 'import json, sys; print(json.load(sys.stdin)["sequences"][0]["sequence_id"])' <<<"$sequences") ||
  fail "the run has no switched sequence, or the inspector does not show it: $sequences"
api "/runs/demo/sequences/$sequence/tokens" | python3 -c '
import json, sys

tokens = json.load(sys.stdin)["tokens"]
switches = [token for token in tokens if token["is_switch"]]
for token in tokens:
    if token["divergence"] is not None:
        mark = "  switch" if token["is_switch"] else ""
        print("{position:4}  {text!r:8}  {source:8}  {divergence:.4f} nats".format(**token) + mark)
sys.exit(not switches)' || fail "the inspector shows no decision of sequence $sequence"

say "stopping"
timeout "$down_timeout_s" "${compose[@]}" down --volumes --remove-orphans || fail "the services do not stop"
[ -z "$(left)" ] || fail "still there after down: $(left | tr '\n' ' ')"
say PASS
