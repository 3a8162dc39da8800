"""frozen.py: features kept on disk, whole, killed and damaged; heads through their files."""
import re
from unittest import mock

import numpy as np
import pytest
import torch

import data
import frozen
import heads
import probe_classify as pc
import probe_mes as mes
import probe_segment as seg
import results
import vit
from test_probe_classify import frame, hyper_kvasir, tiny_vit
from test_probe_mes import limuc
from test_probe_segment import SMALL, disc_tree


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A checkpoint, three labelled sets, and every head that the three probes write for it."""
    root = tmp_path_factory.mktemp("heads")
    vit.save_backbone(root / "teacher_7.pt", tiny_vit(seed=5), None, step=7)
    hyper_kvasir(root / "landmarks")
    limuc(root / "mes")
    disc_tree(root / "polyps")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        interval = results.bootstrap_interval
        patch.setattr(results, "bootstrap_interval", lambda *a, **k: interval(*a, **k | {"n": 5}))
        patch.setattr(pc, "HEADS", pc.HEADS | {"linear": (pc.linear_head, pc.GRID[6:8])})
        grid = [setting | {"power": 1} for setting in pc.GRID[6:8]]
        fits = {"softmax": mes.softmax_head, "ordinal": mes.ordinal_head}
        patch.setattr(mes, "HEADS", {name: (fit, grid) for name, fit in fits.items()})
        common = ["teacher_7.pt", "--device", "cpu", "--precision", "fp32", "--data"]
        pc.main([*common, "landmarks", "--splits", "2"])
        mes.main([*common, "mes", "--splits", "2", "--size", "56"])
        seg.main([*common, "polyps", *SMALL, "--heads", "linear", "boosted", "dpt"])
    return root


def model_of(work):
    return vit.load_backbone(work / "teacher_7.pt").requires_grad_(False)


def test_a_head_for_each_task_and_kind(work):
    assert sorted(p.name for p in work.glob("teacher_7.*.*.pt")) == [
        f"teacher_7.{name}.pt" for name in (
            "landmarks.knn", "landmarks.linear", "mes.ordinal", "mes.softmax",
            "polyps.boosted", "polyps.dpt", "polyps.linear")]
    for path in work.glob("teacher_7.*.*.pt"):
        file = torch.load(path, weights_only=True)
        assert file["format"] == "endodino-head-1"
        assert path.name == f"teacher_7.{file['task']}.{file['head']}.pt"
        assert file["backbone"] == frozen.digest(model_of(work))
        assert set(file["metrics"]) == {"validation", "test"}


def same_tensors(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("task, name, fit, score", [
    ("landmarks", "knn", pc.knn_head, pc.macro_f1),
    ("landmarks", "linear", pc.linear_head, pc.macro_f1),
    ("mes", "softmax", mes.softmax_head, mes.quadratic_kappa),
    ("mes", "ordinal", mes.ordinal_head, mes.quadratic_kappa)])
def test_a_classifier_is_the_probes_bit_for_bit(work, task, name, fit, score):
    model, labelled = model_of(work), data.open_labelled(work / task, task)
    loaded = frozen.load_head(work / f"teacher_7.{task}.{name}.pt", model)
    features = frozen.extract(model, labelled.paths, "cpu", loaded.size)
    y, split, n = torch.from_numpy(labelled.labels), labelled.splits[0], len(labelled.classes)
    fitted = fit(features, y, split.train, n, **loaded.setting)
    assert same_tensors(fitted, loaded.network)
    assert (loaded.classes, loaded.view, loaded.norm) == (labelled.classes, "crop", True)
    value = loaded.metrics["validation"]["macro F1" if task == "landmarks" else "kappa"]
    assert value == score(y[split.val], fitted(features, split.val)[1], n)
    expected = fitted(features, split.test)
    for batch in (1, 8):  # through the backbone anew, as in live use
        paths = [labelled.paths[i] for i in split.test]
        images = [frozen.read_batch(paths[i:i + batch], loaded.size) for i in range(0, len(paths), batch)]
        found = [frozen.run_heads(model, [loaded], x)[0] for x in images]
        probability, label = (torch.cat(parts) for parts in zip(*found))
        torch.testing.assert_close(probability, expected[0], rtol=0, atol=1e-5)
        assert torch.equal(label, expected[1])


@pytest.mark.parametrize("kind", ["linear", "boosted", "dpt"])
def test_a_polyp_head_is_the_probes(work, kind):
    model, labelled = model_of(work), data.open_labelled(work / "polyps", "polyps")
    loaded = frozen.load_head(work / f"teacher_7.polyps.{kind}.pt", model)
    assert (loaded.blocks, loaded.norm) == heads.blocks_of(kind, 4) and loaded.view == "stretch"
    args = seg.parse(["--features", str(work / "features"), "--precision", "fp32", *SMALL])
    again, chosen = seg.choose_head(args, model, kind, labelled)
    assert same_tensors(again, loaded.network)
    assert loaded.setting["lr"] == chosen["lr"] and loaded.size == args.sizes[kind]
    frame = data.read_image(labelled.paths[0])
    low, = frozen.run_heads(model, [loaded], data.square(frame, loaded.size, "stretch")[None])
    shape = frame.height, frame.width
    expected = seg.predict(model, again, kind, frame, shape, [loaded.size])
    torch.testing.assert_close(heads.resize(low, shape)[0].sigmoid(), expected, rtol=0, atol=1e-5)


def test_heads_of_one_view_share_a_pass(work, monkeypatch):
    model = model_of(work)
    loaded = [frozen.load_head(work / f"teacher_7.{name}.pt", model)
              for name in ("landmarks.knn", "landmarks.linear", "mes.ordinal", "polyps.linear",
                           "polyps.dpt")]
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    alone = [frozen.run_heads(model, [head], images)[0] for head in loaded]
    one_pass = mock.Mock(wraps=model.intermediate)
    monkeypatch.setattr(model, "intermediate", one_pass)
    together = frozen.run_heads(model, loaded, images)
    assert one_pass.call_count == 1
    for a, b in zip(alone, together):
        for x, y in zip(a, b) if isinstance(a, tuple) else [(a, b)]:
            assert torch.equal(x, y)
    assert together[2][0].shape == (3, 4)
    assert [polyps.shape for polyps in together[3:]] == [(3, 2, 2), (3, 32, 32)]


# ---------------------------------------------------------------------------------------------
# Kept features


def counting(seen):
    """compute of Kept: frame i, a file that holds its number, gives [i, i, i]. `seen` lists what
    was asked for."""
    def compute(paths):
        for i in range(0, len(paths), 4):
            seen.extend(str(p) for p in paths[i:i + 4])
            yield np.array([[float(open(p).read())] * 3 for p in paths[i:i + 4]])
    return compute


@pytest.fixture
def numbered(tmp_path):
    paths = [tmp_path / f"{i}.txt" for i in range(10)]
    for i, path in enumerate(paths):
        path.write_text(str(i))
    return paths


def kept_rows(tmp_path, paths, compute):
    return frozen.Kept(tmp_path / "k.npy", paths, compute, (3,), "<f4")


def test_kept_rows_are_computed_once(tmp_path, numbered):
    seen = []
    for _ in range(2):
        kept = kept_rows(tmp_path, numbered, counting(seen))
        assert np.array_equal(list(kept), np.arange(10)[:, None].repeat(3, 1))
        assert kept.shape == (10, 3)
    assert seen == [str(p) for p in numbered]
    assert len(kept_rows(tmp_path / "none", [], counting(seen))) == 0


def test_killed_while_computing_it_goes_on(tmp_path, numbered):
    def killed(paths):
        yield from zip([next(counting([])(paths))])  # one batch of four
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_rows(tmp_path, numbered, lambda paths: (batch[0] for batch in killed(paths)))
    seen = []
    kept = kept_rows(tmp_path, numbered, counting(seen))
    assert seen == [str(p) for p in numbered[4:]] and [row[0] for row in kept] == list(range(10))


def test_damaged_rows_are_computed_again_and_named(tmp_path, numbered, capsys):
    kept_rows(tmp_path, numbered, counting([]))
    file = tmp_path / "k.npy"
    content, seen = bytearray(file.read_bytes()), []
    content[-12:] = bytes(12)  # the last row's values, which the disk lost
    file.write_bytes(content)
    kept = kept_rows(tmp_path, numbered, counting(seen))
    assert not seen and [row[0] for row in kept] == list(range(10)) and seen == [str(numbered[9])]
    assert re.search("k.npy: .*9.txt were damaged .* computed again", capsys.readouterr().out)
    assert [row[0] for row in kept_rows(tmp_path, numbered, counting(seen))] == list(range(10))
    assert len(seen) == 1
    for damaged in (bytes(content[:100]), b"", bytes(content[:-20]), b"not numpy" * 40):
        file.write_bytes(damaged)
        assert [row[0] for row in kept_rows(tmp_path, numbered, counting([]))] == list(range(10))
        assert "k.npy" in (words := capsys.readouterr().out) and "computed again" in words


def test_features_know_weights_frames_size_view_and_precision(tmp_path):
    path, model = tmp_path / "a.png", tiny_vit()
    frame(path, 0, 0)

    def files(model=model, size=28, **how):
        frozen.frozen_features(model, [path], "cpu", size, folder=tmp_path / "kept", **how)
        return len(list((tmp_path / "kept").iterdir()))

    assert files() == files() == 1
    assert files(size=56) == 2 and files(tiny_vit(seed=1)) == 3 and files(view="stretch") == 4
    assert files(dtype=torch.bfloat16) == files(dtype=torch.bfloat16) == 5
    frame(path, 1, 0)  # another picture under the old name
    assert files() == 6


def test_diverged_weights_are_named(tmp_path):
    frame(tmp_path / "a.png", 0, 0)
    model = tiny_vit()
    model.info = {"path": "bad.pt"}
    with torch.no_grad():
        model.blocks[2].mlp.fc1.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="bad.pt: its features are not finite"):
        frozen.extract(model, [tmp_path / "a.png"], "cpu", 28)


# ---------------------------------------------------------------------------------------------
# Heads on disk


def test_digest_knows_every_tensor_and_no_place():
    first, again, other = tiny_vit(), tiny_vit(), tiny_vit(seed=1)
    assert frozen.digest(first) == frozen.digest(again) != frozen.digest(other)
    again.heads = 2  # in no tensor's shape
    assert frozen.digest(first) != frozen.digest(again)
    with torch.no_grad():
        first.blocks[3].mlp.fc2.bias[5] += 1e-3
    assert frozen.digest(first) != frozen.digest(tiny_vit())


def test_one_sentence_for_what_is_no_head_of_this_backbone(work, tmp_path):
    def sentence(path, model):
        with pytest.raises(ValueError) as stop:
            frozen.load_head(path, model)
        assert "\n" not in str(stop.value)
        return str(stop.value)

    model, head = model_of(work), work / "teacher_7.landmarks.linear.pt"
    vit.save_backbone(tmp_path / "other.pt", tiny_vit(seed=6), None)
    other = vit.load_backbone(tmp_path / "other.pt")
    assert "another backbone than" in (words := sentence(head, other)) and "other.pt" in words
    words = sentence(work / "teacher_7.pt", model)
    assert "is no head: give a file <checkpoint>.<task>.<head>.pt" in words
    whole = head.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    assert "cut.pt is truncated" in sentence(tmp_path / "cut.pt", model)
    file = torch.load(head, weights_only=True)
    weight = file["state"]["weight"].numpy().tobytes()
    place = whole.index(weight)  # a block that the disk lost: the file opens as ever
    zeros = whole[:place] + bytes(len(weight)) + whole[place + len(weight):]
    (tmp_path / "zeros.pt").write_bytes(zeros)
    words = sentence(tmp_path / "zeros.pt", model)
    assert "zeros.pt is damaged: its tensors are not those that were written" in words
    for missing in file:
        if missing != "format":
            torch.save({k: v for k, v in file.items() if k != missing}, tmp_path / "part.pt")
            words = sentence(tmp_path / "part.pt", model)
            assert f"part.pt is damaged: it lacks {missing}" in words
    with pytest.raises(FileNotFoundError, match="absent.pt"):
        frozen.load_head(tmp_path / "absent.pt", model)
    with pytest.raises(ValueError, match="holds no backbone"):
        vit.load_backbone(head)


def test_the_curve_passes_over_heads(work, monkeypatch):
    monkeypatch.chdir(work)
    (work / "log.jsonl").write_text('{"step": 0, "loss": 2.0}\n{"step": 6, "loss": 1.0}\n')
    rows = mes.main(["--curve", ".", "--data", "mes", "--device", "cpu"])
    assert [row["checkpoint"] for row in rows] == ["teacher_7.pt"]


def test_checkpoints_of_one_name_have_heads_of_their_own(tmp_path):
    args = pc.arguments("x", "x").parse_args(["a/best.pt", "b/best.pt", "c.pt"])
    assert str(frozen.head_path(args, "a/best.pt", "mes", "kNN")) == "a/best.mes.knn.pt"
    args.out = "tables/r.json"
    assert [str(frozen.head_path(args, c, "mes", "kNN")) for c in args.checkpoints] == [
        "tables/a.best.mes.knn.pt", "tables/b.best.mes.knn.pt", "tables/c.mes.knn.pt"]
