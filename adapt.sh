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
# The results lie in runs/adapted (ADAPT_OUT). Stopped half-way, the same command goes on. ADAPT_FLAGS are for pretrain.py.
set -euo pipefail
trap 'exit 130' INT TERM
if [ $# -lt 3 ]; then
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
weights=$1 frames=$2 kvasir=$3 other=${4:-} grades=${5:-}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/.venv/bin/python}
out=${ADAPT_OUT:-runs/adapted}
mkdir -p "$out"

# one manifest of all that is trained on; each labelled frame is a video of its own
"$python" - "$frames" "$kvasir" "$out/frames.csv" <<'END'
import csv, pathlib, sys
frames, kvasir, out = map(pathlib.Path, sys.argv[1:])
rows = [[p.resolve(), p.parent.relative_to(frames)] for p in sorted(frames.rglob("*"))
        if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp")]
train = [name.strip().removesuffix(".jpg") for name in (kvasir / "train.txt").read_text().split()]
rows += [[(kvasir / "images" / f"{name}.jpg").resolve(), f"Kvasir-SEG {name}"] for name in train]
if len(rows) == len(train):
    sys.exit(f"{frames}: no images found there")
with open(out, "w", newline="") as file:
    csv.writer(file).writerows([["path", "video"], *rows])
print(f"{out}: {len(rows) - len(train)} frames and the {len(train)} training images of {kvasir}")
END

# shellcheck disable=SC2086  # ADAPT_FLAGS holds several flags
"$python" "$here/pretrain.py" --recipe adapt --arch "${ADAPT_ARCH:-vits14}" --init "$weights" --data "$out/frames.csv" \
    --out "$out" ${ADAPT_FLAGS:-}
teacher=$(ls -v "$out"/teacher_*.pt | tail -n 1)
"$python" "$here/probe_segment.py" "$teacher" --against "$weights" --data "$kvasir" ${other:+--generalise "$other"} \
    --heads linear --size 224 --out "$out/polyps.json"
if [ -n "$grades" ]; then
    "$python" "$here/probe_mes.py" "$teacher" --against "$weights" --data "$grades" --out "$out/grades.json"
fi
mapfile -t test_frames < <(head -n 4 "$kvasir/val.txt" | tr -d '\r' | sed "s|\.jpg$||; s|.*|$kvasir/images/&.jpg|")
"$python" "$here/vit.py" "$weights" "${test_frames[@]}" --beside "$teacher" --show "$out/tokens.png"
