# Sourced by quickstart.sh and test.sh: makes .venv once and installs the pinned requirements when they change.
# Afterwards $PYTHON is the environment's interpreter. KILN_PYTHON names another base interpreter.

ensure_environment() {
    local base="${KILN_PYTHON:-}"
    if [ -z "$base" ]; then
        for candidate in python3.11 python3.12 python3.13 python3 python; do
            if command -v "$candidate" >/dev/null 2>&1 \
                && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
                base="$candidate"
                break
            fi
        done
    fi
    if [ -z "$base" ]; then
        echo "error: no Python 3.11 or newer found; install one or set KILN_PYTHON to its path" >&2
        exit 2
    fi
    if [ ! -e .venv/bin/python ] && [ ! -e .venv/Scripts/python.exe ]; then
        echo "Making a virtual environment in .venv ..."
        "$base" -m venv .venv
    fi
    PYTHON=.venv/bin/python
    [ -e "$PYTHON" ] || PYTHON=.venv/Scripts/python.exe # Windows (Git Bash)
    local wanted installed=.venv/.kiln-requirements
    wanted="$(cat "$@" | cksum)"
    if [ "$(cat "$installed" 2>/dev/null || true)" != "$wanted" ]; then
        echo "Installing the pinned requirements (a few minutes the first time) ..."
        local arguments=()
        for file in "$@"; do arguments+=(-r "$file"); done
        "$PYTHON" -m pip install --disable-pip-version-check --quiet "${arguments[@]}"
        echo "$wanted" >"$installed"
    fi
}
