#!/usr/bin/env bash
# Sets up what the tests need (a virtual environment in .venv) and runs them all. Arguments go to pytest.
set -eu
cd "$(dirname "$0")"
source tools/environment.sh
ensure_environment requirements.txt requirements-dev.txt
# Two OpenMP threads on a busy small machine can be ten times slower than one.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Each worker goes through a half of the files and then takes over from the other: fixtures are rarely made twice.
exec "$PYTHON" -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal "$@"
