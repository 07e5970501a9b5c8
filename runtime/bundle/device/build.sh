#!/usr/bin/env bash
# Build the engine with trtexec, 10.x or 11.x: ./build.sh. Further options go to trtexec as they are.
# From 11.1 on trtexec compares it with the golden outputs too; verify.py does so with any version.
set -euo pipefail
cd "$(dirname "$0")"
trtexec=${TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}
help=$("$trtexec" --help 2>&1 || true)
knows() { grep -q -e "$1" <<<"$help"; }

mkdir -p out
options=(--onnx=model/model.onnx --saveEngine=out/engine.plan.part --noTF32 --skipInference)
options+=(--timingCacheFile=out/timing.cache)
options+=(@PROFILES@)
if knows --stronglyTyped; then options+=(--stronglyTyped); fi # 11.x builds no other networks
"$trtexec" "${options[@]}" "$@"
mv out/engine.plan.part out/engine.plan
echo "built out/engine.plan; check it: python3 verify.py --backend tensorrt"

if knows --loadRefOutputs; then
  compare() {
    "$trtexec" --loadEngine=out/engine.plan --accuracyAlgorithm=lInf "$@" ||
      echo "trtexec sees a difference, and knows no routers: verify.py tells flips from faults"
  }
@CASES@
fi
