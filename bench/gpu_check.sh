#!/usr/bin/env bash
# Build, test and measure on a machine with an NVIDIA GPU, without a network.
#
#   bash bench/gpu_check.sh                build, tests, memory checks, benchmarks: under ten minutes
#   QUICK=1 bash bench/gpu_check.sh        small sizes only
#   TUNE=1 bash bench/gpu_check.sh         search the Triton configuration tables too, in the time that is left
#   STEPS="build tests" bash ...           only these (machine build info tests editors memcheck racecheck bench tune)
#   OUT=folder bash bench/gpu_check.sh     where tables and logs go (default: bench/results)
#   LIMIT=900 bash bench/gpu_check.sh      seconds for everything (default: 570)
#
# Needs python3 with torch, triton, pytest, hypothesis, pybind11, ninja and setuptools, and nvcc; with transformers too,
# memory editors and serving are measured. Nothing is downloaded; the card's settings are left alone. Every step has its
# own limit, its log <step>.log, and what it has written when it is stopped is kept. The last lines are a summary; the
# exit status is that of the first step that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
out=${OUT:-bench/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
status=0
total=${LIMIT:-570}
summary=()
linked=$root/build/site  # only if an editable install is not possible: see install_editable
rm -rf "$linked"
trap 'if [ -d "$linked" ]; then rm -rf "$linked"; rm -f "$root/fastedit/kernels" "$root/fastedit/bench"; fi' EXIT
export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 TRITON_DEFAULT_FP_FUSION=1
unset TRITON_INTERPRET
capability=$(python3 -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null)
if [ -z "$capability" ]; then
  echo "gpu_check: torch sees no GPU on this machine" >&2
  exit 1
fi
# code for this GPU alone keeps the build short; 90 has instructions of its own behind 90a
if [ -z "${FASTEDIT_CUDA_ARCHS:-}" ]; then
  if [ "$capability" = 90 ]; then FASTEDIT_CUDA_ARCHS=90a; else FASTEDIT_CUDA_ARCHS=$capability; fi
fi
export FASTEDIT_CUDA_ARCHS FASTEDIT_CUDA=1
export MAX_JOBS=${MAX_JOBS:-$(nproc)}

wanted() { [ -z "${STEPS:-}" ] || [[ " $STEPS " == *" $1 "* ]]; }

step() {  # step <name> <seconds> <command...>: run it with a time limit, keep its output, remember how it ended
  local name=$1 limit=$2 begin=$SECONDS code=0 left=$((total - SECONDS)) how=ok
  shift 2
  wanted "${name%%_*}" || return 0
  if [ "$left" -lt 10 ]; then
    summary+=("$(printf '%-22s %5s   not run: %s s are over' "$name" - "$total")")
    [ $status = 0 ] && status=124
    return 0
  fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  echo "== $name"
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  tail -n "${LINES_SHOWN:-12}" "$out/$name.log"
  if [ $code = 124 ] || [ $code = 137 ]; then how="stopped after $limit s"; elif [ $code != 0 ]; then how="exit status $code"; fi
  summary+=("$(printf '%-22s %5ss  %s' "$name" $((SECONDS - begin)) "$how")")
  if [ $code != 0 ] && [ $status = 0 ]; then status=$code; fi
  return 0
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  nvcc --version | tail -n 2
  python3 -c 'import torch, triton, sys; print(sys.version.split()[0], torch.__version__, triton.__version__)'
}
install_editable() {
  python3 -m pip install -q --no-index --no-build-isolation --no-deps -e . 2>&1 && return 0
  echo "editable install failed; building in place and linking the kernels instead"
  mkdir -p "$linked"
  ln -sfn "$root/fastedit" "$linked/fastedit"
  # from a folder without pyproject.toml, of which setuptools before 77 refuses the licence
  (cd "$linked" && python3 "$root/setup.py" build_ext --inplace) || return 1
  ln -sfn "$root/kernels" "$root/fastedit/kernels"
  ln -sfn "$root/bench" "$root/fastedit/bench"
}
sanitize() {  # the CUDA kernels at small sizes; torch's own kernels are not looked at
  local tool=$1
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed: not run"; return 0; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --kernel-name kns=fastedit --error-exitcode 9 \
    --target-processes all python3 -m pytest -q -p no:cacheprovider -p no:xdist -W default tests/ops/test_gpu.py \
    -k "cuda and neighbours or cuda and ranks and carried or cuda and fill and 768 or float64_on_the_cuda"
}
export -f machine install_editable sanitize
export root linked

LINES_SHOWN=6 step machine 30 bash -c machine
LINES_SHOWN=4 step build 180 bash -c install_editable
if [ -d "$linked" ]; then export PYTHONPATH=$linked${PYTHONPATH:+:$PYTHONPATH}; fi
LINES_SHOWN=60 step info 40 python3 -c '
from fastedit.ops import backend
for row in backend.table():
    print(row.op.ljust(20), row.backend.ljust(7), row.device.ljust(5), "yes" if row.available else row.reason)'
tests=(tests/ops)
[ -d tests/csrc ] && tests+=(tests/csrc)
workers=()  # kernels compile at their first launch: several processes shorten that
python3 -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
LINES_SHOWN=30 step tests 220 python3 -m pytest -q "${workers[@]}" --maxfail=20 -W default -p no:cacheprovider "${tests[@]}"
if python3 -c 'import transformers' 2>/dev/null; then
  LINES_SHOWN=20 step editors 60 python3 -m pytest -q "${workers[@]}" --maxfail=20 -W default -p no:cacheprovider tests/editors/test_on_gpu.py
else
  summary+=("$(printf '%-22s %5s   not run: transformers is not installed' editors -)")
fi
LINES_SHOWN=4 step memcheck 60 bash -c 'sanitize memcheck'
LINES_SHOWN=4 step racecheck 60 bash -c 'sanitize racecheck'

extra=()
[ -n "${QUICK:-}" ] && extra=(--quick)
# every hot path that `fastedit bench` knows; they share the time that is left
read -r -a stems <<<"$(python3 -c 'from fastedit.cli.bench import STEMS; print(*STEMS)')"
left=${#stems[@]}
reserve=0
[ -n "${TUNE:-}" ] && reserve=90
whole=  # benchmarks of whole models need transformers
if python3 -c 'import transformers' 2>/dev/null; then whole=yes reserve=$((reserve + 100)); fi
for stem in "${stems[@]}"; do
  share=$(((total - SECONDS - reserve) / left))
  LINES_SHOWN=70 step "bench_$stem" $((share < 20 ? 20 : share)) python3 "bench/$stem.py" --device cuda --out "$out" "${extra[@]}"
  left=$((left - 1))
done
if [ -n "$whole" ]; then
  LINES_SHOWN=6 step bench_memory_editing 50 python3 bench/memory_editing.py --device cuda --out "$out"
  LINES_SHOWN=30 step bench_serving 50 python3 bench/serving.py --device cuda --out "$out" --models gpt2-small-shape \
    --batches 1 64 --new-tokens 16 --repetitions 3
else
  summary+=("$(printf '%-22s %5s   not run: transformers is not installed' bench_serving -)")
fi
if [ -n "${TUNE:-}" ]; then
  LINES_SHOWN=40 step tune $((total - SECONDS)) python3 bench/tune.py --seconds $((total - SECONDS - 15)) --out "$out"
fi

echo "== summary (details in $out)"
printf '%s\n' "${summary[@]}"
exit $status
