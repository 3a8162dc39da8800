"""One training step of eight frames, as numbers and pictures: the page docs/step.md.

    python -m docs.step               # from the repository's root: ten seconds of a CPU

The page is its own source. Its blocks of Python run one after another in one namespace; what
they print replaces the block of text under each, and the pictures are drawn from what they leave
behind.
"""
import argparse
import contextlib
import io
import pathlib
import re

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import data
import figures
import synthetic

PAGE = pathlib.Path(__file__).with_name("step.md")
KINDS = "polyp", "cecum", "pylorus", "z-line", "mayo-0", "mayo-2", "mayo-3", "retroflex-stomach"
CODE = re.compile(r"```python\n(.*?)```\n\n```text\n(.*?)```", re.S)  # each with what it prints


def eight_frames(folder):
    """Path of a folder of eight synthetic frames of 256 px, made if it is not there."""
    for i, kind in enumerate(KINDS):
        path = pathlib.Path(folder) / f"{i}-{kind}.jpg"
        if not path.exists():
            synthetic.write_job(dict(kind=kind, patient=i, place=0, seed=0, size=256, scope=1,
                                     video=False, images=[path], masks=None))
    return str(folder)


def show(tensors):
    """A line for every tensor of a dict: its name, shape, type, least and largest value."""
    for name, x in tensors.items():
        if torch.is_tensor(x):
            kind, shape = str(x.dtype).removeprefix("torch."), str(tuple(x.shape))
            number = ".0f" if kind in ("uint8", "int64", "bool") else ".3f"
            print(f"{name:16}{shape:18}{kind:9}{x.min():{number}} to {x.max():{number}}")


def run(text):
    """(the page with what its code prints today, the names that the code leaves behind)."""
    names = {}

    def again(found):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(found[1], names)
        return f"```python\n{found[1]}```\n\n```text\n{out.getvalue()}```"
    return CODE.sub(again, text), names


# --- pictures ------------------------------------------------------------------------------------


def picture_of_crops(batch, folder):
    """A column for each frame: its global crops as the teacher sees them, then with patches hidden
    as the student does, then its local crops."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    whole, parts = ([TF.to_pil_image((crop * std + mean).clamp(0, 1)) for crop in batch[name]]
                    for name in ("global_crops", "local_crops"))
    B = len(whole) // 2
    hidden = [figures.hide(crop, mask) for crop, mask in zip(whole, batch["masks"])]
    rows = {"teacher: global 1": whole[:B], "teacher: global 2": whole[B:],
            "student: global 1": hidden[:B], "student: global 2": hidden[B:]}
    rows |= {f"student: local {i + 1}": parts[i * B:][:B] for i in range(len(parts) // B)}
    cells = [[(name if b == 0 else "", crop) for b, crop in enumerate(crops)]
             for name, crops in rows.items()]
    figures.save(figures.grid(cells, width=98), folder / "step-crops.jpg", quality=78)


def picture_of_targets(maps, folder, scale=5):
    """Matrices {caption: (rows, K)} below each other: white 0, black the largest value of each."""
    cells = []
    for caption, p in maps.items():
        grey = (255 * (1 - p / p.max())).to(torch.uint8).numpy()
        big = np.kron(grey, np.ones((scale, scale), np.uint8))
        cells.append([(caption, Image.fromarray(big).convert("RGB"))])
    page = figures.grid(cells, gap=6)
    page = page.quantize(32, dither=Image.Dither.NONE)
    figures.save(page, folder / "step-targets.png", optimize=True)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m docs.step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=PAGE.parent, type=pathlib.Path,
                        help="folder of step.md and its pictures (default: docs)")
    args = parser.parse_args(argv)
    text, names = run(PAGE.read_text())
    picture_of_crops(names["batch"], args.out)
    picture_of_targets({
        "the teacher's plain softmax: 16 crops, 128 prototypes": names["plain"],
        "after Sinkhorn-Knopp: the targets": names["targets"].flatten(0, 1)}, args.out)
    (args.out / PAGE.name).write_text(text)
    print(f"wrote {args.out / PAGE.name}, step-crops.jpg, step-targets.png")


if __name__ == "__main__":
    main()
