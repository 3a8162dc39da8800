#!/usr/bin/env bash
# All of it, on two cores: synthetic frames, curation, pre-training with an online probe, three probes, their heads on a
# video, pictures.
#
#     ./demo.sh                      everything; the results lie in runs/demo
#     DEMO_STEPS=20 ./demo.sh        a quick look at every stage; the results lie in runs/demo-20
#
# Stopped half-way, the same command goes on: a stage that is done has left its printed output in NAME.md and is skipped.
set -euo pipefail
trap 'exit 130' INT TERM
cd "$(dirname "$0")"
export PYTHONUNBUFFERED=1

steps=${DEMO_STEPS:-200}
out=runs/demo${DEMO_STEPS:+-$DEMO_STEPS}
python=${PYTHON:-.venv/bin/python}
if ! "$python" -c 'import torchvision, tqdm' 2>/dev/null; then  # not there, or its set-up was stopped half-way
    if [ -n "${PYTHON:-}" ]; then
        echo "PYTHON=$PYTHON cannot import torchvision and tqdm" >&2
        exit 1
    fi
    python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt
fi
mkdir -p "$out"

stage() {  # NAME COMMAND...: run the command unless it is done; what it prints is kept in NAME.md
    local kept=$out/$1.md
    shift
    if [ -e "$kept" ]; then
        printf '== %s: done before\n' "$kept"
        return
    fi
    printf '\n== %s\n' "$*"
    "$@" | tee -i "$kept.part"
    mv "$kept.part" "$kept"
}

# shellcheck disable=SC2086  # DEMO_FRAMES holds several flags
stage frames "$python" synthetic.py data/synthetic ${DEMO_FRAMES:-} --sheet "$out/synthetic.png"
stage curation "$python" curate.py --data data/synthetic/unlabelled --out "$out/curated" --target "${DEMO_TARGET:-250}" \
    --duplicate 0.97  # synthetic frames of a video resemble each other more than real ones
stage pretraining "$python" pretrain.py --arch vitt14 --recipe demo --data "$out/curated/manifest.csv" --out "$out" \
    --steps "$steps" --probe-every $((steps / 4 + 1))
teacher=$out/teacher_$steps.pt  # not best.pt: of so few scores the best is chance
if [ ! -e "$teacher" ]; then  # a signal ended it, after it had saved
    rm -f "$out/pretraining.md"
    exit 130
fi
stage landmarks "$python" probe_classify.py "$teacher" --size 98
stage polyps "$python" probe_segment.py "$teacher" --heads linear --steps 200
stage mes "$python" probe_mes.py "$teacher" --size 98 --splits 3
heads=("$out/teacher_$steps".{landmarks.linear,polyps.linear,mes.ordinal}.pt)
stage predictions "$python" predict.py "$teacher" --heads "${heads[@]}" --data data/synthetic/unlabelled/video0000 \
    --overlays 4 --out "$out/predicted"

frames=(data/synthetic/Kvasir-SEG/images/*_0.jpg)
stage crops "$python" data.py --data data/synthetic/unlabelled --show "$out/crops.png"
stage tokens "$python" vit.py "$teacher" "${frames[@]:0:4}" --show "$out/tokens.png"
stage curve "$python" probe_mes.py --curve "$out"
stage histogram "$python" probe_mes.py --histogram --out "$out/histogram.png"

cat "$out"/{landmarks,polyps,mes,curve}.md
"$python" - "$out/log.jsonl" <<'END'
import json, sys
loss = [row["loss"] for row in map(json.loads, open(sys.argv[1])) if "loss" in row]
print(f"\nTotal pre-training loss: {loss[0]:.3f} at the first step, {loss[-1]:.3f} at the last logged one")
END
printf '\nPictures:\n'
ls -1 "$out"/*.png "$out"/curated/*.png "$out"/predicted/*.png "$out"/predicted/overlays/*
