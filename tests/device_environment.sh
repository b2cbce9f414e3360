#!/usr/bin/env bash
# The device's side in an environment that has nothing but the base dependencies: the built wheel inspects, plans,
# adapts on token ids, and refuses a budget that cannot be met.
#
#     tests/device_environment.sh PYTHON TINY [REQUIREMENTS]
#
# TINY is a folder that samples/tiny_llama.py wrote; REQUIREMENTS a file of versions to install beside the wheel, the
# newest where there is none.
set -euo pipefail
python=$1 tiny=$(realpath "$2") requirements=${3:-/dev/null}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/lean"
bin=$work/lean/bin
"$bin/pip" wheel --quiet --no-deps --wheel-dir "$work/dist" "$root"
"$bin/pip" install --quiet "$work"/dist/*.whl --constraint "$requirements"
for package in torch transformers peft optimum onnx onnxscript onnx_ir tokenizers psutil; do
  if "$bin/python" -c "import $package" 2>/dev/null; then
    echo "the lean environment has $package"
    exit 1
  fi
done
"$bin/python" -c 'import numpy, onnxruntime, sys; print(sys.version, "numpy", numpy.__version__, "onnxruntime", onnxruntime.__version__)'

cd "$work"
edgepeft=$bin/edgepeft
$edgepeft --help
$edgepeft inspect "$tiny/tiny.edge"
$edgepeft plan "$tiny/tiny.edge" --budget 256MiB --seq-len 32
$edgepeft adapt "$tiny/tiny.edge" --data "$tiny/tokenized.jsonl" --budget 256MiB --steps 20 --seq-len 32 --lr 5e-3 \
  -o adapted
test -s adapted/adapter_model.safetensors
if $edgepeft adapt "$tiny/tiny.edge" --data "$tiny/tokenized.jsonl" --budget 8MiB -o none; then
  echo "a budget of 8 MiB was accepted"
  exit 1
elif [ $? -ne 3 ]; then
  echo "a budget that cannot be met must exit with 3"
  exit 1
fi
test ! -e none
