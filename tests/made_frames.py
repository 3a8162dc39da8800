"""Frames that the tests make: pictures with structure, files that cannot be read."""
import numpy as np
import pytest
from PIL import Image


def picture(seed, height=120, width=150):
    """A PIL frame with structure at every scale, as an endoscope's has."""
    rng = np.random.default_rng(seed)
    grids = [rng.integers(0, 256, (n, n, 3), dtype=np.uint8) for n in (3, 12, 48)]
    layers = [np.asarray(Image.fromarray(grid).resize((width, height), Image.BICUBIC), np.float32)
              for grid in grids]
    mixed = 0.5 * layers[0] + 0.3 * layers[1] + 0.2 * layers[2]
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def save(path, image=None, **options):
    """Write an image, by default a tiny one that the path's name determines, and its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = tuple(path.stem.encode().rjust(3)[-3:])
    image = image or Image.new("RGB", (16, 12), colour)
    image.save(path, **options)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """12 JPEG frames in three videos."""
    root = tmp_path_factory.mktemp("frames")
    for i in range(12):
        save(root / f"video{i % 3}" / f"{i:02d}.jpg", picture(i), quality=95)
    return root


def bad_files(root):
    """One file of every kind that cannot be read."""
    root.mkdir(exist_ok=True)
    whole = save(root / "whole.jpg", picture(0)).read_bytes()
    (root / "whole.jpg").unlink()
    (root / "truncated.jpg").write_bytes(whole[:len(whole) // 2])
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.png").write_text("no image")
    save(root / "absurd.png", Image.new("1", (9000, 9000)))
    return sorted(root.iterdir()) + [root / "missing.jpg", root]
