#!/bin/sh
# Runs the GPU tests under compute-sanitizer: memcheck, racecheck, initcheck and synccheck must report nothing. The four
# run beside each other, since they mostly wait for the processor.
# Needs an installed grinqh, an NVIDIA GPU and the CUDA toolkit. Usage: scripts/gpu_check.sh [pytest options]
set -eu
cd "$(dirname "$0")/../tests/gpu"
# Torch's caching allocator would hide reads past the end of a tensor.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
# Threads, graphs and torch.compile are torch's own work, and slow under the sanitizer.
skip="not compiles and not graph and not threads and not opcheck and not runs_are_bit_equal"
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
for tool in memcheck racecheck initcheck synccheck; do
  (
    status=0
    # Every block of the GEMV makes up to 32 barriers in shared memory, more than synccheck finds room for by itself.
    room=$([ "$tool" = synccheck ] && echo "--num-cuda-barriers 4096" || :)
    compute-sanitizer --tool "$tool" $room --error-exitcode 1 --kernel-name-exclude kernel_substring=at:: \
      python3 -m pytest -q -p no:cacheprovider -k "$skip" "$@" . >"$logs/$tool" 2>&1 || status=$?
    echo "$status" >"$logs/$tool.status"
  ) &
done
wait
failed=0
for tool in memcheck racecheck initcheck synccheck; do
  status=$(cat "$logs/$tool.status")
  echo "== $tool: exit $status"
  tail -n "$([ "$status" = 0 ] && echo 3 || echo 60)" "$logs/$tool"
  [ "$status" = 0 ] || failed=1
done
exit "$failed"
