#!/usr/bin/env bash
# What `make bench` does: the benchmarks that need no engine, one after another, in the development environment. Each prints its table; to
# keep raw results, run it by hand with --out or --json (benchmarks/README.md). Arguments choose by part of the path.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$(scripts/find_python.sh)}
environment=$("$python" scripts/environments.py dev)
export PATH=$environment/bin:$PATH VIRTUAL_ENV=$environment

programs=(benchmarks/transfer/handoff_shapes.py benchmarks/handoff/shapes.py benchmarks/conductor/overhead.py)
found=0
for program in "${programs[@]}"; do
  chosen=$(($# == 0))
  for word in "$@"; do [[ $program == *"$word"* ]] && chosen=1; done
  ((chosen)) || continue
  found=1
  echo "== $program =="
  "$environment/bin/python" "$program"
done
((found)) || { echo "error: no benchmark matches '$*'; there are: ${programs[*]}" >&2; exit 2; }
