"""Helper of test_pretrain.py: pretrain.main with a tiny architecture, for each argument list of a JSON list in turn.

    RANK=0 WORLD_SIZE=2 ... python tests/pretrain_worker.py '[["--steps", "4", ...], ...]'
"""
import json
import os
import pathlib
import shutil
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
import pretrain  # noqa: E402
import vit  # noqa: E402

TINY = dict(dim=32, depth=2, heads=2)  # named in vit.ARCHS while pretrain's tests run, and in the worker's own process


def keep_every(atomic_save):
    """atomic_save that leaves a copy last_<step>.pt of each last.pt."""
    def save(obj, path):
        atomic_save(obj, path)
        if path.name == "last.pt":
            shutil.copy(path, path.with_name(f"last_{obj['step']}.pt"))
    return save


if __name__ == "__main__":
    vit.ARCHS["tiny"] = TINY
    vit.atomic_save = keep_every(vit.atomic_save)
    for argv in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(int(os.environ.get("MASTER_PORT", 29400)) + 1)
        pretrain.main(argv)
