#!/usr/bin/env bash
# Released weights, adapted to endoscopy, and what that brings: on your frames, with Kvasir-SEG and whatever else is there.
#
#     ./adapt.sh WEIGHTS FRAMES KVASIR_SEG [OTHER_POLYPS [HYPER_KVASIR]]
#
# WEIGHTS       released DINOv2 weights, a file or a name such as dinov2_vits14
# FRAMES        unlabelled frames, a folder for each video (ffmpeg's line in the README makes them)
# KVASIR_SEG    images/, masks/, train.txt, val.txt: the images of train.txt join the pre-training, those of val.txt test
# OTHER_POLYPS  another hospital's images/ and masks/, tested on alone; HYPER_KVASIR its ulcerative colitis grades
#
# The results lie in runs/adapted (ADAPT_OUT). Stopped half-way, the same command goes on. ADAPT_FLAGS are for pretrain.py:
# without a GPU it takes 450 steps, so that all of it ends within an hour of two cores; ADAPT_FLAGS="--steps 900" takes the recipe's.
set -euo pipefail
trap 'exit 130' INT TERM
if [ $# -lt 3 ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
weights=$1 frames=$2 kvasir=$3 other=${4:-} grades=${5:-}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/.venv/bin/python}
out=${ADAPT_OUT:-runs/adapted}
mkdir -p "$out"

# one manifest of all that is trained on; each labelled frame is a video of its own
PYTHONPATH=$here "$python" - "$frames" "$kvasir" "$out" <<'END'
import csv, os, sys
import data
from frozen import one_sentence
source, kvasir, out = sys.argv[1:]
with one_sentence():
    frames, polyps = data.Frames(source), data.open_labelled(kvasir, "polyps")
test = set(polyps.splits[0].test.tolist())
rows = [(frames.path(i), frames.video(i)) for i in range(len(frames))]
rows += [(path, f"Kvasir-SEG {data.stem(path)}") for i, path in enumerate(polyps.paths) if i not in test]
with open(f"{out}/frames.csv", "w", newline="") as file:
    csv.writer(file).writerows([("path", "video"), *((os.path.abspath(p), v) for p, v in rows)])
with open(f"{out}/test.txt", "w") as file:
    file.writelines(f"{polyps.paths[i]}\n" for i in sorted(test)[:4])
print(f"{out}/frames.csv: {len(frames)} frames and {len(rows) - len(frames)} training images of {kvasir}")
END

steps=$("$python" - <<'END'
import torch
print("" if torch.cuda.is_available() else "--steps 450")
END
)
# shellcheck disable=SC2086  # both hold several words; of a flag that is given twice the last holds
"$python" "$here/pretrain.py" --recipe adapt --arch "${ADAPT_ARCH:-vits14}" --init "$weights" --data "$out/frames.csv" \
    --out "$out" $steps ${ADAPT_FLAGS:-}
# its heads, teacher_450.polyps.linear.pt, come to lie beside it; none is there if a signal ended the run
teacher=$(find "$out" -maxdepth 1 -regex '.*/teacher_[0-9]*\.pt' | sort -V | tail -n 1)
[ -n "$teacher" ] || exit 130
"$python" "$here/probe_segment.py" "$teacher" --against "$weights" --data "$kvasir" ${other:+--generalise "$other"} \
    --heads linear --size 224 --out "$out/polyps.json"
if [ -n "$grades" ]; then
    "$python" "$here/probe_mes.py" "$teacher" --against "$weights" --data "$grades" --out "$out/grades.json"
fi
mapfile -t test_frames < "$out/test.txt"
"$python" "$here/vit.py" "$weights" "${test_frames[@]}" --beside "$teacher" --show "$out/tokens.png"
