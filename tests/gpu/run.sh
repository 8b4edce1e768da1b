#!/usr/bin/env bash
# Everything that wants a GPU, in one go: builds with CUDA, holds every kernel, the device decoder and divided models
# to the CPU on fresh random data, tells the tiny model's golden stories on the GPU, has compute-sanitizer look for
# races, prints the benchmark table. How a short session is best used: tests/gpu/README.md.
#   tests/gpu/run.sh [--only PART,PART...] [--layers N] [--scratch FOLDER] [--story MODEL_DIR] [--results FOLDER]
#                    [--rehearse]
# --only: some of build, check, stories, bench, torch, profile, sanitize; the others are left out, so that a session
#   that is cut into short commands can go on where it was. A program that hangs is stopped after
#   SPARSE_RUN_STEP_LIMIT seconds (570).
# --layers: of the 7B-shape model (32: 3.8 GB on disk and on the GPU).
# --story: stories260K, packed (`python3 tests/gpu/golden.py pack STORIES_DIR MODEL_DIR` where Python has what that
#   needs); else it is made here from SPARSE_RUN_TEST_SHARED.
# --rehearse: where there is no GPU, emulated and at the smallest sizes: shows that every part of this works; its
#   figures mean nothing.
# Needs nvcc (or CUDACXX), g++, CMake, Python 3, a GPU and its nvidia-smi; no network. PyTorch with CUDA and
# Nsight Compute (ncu) and compute-sanitizer are used where they are. Prints into tests/gpu/results/ with date, device
# and commit (SPARSE_RUN_COMMIT where there is no git), line by line, so that a session that is cut off has kept what it
# found.
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() {
  sed -n 's/^#   tests/usage: tests/p; s/^#       *\[/  [/p' "$0" >&2
  exit 2
}
layers=32 scratch=${TMPDIR:-/tmp} story='' results=tests/gpu/results rehearse=0
only=build,check,stories,bench,torch,profile,sanitize
limit=${SPARSE_RUN_STEP_LIMIT:-570}
while [ $# -gt 0 ]; do
  if [ "$1" = --rehearse ]; then rehearse=1 layers=0; shift; continue; fi
  [ $# -ge 2 ] || usage
  case $1 in
    --only) only=$2 ;;
    --layers) layers=$2 ;;
    --scratch) scratch=$2 ;;
    --story) story=$2 ;;
    --results) results=$2 ;;
    *) usage ;;
  esac
  shift 2
done
for part in ${only//,/ }; do
  case $part in
    build | check | stories | bench | torch | profile | sanitize) ;;
    *) echo "no part '$part'" >&2; usage ;;
  esac
done
part() { case ",$only," in *",$1,"*) return 0 ;; *) return 1 ;; esac; }

[ -n "${CUDACXX:-}" ] || [ $rehearse = 1 ] || PATH=$PATH:/usr/local/cuda/bin
tools=(g++ cmake python3)
[ $rehearse = 1 ] || tools+=("${CUDACXX:-nvcc}" nvidia-smi)
for tool in "${tools[@]}"; do
  command -v "$tool" >/dev/null && continue
  echo "$tool is missing: $0 needs the CUDA toolkit, g++, CMake, Python 3 and a GPU" >&2
  exit 1
done

device='emulated, no GPU' compiler='none'
if [ $rehearse = 0 ]; then
  # sed reads to the end: a program that is cut off by `head` would have failed.
  device=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | sed -n 1p)
  compiler=$("${CUDACXX:-nvcc}" --version | grep -o 'release [0-9.]*')
fi
commit=${SPARSE_RUN_COMMIT:-$(git describe --always --dirty 2>/dev/null || echo unknown)}
build=${SPARSE_RUN_TEST_BUILD:-build/gpu-tests}
mkdir -p "$results"
result=$results/$(date +%Y-%m-%d-%H%M%S)-$(echo "${device%%,*}" | tr -c 'A-Za-z0-9\n' '-').txt
exec > >(tee "$result") 2>&1
printf 'date %s\ndevice %s\ncommit %s\nnvcc %s\n' "$(date -u +%FT%TZ)" "$device" "$commit" "$compiler"
failed=0
step() {
  printf '\n== %s (%d s)\n' "$*" "$SECONDS"
  "$@" || { echo "FAILED: $*"; failed=1; }
}
# A program: stopped where it hangs.
program() { step timeout --kill-after=10 "$limit" "$@"; }

checks=(products_check vector_check decoder_check split_check)
teller=generate_story
[ $rehearse = 0 ] || teller=generate_story_emulated
make_programs() {
  # For this machine's GPU only: a fifth of the time. CMake before 3.24 knows no "native".
  local gpu
  gpu=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sed -n 1p | tr -dc 0-9 || true)
  local cuda=(-DSPARSE_RUN_CUDA=ON "-DCMAKE_CUDA_ARCHITECTURES=${gpu:-native}")
  [ $rehearse = 0 ] || cuda=()
  [ -e "$build/CMakeCache.txt" ] || cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DSPARSE_RUN_TESTS=ON \
    -DSPARSE_RUN_PYTHON=OFF "${cuda[@]}" >"$build.log" || { cat "$build.log"; return 1; }
  cmake --build "$build" --parallel "$(nproc)" --target "${checks[@]}" gpu_bench "$teller" >"$build.log" ||
    { grep -E 'error|warning' "$build.log" || tail -40 "$build.log"; return 1; }
}
if part build; then
  mkdir -p "$(dirname "$build")"
  step make_programs
  [ $failed = 0 ] || { echo "nothing was built, so nothing is run; kept in $result"; exit 1; }
fi

if part check; then
  if [ $rehearse = 1 ]; then
    step "$build/products_check" "damaged input"
    step "$build/split_check" "plan of a division"
  else
    for name in "${checks[@]}"; do program "$build/$name"; done
    # The two other ways of decoding (cpp/kernels/cuda/README.md).
    program env SPARSE_RUN_CUDA_OVERLAP=1 "$build/decoder_check"
    program env SPARSE_RUN_CUDA_GRAPHS=0 "$build/decoder_check"
  fi
fi

if part stories; then
  if [ -z "$story" ] && [ -n "${SPARSE_RUN_TEST_SHARED:-}" ]; then
    story=$(mktemp -d)/story
    python3 tests/gpu/golden.py pack "$SPARSE_RUN_TEST_SHARED/data/models/stories260K" "$story" || story=''
  fi
  if [ -z "$story" ]; then
    echo "no golden stories: give --story MODEL_DIR, or SPARSE_RUN_TEST_SHARED and a Python with sparse_run's needs"
  elif [ $rehearse = 1 ]; then
    program python3 tests/gpu/golden.py tell "$build/$teller" "$story" 4
  else
    program python3 tests/gpu/golden.py tell "$build/$teller" "$story"
    program env SPARSE_RUN_CUDA_OVERLAP=1 python3 tests/gpu/golden.py tell "$build/$teller" "$story"
  fi
fi

if part bench; then program "$build/gpu_bench" "$layers" "$scratch"; fi
if part torch; then
  if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null ||
    { [ $rehearse = 1 ] && python3 -c 'import torch' 2>/dev/null; }; then
    program python3 tests/gpu/torch_fp16.py "$layers"
  else
    echo "no PyTorch with CUDA: no fp16 figures beside these"
  fi
fi

if part profile; then
  # What each kernel of a decoded token takes, one after the other: two layers of the shape, without graphs.
  kernels='regex:gemv|rows|prepare|heads|attend|merge|activate'
  metrics=gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
  metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__grid_size
  if [ $rehearse = 1 ]; then
    program env SPARSE_RUN_CUDA_GRAPHS=0 "$build/gpu_bench" 0 "$scratch" decode
  elif command -v ncu >/dev/null; then
    program env SPARSE_RUN_CUDA_GRAPHS=0 ncu --kernel-name "$kernels" --metrics $metrics --launch-skip 40 \
      --launch-count 44 "$build/gpu_bench" 2 "$scratch" decode
  else
    echo "no ncu: kernels are not timed one by one"
  fi
fi

# Last: it takes long, and some drivers and virtual machines refuse it, which says nothing about the kernels.
sanitize() {
  if [ $rehearse = 1 ] || ! command -v compute-sanitizer >/dev/null; then
    echo "no compute-sanitizer is run: $([ $rehearse = 1 ] && echo rehearsed || echo it is not here)"
    return 0
  fi
  # A case that uses the GPU. Kept whole before it is looked at: a pipe's status would be that of a program whose
  # reader had seen enough.
  local tool said status=0
  said=$(timeout --kill-after=10 $((limit < 60 ? limit : 60)) \
    compute-sanitizer --error-exitcode 9 "$build/products_check" "damaged input" 2>&1) || status=$?
  case $said in
    *'not supported'*)
      echo "compute-sanitizer is refused by this device: not run"
      return 0
      ;;
  esac
  if [ $status = 124 ] || [ $status = 137 ]; then
    echo "compute-sanitizer hangs here: not run"
    return 0
  fi
  for tool in memcheck racecheck synccheck; do
    program compute-sanitizer --tool $tool --error-exitcode 9 "$build/products_check" "leaving columns"
    program compute-sanitizer --tool $tool --error-exitcode 9 "$build/vector_check" attention
    program compute-sanitizer --tool $tool --error-exitcode 9 "$build/vector_check" likeliest
    [ $tool != racecheck ] || program compute-sanitizer --tool $tool --error-exitcode 9 "$build/vector_check" stream
    program compute-sanitizer --tool $tool --error-exitcode 9 "$build/decoder_check" "captured once"
  done
}
if part sanitize; then sanitize; fi

verdict='all of it passed'
[ $failed = 0 ] || verdict='SOMETHING FAILED'
printf '\n%s (%d s); kept in %s\n' "$verdict" "$SECONDS" "$result"
exit $failed
