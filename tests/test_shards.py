"""Frames in tar shards: the same as in folders, read at random; one sentence for one that is torn or has changed."""
import io
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import data
import shards


@pytest.fixture
def folder(tmp_path):
    """Six small frames in folders whose names sort differently as paths and as folders."""
    rng = np.random.default_rng(0)
    for name in ("z.png", "a/0.png", "a/1.jpg", "a-b/0.png", "a/deep/0.png", "a/été.png", ".hidden/0.png",
                 "a/notes.txt"):
        path = tmp_path / "frames" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("txt"):
            path.write_text("no frame")
        else:
            Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(path)
    return tmp_path / "frames"


def pack(folder, shard, format=tarfile.GNU_FORMAT):
    """What `tar -cf shard -C folder .` writes, in an order of its own."""
    with tarfile.open(shard, "w", format=format) as tar:
        for path in sorted(folder.rglob("*"), key=lambda p: p.name):
            tar.add(path, arcname=f"./{path.relative_to(folder)}", recursive=False)
    return shard


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_a_shard_holds_the_frames_of_its_folder_in_their_order(folder, tmp_path, format):
    shard = pack(folder, tmp_path / "frames.tar", format)
    plain, packed = data.Frames(folder), data.Frames(shard)
    names = [plain.name(i) for i in range(len(plain))]
    assert names == [packed.name(i) for i in range(len(packed))] and len(names) == 6
    assert plain.videos == packed.videos and plain.video_of.tolist() == packed.video_of.tolist()
    for i in torch.randperm(6).tolist():
        assert data.read_image(plain.path(i)).tobytes() == data.read_image(packed.path(i)).tobytes()
        assert data.stamp(packed.path(i))[0] == data.stamp(plain.path(i))[0]
    assert data.read_image(packed.path(0), draft=(8, 8)).size


def test_shards_lie_among_folders_in_manifests_and_below_class_folders(folder, tmp_path):
    root = tmp_path / "mixed"
    (root / "video").mkdir(parents=True)
    Image.new("RGB", (30, 30)).save(root / "video" / "0.png")
    pack(folder / "a", root / "clip.tar")
    frames = data.Frames(root)
    assert [frames.name(i) for i in range(len(frames))] == [
        "clip.tar/0.png", "clip.tar/1.jpg", "clip.tar/été.png", "clip.tar/deep/0.png", "video/0.png"]
    assert frames.videos == ["clip.tar", "clip.tar/deep", "video"]
    (tmp_path / "list.csv").write_text("path,video\nmixed/clip.tar/1.jpg,one\nmixed/clip.tar/none.png,one\n")
    listed = data.Frames(tmp_path / "list.csv")
    assert data.read_image(listed.path(0)).size == (48, 40)
    with pytest.raises(data.BadImage, match="clip.tar: has no member none.png"):
        data.read_image(listed.path(1))
    only = tmp_path / "only.txt"
    only.write_text("clip.tar/deep/0.png\n")
    assert len(data.Frames(root, only=only)) == 1
    assert len(data.images_in(root)) == 4
    for name in ("x", "y"):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        for patient in range(3):
            pack(folder / "a-b", tmp_path / "labelled" / name / f"{name}{patient}.tar")
    labelled = data.load_folders(tmp_path / "labelled")
    assert labelled.classes == ("x", "y") and labelled.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert all(data.eval_image(path, 28).shape == (3, 28, 28) for path in labelled.paths)


def test_multicrops_of_a_shard_are_those_of_its_folder(folder, tmp_path):
    pack(folder, tmp_path / "frames.tar")
    keys = [(0, i, 0, i) for i in range(6)]
    batches = []
    for root, workers in ((folder, 0), (tmp_path / "frames.tar", 2)):
        crops = augment.MultiCrop(data.Frames(root), global_size=28, local_size=14, local_crops=1)
        batches += torch.utils.data.DataLoader(crops, batch_size=None, sampler=[keys], num_workers=workers)
    plain, packed = batches
    assert not packed["bad"] and torch.equal(plain["global"], packed["global"])
    assert torch.equal(plain["local"], packed["local"])


def test_a_shard_is_indexed_once(folder, tmp_path, monkeypatch, capsys):
    shard = pack(folder, tmp_path / "frames.tar")
    data.Frames(shard)
    assert (tmp_path / "frames.tar.index.npy").is_file()
    monkeypatch.setattr(shards, "index_shard", lambda shard: pytest.fail("indexed twice"))
    data.shard_index.cache_clear()
    assert len(data.Frames(shard)) == 6
    monkeypatch.undo()
    os.utime(shard, ns=(1, 1))
    assert len(data.Frames(shard)) == 6
    assert "changed since it was indexed, so it is indexed anew" in capsys.readouterr().out
    for rubbish in (b"", b"no numpy"):
        (tmp_path / "frames.tar.index.npy").write_bytes(rubbish)
        assert len(data.Frames(shard)) == 6


def test_an_index_that_cannot_be_kept_is_used_all_the_same(folder, tmp_path, monkeypatch, capsys):
    shard = pack(folder, tmp_path / "frames.tar")

    def read_only(*args):
        raise OSError(30, "Read-only file system")
    monkeypatch.setattr(np, "save", read_only)
    assert data.read_image(data.Frames(shard).path(0)).size == (48, 40)
    assert "cannot be written (Read-only file system)" in capsys.readouterr().out


def test_a_shard_cut_short_compressed_or_changed_ends_in_one_sentence(folder, tmp_path):
    shard = pack(folder, tmp_path / "frames.tar")
    whole, frames = shard.read_bytes(), data.Frames(shard)
    with tarfile.open(shard) as tar:
        last = tar.getmembers()[-1]
    for size in (last.offset_data + 10, last.offset, last.offset + 100, 0):  # in a frame, between, in a header
        shard.write_bytes(whole[:size])
        with pytest.raises(data.BadShard, match="frames.tar: cut short"):
            data.Frames(shard)
        with pytest.raises(data.BadShard, match="frames.tar: c"):
            data.read_image(frames.path(5))
    shard.write_bytes(whole)
    data.Frames(shard)
    with open(shard, "r+b") as file:  # a header overwritten: what follows it would be lost without a word
        file.seek(last.offset)
        file.write(b"\7" * 512)
    with pytest.raises(data.BadShard, match="cut short or damaged at byte"):
        data.Frames(shard)
    with tarfile.open(shard, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with pytest.raises(data.BadShard, match="no uncompressed tar"):
        data.Frames(shard)


def test_a_shard_that_changes_during_a_run_ends_it(folder, tmp_path):
    shard = pack(folder, tmp_path / "frames.tar")
    frames = data.Frames(shard)
    data.read_image(frames.path(0))
    pack(folder / "a", shard)
    with pytest.raises(data.BadShard, match="changed since it was indexed; give the command again"):
        data.read_image(frames.path(0))
