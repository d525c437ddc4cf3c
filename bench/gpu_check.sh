#!/usr/bin/env bash
# Build, test and measure on a machine with an NVIDIA GPU, without a network.
#
#   bash bench/gpu_check.sh                build, tests, benchmarks: under ten minutes
#   QUICK=1 bash bench/gpu_check.sh        small sizes only
#   OUT=folder bash bench/gpu_check.sh     where tables and logs go (default: bench/results)
#
# Needs python3 with torch, triton, pytest, hypothesis, pybind11, ninja and setuptools, and nvcc. Nothing is
# downloaded; the card's settings are left alone. The last lines are a summary; the exit status is that of the
# first step that failed.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
out=${OUT:-bench/results}
mkdir -p "$out"
out=$(cd "$out" && pwd)
status=0
summary=()
linked=$root/build/site  # only if an editable install is not possible: see install_editable
rm -rf "$linked"
trap 'if [ -d "$linked" ]; then rm -rf "$linked" "$root/fastedit/kernels"; fi' EXIT
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

step() {  # step <name> <seconds> <command...>: run it with a time limit, keep its output, remember how it ended
  local name=$1 limit=$2 begin=$SECONDS code=0
  shift 2
  echo "== $name"
  timeout "$limit" "$@" >"$out/$name.log" 2>&1 || code=$?
  tail -n "${LINES_SHOWN:-12}" "$out/$name.log"
  summary+=("$(printf '%-22s %5ss  %s' "$name" $((SECONDS - begin)) "$([ $code = 0 ] && echo ok || echo "exit status $code")")")
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
  python3 setup.py build_ext --inplace || return 1
  mkdir -p "$linked"
  ln -sfn "$root/fastedit" "$linked/fastedit"
  ln -sfn "$root/kernels" "$root/fastedit/kernels"
}
export -f machine install_editable
export root linked

LINES_SHOWN=6 step machine 30 bash -c machine
LINES_SHOWN=4 step build 180 bash -c install_editable
if [ -d "$linked" ]; then export PYTHONPATH=$linked${PYTHONPATH:+:$PYTHONPATH}; fi
LINES_SHOWN=20 step info 40 python3 -c '
from fastedit.ops import backend
for row in backend.table():
    print(row.op.ljust(20), row.backend.ljust(7), row.device.ljust(5), "yes" if row.available else row.reason)'
tests=(tests/ops)
[ -d tests/csrc ] && tests+=(tests/csrc)
workers=()  # kernels compile at their first launch: several processes shorten that
python3 -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
LINES_SHOWN=30 step tests 160 python3 -m pytest -q "${workers[@]}" --maxfail=20 -W default -p no:cacheprovider "${tests[@]}"
extra=()
[ -n "${QUICK:-}" ] && extra=(--quick)
for stem in covariance low_rank; do
  LINES_SHOWN=70 step "bench_$stem" 95 python3 "bench/$stem.py" --device cuda --out "$out" "${extra[@]}"
done

echo "== summary (details in $out)"
printf '%s\n' "${summary[@]}"
exit $status
