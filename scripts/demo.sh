#!/usr/bin/env bash
# What `make demo` does: the environment with vLLM for CPUs, a small local model, then scripts/demo.py with the given arguments.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$(scripts/find_python.sh)}

echo "== environment (vLLM for CPUs; some minutes the first time) =="
environment=$("$python" scripts/environments.py vllm)
echo "$environment"

model=.demo/model
if [[ ! -f $model/config.json ]]; then
  echo "== model (random weights, made here) =="
  rm -rf "$model.new"
  "$environment/bin/python" examples/tiny_model/make_tiny_model.py "$model.new"
  mv "$model.new" "$model"
fi

echo "== demo =="
export PATH=$environment/bin:$PATH VIRTUAL_ENV=$environment HF_HUB_OFFLINE=1
exec "$environment/bin/python" scripts/demo.py --model "$model" "$@"
