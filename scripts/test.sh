#!/usr/bin/env bash
# Runs the tests in the repository's own virtual environment, which it makes or brings up to date first.
#
#   scripts/test.sh                        everything
#   scripts/test.sh tests/spec -k inverse  any arguments of pytest; paths are relative to the repository
#   scripts/test.sh -n 0 --pdb             in one process
#
# WEIGHTSPACE_VENV and WEIGHTSPACE_PYTHON: see environment.sh. WEIGHTSPACE_DATA: the folder of data sets
# (tests that need it are skipped without it).
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
install_environment dev

one_thread_each
cd -- "$root"
step "testing"
exec "$venv/bin/python" -m pytest -n 2 "$@"
