#!/bin/sh
# Print the Python to use: $PYTHON if it is set, else the first of python3, python3.14 … python3.11 that is 3.11 or newer.
# Says what to install if there is none, or if it cannot make virtual environments.
set -eu

is_new() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

found=
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
  if command -v "$candidate" >/dev/null && is_new "$candidate"; then
    found=$candidate
    break
  fi
done
if [ -z "$found" ]; then
  echo "error: ${PYTHON:-python3}: Python 3.11 or newer was not found; on Debian 12 or newer run: apt-get install python3 python3-venv" >&2
  exit 1
fi
if ! "$found" -c 'import ensurepip, venv' 2>/dev/null; then
  echo "error: $found cannot make virtual environments; on Debian run: apt-get install python3-venv" >&2
  exit 1
fi
command -v "$found"
