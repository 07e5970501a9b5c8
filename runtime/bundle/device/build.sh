#!/usr/bin/env bash
# Build with trtexec, 10.x or 11.x: ./build.sh. Further options go to trtexec as they are.
# out/engine.plan is the engine to run. out/observed.plan is for verify.py alone: the same model, with what its routers
# do as outputs, so that flips can be told from faults.
# From 11.1 on trtexec compares the engine with the golden outputs too; verify.py does so with any version.
set -euo pipefail
cd "$(dirname "$0")"
trtexec=${TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}
help=$("$trtexec" --help 2>&1 || true)
knows() { grep -q -e "$1" <<<"$help"; }

mkdir -p out
options=(--noTF32 --skipInference --timingCacheFile=out/timing.cache)
options+=(@PROFILES@)
if knows --stronglyTyped; then options+=(--stronglyTyped); fi # 11.x builds no other networks
build() { # graph, engine, further options
  "$trtexec" --onnx="model/$1" --saveEngine="out/$2.part" "${options[@]}" "${@:3}"
  mv "out/$2.part" "out/$2"
}
build model.onnx engine.plan "$@"
@OBSERVED@
echo "built out/engine.plan; check it: python3 verify.py --backend tensorrt"

if knows --loadRefOutputs; then
  compare() {
    "$trtexec" --loadEngine=out/engine.plan --accuracyAlgorithm=lInf "$@" ||
      echo "trtexec sees a difference, and knows no routers: verify.py tells flips from faults"
  }
@CASES@
fi
