#!/usr/bin/env bash
# From nothing to a table: a zoo of INRs fitted to digits, a picture of it, and four metanetworks that
# read the digit from the weights. Everything lands in demo/; run it again and it goes on where it stopped.
#
# WEIGHTSPACE_VENV and WEIGHTSPACE_PYTHON: see environment.sh.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
# shellcheck disable=SC2119
install_environment

models=(mlp statistics dws probe)
cd -- "$root"
mkdir -p demo
SECONDS=0

weightspace() {
    printf '\n$ weightspace %s\n' "$*" >&2
    "$venv/bin/weightspace" "$@"
}

weightspace generate digits-inr -o demo/digits.h5 --views 5 --seed 0
weightspace show demo/digits.h5 -o demo/digits.png --overwrite
for model in "${models[@]}"; do
    # fewer passes than the defaults, which are meant for larger zoos
    epochs=10
    [[ $model == dws ]] && epochs=12
    weightspace train demo/digits.h5 --model "$model" --epochs "$epochs" -o "demo/$model"
done
for model in "${models[@]}"; do
    weightspace evaluate "demo/$model" --json >"demo/$model.json"
done

printf '\n'
"$venv/bin/python" - "${models[@]}" <<'PYTHON'
import json
import pathlib
import sys

print(f"{'model':<12} test accuracy")
for model in sys.argv[1:]:
    report = json.loads(pathlib.Path("demo", f"{model}.json").read_text())
    print(f"{model:<12} {report['metrics']['accuracy']:.3f}")
PYTHON
printf '\n%d min %02d s; the picture is demo/digits.png\n' $((SECONDS / 60)) $((SECONDS % 60))
