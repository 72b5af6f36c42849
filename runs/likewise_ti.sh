#!/usr/bin/env bash
# Pretrain Likewise's ViT-Ti/8 (5.5 M parameters) with SOP, from nothing, in slices that continue each other.
#
#   runs/likewise_ti.sh OUT PICTURES...              until it is done
#   MINUTES=9 runs/likewise_ti.sh OUT PICTURES...    one slice; exit code 75 means: the same command continues
#   INIT=OUT/fp16 runs/likewise_ti.sh OUT2 PICTURES...    go on from the weights of an earlier lease
#
# Stage 1 at 64 px with masked patches (SOP-MIM), stage 2 at 128 px from its weights, image-level objective. Each stage is an
# ordinary run: OUT/stage1 and OUT/stage2 hold run.json (recipe, seed, versions, revision, digest of the pictures), the
# checkpoints, and report.html. At the end OUT/fp16 holds the encoder's weights as float16 in shards of at most 15 MiB, and
# OUT/bundle its ONNX bundle. On a machine without a GPU: SMALL=1 proves the chain in two minutes with vit_nano.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2; }
out=$1; shift
mkdir -p "$out"
likewise=${LIKEWISE:-likewise}
minutes=${MINUTES:-100000}
steps1=${STEPS1:-40000}; steps2=${STEPS2:-3000}; seed=${SEED:-0}
encoder=(--encoder vit_tiny_patch16_224 --patch-size 8)
size1=64; size2=128
extra1=(--preset paper --koleo-weight 0.1 --batch-size "${BATCH:-1024}")
extra2=(--preset small --batch-size 512 --layer-decay 0.8)
if [ -n "${SMALL:-}" ]; then
  encoder=(--encoder vit_nano --patch-size 8); size1=32; size2=48
  steps1=${STEPS1:-60}; steps2=${STEPS2:-20}
  extra1=(--preset small --mim-weight 1 --batch-size 32); extra2=(--preset small --batch-size 32)
fi
end=$((SECONDS + minutes * 60))

# One stage, as far as the slice goes: SIGUSR1 saves, and the run goes on with the next call.
stage() {
  local run=$1; shift
  [ -f "$run/done" ] && return 0
  local left=$((end - SECONDS))
  [ "$left" -gt 0 ] || { echo "likewise: the slice is over; the same command continues" >&2; exit 75; }
  local code=0
  timeout --signal=USR1 "$left" "$likewise" train "$@" --out "$run" --resume --seed "$seed" || code=$?
  case $code in
    0) touch "$run/done" ;;
    124 | 130) echo "likewise: the slice is over; the same command continues" >&2; exit 75 ;;
    *) exit "$code" ;;
  esac
}

init=()
[ -n "${INIT:-}" ] && init=(--init "$INIT")
stage "$out/stage1" "$@" "${encoder[@]}" --image-size $size1 --steps "$steps1" "${extra1[@]}" "${init[@]}"
stage "$out/stage2" "$@" "${encoder[@]}" --image-size $size2 --steps "$steps2" "${extra2[@]}" --init "$out/stage1"
[ -d "$out/bundle" ] || "$likewise" export "$out/stage2" --out "$out/bundle" --weights adapted --stored float16
[ -d "$out/fp16" ] || "$(dirname "$(command -v "$likewise")")/python" "$(dirname "$0")/fp16_shards.py" "$out/stage2" "$out/fp16"
echo "likewise: $out/bundle and $out/fp16 are done" >&2
