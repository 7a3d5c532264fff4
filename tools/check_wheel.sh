#!/usr/bin/env bash
# The wheel and the sdist as a stranger gets them: built, looked at by twine, and the wheel used in an empty environment, far from
# the repository, with a given Python and torch.
#
#   tools/check_wheel.sh python3.10 torch==2.6.0 [pip arguments for torch, e.g. an index]
set -euo pipefail
PYTHON=${1:-python3}
TORCH=${2:-torch}
shift $(($# < 2 ? $# : 2))
ROOT=$(cd "$(dirname "$0")/.." && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

"$PYTHON" -m venv "$WORK/build"
"$WORK/build/bin/pip" install --quiet --disable-pip-version-check build twine
git -C "$ROOT" archive HEAD | tar -x -C "$(mkdir -p "$WORK/source" && echo "$WORK/source")"
"$WORK/build/bin/python" -m build --outdir "$WORK/dist" "$WORK/source" > "$WORK/build.log" 2>&1 || { tail -30 "$WORK/build.log"; exit 1; }
"$WORK/build/bin/twine" check --strict "$WORK"/dist/*

"$PYTHON" -m venv "$WORK/env"
PIP="$WORK/env/bin/pip install --quiet --disable-pip-version-check"
$PIP "$@" "$TORCH"
WHEEL=$(echo "$WORK"/dist/*.whl)
$PIP "$WHEEL"
mkdir "$WORK/far" && cd "$WORK/far"
DD2="$WORK/env/bin/dd2"
"$DD2" --version
"$DD2" env
"$DD2" distill digits --out run --regress.iterations 4 --regress.guidance-iterations 2 --regress.pairs 256 --csd.iterations 2 \
    --teacher-samples 1024 --csd.validation 128 --csd.match.prime 256 --loop.preview-every 0
"$DD2" evaluate run --count 200 --metrics.kid-subsets 2 --metrics.halves 2 --no-speed
"$DD2" sample run --count 20 --steps 3 --out grid.png
"$DD2" export run shipped --with-teacher --license mit
case "$TORCH" in
*2.6*) echo "graphs need a newer torch than 2.6" ;;
*) "$DD2" export run one_pass.pt2 --format torch ;;
esac
"$WORK/env/bin/python" - <<'PY'
from dd2 import OneStepPipeline

pipe = OneStepPipeline.from_pretrained("shipped")
images = pipe(labels=[3, "seven"], seeds=[0, 1], num_inference_steps=2).images
assert [image.size for image in images] == [(16, 16)] * 2
PY
echo "the wheel works: $("$WORK/env/bin/python" -V), $("$WORK/env/bin/python" -c 'import torch; print("torch", torch.__version__)')"
