#!/usr/bin/env bash
# check_wheel.sh WHEEL SDIST: installs the wheel into a fresh environment where no compiler is found, scores with it,
# and runs the fast tests of the sdist, whose own package is taken away, against it.
set -euo pipefail
wheel=$(realpath "$1") sdist=$(realpath "$2") constraints=$(realpath "$(dirname "$0")/../constraints.txt")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export CC=false CXX=false
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints" "$wheel[test,report,augment,serve,test-serve,lora]"
tar -xzf "$sdist" -C "$folder" --strip-components=1
rm -r "$folder/icl_ft_fast"
cd "$folder"
env/bin/icl-ft-fast --version
env/bin/icl-ft-fast doctor
printf '%s\n' '{"id": "q", "prompt": "Rivers:", "choices": [" the Tagus", " the Alps"], "answer": 0}' > questions.jsonl
env/bin/icl-ft-fast score --model shipped --questions questions.jsonl --out scores.jsonl
test -s scores.jsonl
make -o .venv/tested BIN=env/bin test-fast
