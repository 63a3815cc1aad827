#!/bin/sh
# Runs the GPU tests under compute-sanitizer: memcheck, racecheck, initcheck and synccheck must report nothing.
# Needs an installed grinqh, an NVIDIA GPU and the CUDA toolkit. Usage: scripts/gpu_check.sh [pytest options]
set -eu
cd "$(dirname "$0")/../tests/gpu"
# Torch's caching allocator would hide reads past the end of a tensor.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# Threads, graphs and torch.compile are torch's own work, and slow under the sanitizer.
skip="not compiles and not graph and not threads and not opcheck and not runs_are_bit_equal"
for tool in memcheck racecheck initcheck synccheck; do
  echo "== $tool" >&2
  compute-sanitizer --tool "$tool" --error-exitcode 1 --kernel-name-exclude kernel_substring=at:: \
    python3 -m pytest -q -p no:cacheprovider -k "$skip" "$@" .
done
