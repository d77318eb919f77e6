#!/usr/bin/env bash
# Prefill and decode apart, by hand: two engines, the Conductor, some requests. README.md beside this file explains it.
#
#   run.sh MODEL
#
# PREFILL_PORT, DECODE_PORT, CONDUCTOR_PORT and CONSOLE_PORT change the ports, ENGINE_ARGS adds arguments for the engines.
set -euo pipefail

model=${1:?usage: run.sh MODEL}
prefill_port=${PREFILL_PORT:-8100} decode_port=${DECODE_PORT:-8200}
conductor_port=${CONDUCTOR_PORT:-8000} console_port=${CONSOLE_PORT:-9464}
logs=$(mktemp -d "${TMPDIR:-/tmp}/prefill-decode-XXXXXX")
parts=()

# Each part gets a process group of its own, so that an engine's child processes end with it.
start() {
  local name=$1
  shift
  echo "+ $*"
  setsid "$@" >"$logs/$name.log" 2>&1 &
  parts+=($!)
}

stop() {
  trap - EXIT INT TERM
  for part in "${parts[@]}"; do kill -TERM -- "-$part" 2>/dev/null || true; done
  for _ in {1..40}; do
    alive=0
    for part in "${parts[@]}"; do if kill -0 -- "-$part" 2>/dev/null; then alive=1; fi; done
    if ((!alive)); then break; fi
    sleep 0.5
  done
  for part in "${parts[@]}"; do kill -KILL -- "-$part" 2>/dev/null || true; done
  wait
  echo "stopped; logs are in $logs"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

wait_for() { # wait_for NAME PID PORT
  for _ in {1..600}; do
    if curl -sf -o /dev/null "http://127.0.0.1:$3/health"; then return; fi
    if ! kill -0 "$2" 2>/dev/null; then
      echo "$1 has ended:" >&2
      tail -n 20 "$logs/$1.log" >&2
      exit 1
    fi
    sleep 0.5
  done
  echo "$1 was not ready within 5 minutes, see $logs/$1.log" >&2
  exit 1
}

# 1. The secret: whoever has this file may take part.
export MOONCAKE_SECRET_FILE=$logs/secret
(umask 077 && head -c 32 /dev/urandom | base64 >"$MOONCAKE_SECRET_FILE")

# 2. Two engines. On a CPU, vLLM must be told how much memory the KVCache gets, and not to bind both to the same cores.
export VLLM_HOST_IP=127.0.0.1 VLLM_CPU_OMP_THREADS_BIND=${VLLM_CPU_OMP_THREADS_BIND:-nobind}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
common=(--host 127.0.0.1 --served-model-name model --enforce-eager --max-model-len 2048 --kv-cache-memory-bytes 67108864)
read -r -a more <<<"${ENGINE_ARGS:-}"
start prefill vllm serve "$model" --port "$prefill_port" "${common[@]}" "${more[@]}" --kv-connector mooncake --kv-role prefill
start decode vllm serve "$model" --port "$decode_port" "${common[@]}" "${more[@]}" --kv-connector mooncake --kv-role decode
wait_for prefill "${parts[0]}" "$prefill_port"
wait_for decode "${parts[1]}" "$decode_port"

# 3. The Conductor.
start conductor mooncake conductor --port "$conductor_port" --console-port "$console_port" \
  --prefill "http://127.0.0.1:$prefill_port" --decode "http://127.0.0.1:$decode_port"
wait_for conductor "${parts[2]}" "$conductor_port"

# 4. Requests: a plain one, then a streamed chat.
endpoint=http://127.0.0.1:$conductor_port
prompt=$(printf 'the moon is a cake, and %.0s' {1..20})
body=$(printf '{"model": "model", "prompt": "%s", "max_tokens": 16, "temperature": 0}' "$prompt")
echo "+ curl $endpoint/v1/completions"
curl -sS --fail-with-body "$endpoint/v1/completions" -H 'content-type: application/json' -d "$body"
echo
chat='{"model": "model", "messages": [{"role": "user", "content": "What is the moon?"}], "max_tokens": 8, "stream": true}'
echo "+ curl $endpoint/v1/chat/completions"
curl -sS --fail-with-body "$endpoint/v1/chat/completions" -H 'content-type: application/json' -d "$chat"

# 5. What the decode engine counted. pulls_ok: prompts whose KVCache came from the prefill engine.
echo "+ curl http://127.0.0.1:$decode_port/metrics"
curl -sS "http://127.0.0.1:$decode_port/metrics" | grep '^mooncake_handoff_events_total' | sed -E 's/.*event="([^"]*)".*\} /\1 /'
