#!/usr/bin/env bash
# Sets up what the tests need (a virtual environment in .venv) and runs them all. Arguments go to pytest.
set -eu
cd "$(dirname "$0")"
source tools/environment.sh
ensure_environment requirements.txt requirements-dev.txt
# Two OpenMP threads on a busy small machine can be ten times slower than one.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest "$@"
