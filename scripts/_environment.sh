# Sourced by the other scripts: prepares .venv (made if missing, brought up to date if its inputs changed).
#
#   prepare_environment server        what serving needs: torch, diffusers, tritonserver
#   prepare_environment server test   and the test tools
#
# Afterwards $ROOT is the repository and $PYTHON the environment's interpreter. Nothing is downloaded when nothing
# changed, and two scripts started at once wait for one another. TRITON_DIFFUSION_PYTHON names another base interpreter.
# shellcheck shell=bash

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
PYTHON="$VENV/bin/python"
CONSTRAINTS="$ROOT/scripts/constraints.txt"

# The last build of this wheel whose server survives the cancel of a gRPC stream; it carries tritonserver 2.51.0.
TRITONSERVER_WHEEL="nvidia-pytriton==0.5.13"

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

has_gpu() {
    command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU
}

has_tritonserver() {
    [[ -n "${TRITONSERVER:-}" ]] || command -v tritonserver >/dev/null || [[ -x /opt/tritonserver/bin/tritonserver ]]
}

# tritonserver's Python backend comes with stubs for certain versions, and our code needs 3.11.
find_base_python() {
    local candidate
    for candidate in ${TRITON_DIFFUSION_PYTHON:-python3 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 found; install one (Debian, Ubuntu: apt-get install python3.12 python3.12-venv)," \
        "or name it in TRITON_DIFFUSION_PYTHON"
}

# Everything that decides what is in the environment, as one line; the settings of the tools do not.
environment_fingerprint() {
    local accelerator=cpu server=wheel
    has_gpu && accelerator=cuda
    has_tritonserver && server=system
    printf '%s %s %s ' "$accelerator" "$server" "$("$1" -VV | tr -d '\n')"
    sed '/^\[tool\.ruff\]/,$d' "$ROOT/pyproject.toml" \
        | cat - "$CONSTRAINTS" "$ROOT/scripts/_environment.sh" | sha256sum | cut -c1-64
}

# run_step "what happens" command...: quiet, with a line that shows the seconds; on failure the end of the output.
run_step() {
    local what="$1" log="$ROOT/.cache/environment.log" started=$SECONDS pid
    shift
    if [[ ! -t 2 ]]; then printf '%s ...' "$what" >&2; fi
    # A process group of its own, so that all of it can be ended with this script.
    set -m
    "$@" >"$log" 2>&1 &
    pid=$!
    set +m
    trap 'kill -TERM -- "-$pid" 2>/dev/null' EXIT
    while kill -0 "$pid" 2>/dev/null; do
        if [[ -t 2 ]]; then printf '\r%s ... %d s' "$what" $((SECONDS - started)) >&2; fi
        sleep 0.5
    done
    trap - EXIT
    if wait "$pid"; then
        if [[ -t 2 ]]; then printf '\r%s ... ' "$what" >&2; fi
        printf ' done in %d s\n' $((SECONDS - started)) >&2
    else
        printf ' failed\n' >&2
        tail -n 15 "$log" >&2
        return 1
    fi
}

pip_install() {
    "$PYTHON" -m pip install --disable-pip-version-check --no-input --constraint "$CONSTRAINTS" "$@"
}

# "===" compares the version as a string. With "==" a CPU build (2.13.0+cpu) that pip can see counts as newer than
# the CUDA build (2.13.0), and would be taken on a machine with a GPU.
install_torch() {
    local version
    version="$(sed -n 's/^torch==//p' "$CONSTRAINTS")"
    if has_gpu; then
        pip_install "torch===$version"
    else
        # The CPU build spares gigabytes of CUDA libraries, where an index or a folder that pip knows has it.
        pip_install "torch==$version+cpu" || pip_install "torch==$version"
    fi
}

make_environment() {
    local base="$1" fingerprint="$2" extras
    shift 2
    extras="$(IFS=,; echo "$*")"
    if [[ -x "$PYTHON" ]] && ! "$PYTHON" -c "import sys; sys.exit(sys.base_prefix != '$("$base" -c 'import sys; print(sys.base_prefix)')')"; then
        rm -rf "$VENV"
    fi
    if [[ ! -x "$PYTHON" ]]; then
        run_step "making $(basename "$VENV")" "$base" -m venv "$VENV" \
            || { rm -rf "$VENV"; fail "python -m venv failed; on Debian and Ubuntu it needs the package python3-venv"; }
    fi
    run_step "installing torch" install_torch || fail "torch could not be installed"
    run_step "installing triton-diffusion [$extras]" pip_install --editable "$ROOT[$extras]" \
        || fail "the dependencies could not be installed"
    if ! has_tritonserver; then
        # Its metadata wants an old numpy for Python code that we do not use.
        run_step "installing tritonserver" pip_install --no-deps "$TRITONSERVER_WHEEL" \
            || fail "tritonserver could not be installed"
    fi
    mkdir -p "$VENV/prepared"
    local extra
    for extra in "$@"; do echo "$fingerprint" >"$VENV/prepared/$extra"; done
}

is_prepared() {
    local fingerprint="$1" extra
    shift
    [[ -x "$PYTHON" ]] || return 1
    for extra in "$@"; do
        [[ "$(cat "$VENV/prepared/$extra" 2>/dev/null)" == "$fingerprint" ]] || return 1
    done
}

prepare_environment() {
    local base fingerprint
    base="$(find_base_python)"
    fingerprint="$(environment_fingerprint "$base")"
    is_prepared "$fingerprint" "$@" && return
    mkdir -p "$ROOT/.cache"
    exec 9>"$ROOT/.cache/environment.lock"
    flock 9
    # Another script may have done it while this one waited.
    is_prepared "$fingerprint" "$@" || make_environment "$base" "$fingerprint" "$@"
    exec 9>&-
}
