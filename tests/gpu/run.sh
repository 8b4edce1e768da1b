#!/usr/bin/env bash
# Everything that wants a GPU, in one go: builds with CUDA, holds every kernel and the device decoder to the CPU on fresh
# random data, tells the tiny model's golden stories on the GPU, prints the benchmark table. Needs nvcc, g++ and CMake; no
# network. What it prints goes to tests/gpu/results/ with date, device and commit.
#   tests/gpu/run.sh [--layers N] [--scratch FOLDER] [--story MODEL_DIR]
# --layers: of the 7B-shape model (32: 3.8 GB on disk and on the GPU). --story: stories260K, packed; made with
# `sparse-run convert` where Python has what that needs and SPARSE_RUN_TEST_SHARED names the test data.
set -euo pipefail
cd "$(dirname "$0")/../.."

layers=32 scratch=${TMPDIR:-/tmp} story=
while [ $# -gt 0 ]; do
  case $1 in
    --layers) layers=$2 ;;
    --scratch) scratch=$2 ;;
    --story) story=$2 ;;
    *) echo "usage: $0 [--layers N] [--scratch FOLDER] [--story MODEL_DIR]" >&2; exit 2 ;;
  esac
  shift 2
done
for tool in nvcc g++ cmake nvidia-smi; do
  command -v "$tool" >/dev/null || { echo "$tool is missing: $0 needs the CUDA toolkit, g++, CMake and a GPU" >&2; exit 1; }
done

device=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
build=${SPARSE_RUN_TEST_BUILD:-build/gpu-tests}
mkdir -p tests/gpu/results
result=tests/gpu/results/$(date +%Y-%m-%d-%H%M)-$(echo "${device%%,*}" | tr -c 'A-Za-z0-9\n' '-').txt
exec > >(tee "$result") 2>&1
printf 'date %s\ndevice %s\ncommit %s\nnvcc %s\n' "$(date -u +%FT%TZ)" "$device" "$commit" "$(nvcc --version | grep -o 'release [0-9.]*')"
failed=0
step() { printf '\n== %s\n' "$*"; "$@" || { echo "FAILED: $*"; failed=1; }; }

# For this machine's GPU only: a fifth of the time.
[ -e "$build/CMakeCache.txt" ] || cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DSPARSE_RUN_CUDA=ON -DSPARSE_RUN_TESTS=ON \
  -DSPARSE_RUN_PYTHON=OFF -DCMAKE_CUDA_ARCHITECTURES=native >/dev/null
cmake --build "$build" --parallel "$(nproc)" --target products_check vector_check decoder_check gpu_bench generate_story |
  grep -E 'error|warning' || true

step "$build/products_check"
step "$build/vector_check"
step "$build/decoder_check"
command -v compute-sanitizer >/dev/null && step compute-sanitizer --error-exitcode 9 "$build/products_check" "leaving columns"

if [ -z "$story" ] && [ -n "${SPARSE_RUN_TEST_SHARED:-}" ]; then
  story=$(mktemp -d)/story
  python3 tests/gpu/golden.py pack "$SPARSE_RUN_TEST_SHARED/data/models/stories260K" "$story" || story=
fi
if [ -n "$story" ]; then step python3 tests/gpu/golden.py tell "$build/generate_story" "$story"
else echo "no golden stories: give --story MODEL_DIR, or SPARSE_RUN_TEST_SHARED and a Python with sparse_run"; fi

step "$build/gpu_bench" "$layers" "$scratch"
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then step python3 tests/gpu/torch_fp16.py "$layers"
else echo "no PyTorch with CUDA: no fp16 figures beside these"; fi

printf '\n%s; kept in %s\n' "$([ $failed = 0 ] && echo 'all checks passed' || echo 'SOMETHING FAILED')" "$result"
exit $failed
