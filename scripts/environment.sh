# Sourced by the scripts beside it and by .ci/run: one virtual environment for all of them.
#
# WEIGHTSPACE_VENV    where it is (default: .venv in the repository)
# WEIGHTSPACE_PYTHON  the interpreter that makes it (default: the first of python3.11 and python3)
#
# shellcheck shell=bash

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="${WEIGHTSPACE_VENV:-$root/.venv}"
case "$venv" in
    /*) ;;
    *) venv="$PWD/$venv" ;;
esac

# Progress goes to standard error: what a script prints stays clean.
step() { printf '==> %s\n' "$*" >&2; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

is_recent_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${WEIGHTSPACE_PYTHON:+"$WEIGHTSPACE_PYTHON"} python3.11 python3; do
        if is_recent_python "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "Python 3.11 or later is needed; set WEIGHTSPACE_PYTHON to one"
}

make_venv() {
    if "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    if [[ -e "$venv" && ! -e "$venv/pyvenv.cfg" && -n "$(ls -A -- "$venv")" ]]; then
        fail "$venv exists and is not a virtual environment; set WEIGHTSPACE_VENV to another place"
    fi
    local python
    python="$(find_python)"
    step "making a virtual environment in $venv with $("$python" --version)"
    # --clear mends one that was interrupted half-way.
    "$python" -m venv --clear "$venv"
}

# What an installation depends on: the two files, the interpreter, and where the editable package lies.
fingerprint() {
    "$venv/bin/python" - "$root" <<'PYTHON'
import hashlib, pathlib, sys

digest = hashlib.sha256(f"{sys.version}\n{sys.argv[1]}\n".encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update(pathlib.Path(sys.argv[1], name).read_bytes())
print(digest.hexdigest())
PYTHON
}

# install_environment [EXTRA...]: the package, editable, with these extras and what constraints.txt pins.
# Does nothing when the last installation had them all and neither file has changed since.
install_environment() {
    make_venv
    local stamp="$venv/weightspace-installed" current extra missing=0 installed=""
    current="$(fingerprint)"
    if [[ -f "$stamp" && "$(head -n 1 "$stamp")" == "$current" ]]; then
        installed="$(tail -n +2 "$stamp")"
    fi
    for extra in package "$@"; do
        grep -qxF -- "$extra" <<<"$installed" || missing=1
    done
    if ((!missing)); then
        step "environment is up to date ($venv)"
        return
    fi
    local target="$root" extras
    if (($#)); then
        extras="$(IFS=,; printf '%s' "$*")"
        target="${root}[${extras}]"
    fi
    step "installing weightspace${extras:+ with $extras} (minutes, the first time)"
    rm -f -- "$stamp"
    "$venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" --editable "$target"
    {
        printf '%s\n' "$current"
        printf '%s\n' package "$@" "$installed" | sed '/^$/d' | sort -u
    } >"$stamp.new"
    mv -f -- "$stamp.new" "$stamp"
    step "installed in $venv"
}

# Test workers are processes: with one thread each they fill the cores and do not fight for them.
one_thread_each() {
    export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1
}
