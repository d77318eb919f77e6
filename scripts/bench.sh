#!/usr/bin/env bash
# What `make bench` does: every program benchmarks/*/bench_*.py that needs no engine, one after another, in the development environment.
# Each says in its own help what it measures, and writes its raw result beside it. Arguments choose by part of the path.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$(scripts/find_python.sh)}
environment=$("$python" scripts/environments.py dev)
export PATH=$environment/bin:$PATH VIRTUAL_ENV=$environment

found=0
for program in benchmarks/*/bench_*.py; do
  [[ -f $program ]] || continue
  chosen=$(($# == 0))
  for word in "$@"; do [[ $program == *"$word"* ]] && chosen=1; done
  ((chosen)) || continue
  found=1
  echo "== $program =="
  "$environment/bin/python" "$program"
done
((found)) || { echo "error: no benchmark matches '$*'; there are: $(echo benchmarks/*/bench_*.py)" >&2; exit 2; }
