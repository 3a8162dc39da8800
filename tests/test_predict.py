"""predict.py: heads as the probes fitted them, as few passes as they need, tables that go on."""
import csv
import json
import os
import signal
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from PIL import Image

import data
import frozen
import heads
import predict
import vit
from forked import fork
from test_frozen import work  # noqa: F401

LANDMARKS, MES, POLYPS = "landmarks.linear", "mes.ordinal", "polyps.linear"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint and three heads of one view and size, their tensors drawn: what they say does not matter."""
    root = tmp_path_factory.mktemp("small")
    torch.manual_seed(0)
    model = vit.VisionTransformer(dim=64, depth=4, heads=1, image_size=56, layerscale=1.0)
    vit.save_backbone(root / "A.pt", model, None)
    model = vit.load_backbone(root / "A.pt")
    width = dict(mean=torch.zeros(64), std=torch.ones(64))
    softmax = heads.Softmax(1, False, **width, weight=torch.randn(3, 64), bias=torch.zeros(3))
    ordinal = heads.Ordinal(1, False, **width, direction=torch.randn(64).double(),
                            thresholds=torch.tensor([-2.0, 0, 2]).double())
    polyps = heads.new_polyp_head("linear", 64, 4)
    torch.nn.init.normal_(polyps.classify.weight)
    for task, head, network, classes in (("landmarks", "linear", softmax, "abc"),
                                         ("mes", "ordinal", ordinal, "0123"),
                                         ("polyps", "linear", polyps, ["polyp"])):
        frozen.save_head(root / f"A.{task}.{head}.pt", model, network, task=task, head=head,
                         classes=list(classes), size=28, view="stretch",
                         setting={"blocks": 1, "patch": False}, metrics={})
    rng = np.random.default_rng(0)
    for i in range(12):
        path = root / "frames" / f"video{i // 6}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        low = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        low.resize((56, 42), Image.BICUBIC).save(path)
    return root


def run(root, out, *more, source=None, which=(LANDMARKS, MES, POLYPS)):
    files = [str(root / f"A.{name}.pt") for name in which]
    source = source or ["--data", str(root / "frames")]
    return predict.main([str(root / "A.pt"), "--heads", *files, *source, "--out", str(out),
                         "--precision", "fp32", "--device", "cpu", *more])


def table(out):
    with open(out / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("batch", ["1", "8"])
def test_labels_and_probabilities_are_the_probes(work, tmp_path, batch):  # noqa: F811
    """Of the test frames of split 0, as the probe's own head says them."""
    labelled = data.open_labelled(work / "mes", "mes")
    rows = labelled.splits[0].test
    (tmp_path / "frames").mkdir()
    for i in rows:
        suffix = os.path.splitext(labelled.paths[i])[1]
        os.symlink(labelled.paths[i], tmp_path / "frames" / f"{i:06d}{suffix}")
    predict.main([str(work / "teacher_7.pt"), "--heads", str(work / "teacher_7.mes.ordinal.pt"),
                  "--data", str(tmp_path / "frames"), "--out", str(tmp_path / "out"),
                  "--batch", batch, "--precision", "fp32", "--device", "cpu"])
    model = vit.load_backbone(work / "teacher_7.pt")
    head = frozen.load_head(work / "teacher_7.mes.ordinal.pt", model)
    features = frozen.extract(model, [labelled.paths[i] for i in rows], "cpu", head.size)
    probability, label = head.network(features)
    found = table(tmp_path / "out")
    assert [row["mes ordinal label"] for row in found] == [labelled.classes[k] for k in label]
    columns = [f"mes ordinal p({c})" for c in labelled.classes]
    said = np.array([[float(row[column]) for column in columns] for row in found])
    np.testing.assert_allclose(said, probability.numpy(), rtol=0, atol=1e-5)


def test_a_boosted_head_with_scales_is_the_probes(work, tmp_path):  # noqa: F811
    import probe_segment
    model = vit.load_backbone(work / "teacher_7.pt")
    loaded = {"polyps boosted": frozen.load_head(work / "teacher_7.polyps.boosted.pt", model)}
    image = Image.open(next((work / "polyps" / "images").iterdir())).convert("RGB")
    passes = predict.plan(loaded, [1, 1.33])
    watch = predict.Stopwatch("cpu")
    said, = predict.predict(model, loaded, passes, [image], torch.float32, watch)
    head = loaded["polyps boosted"]
    expected = probe_segment.predict(model, head.network, "boosted", image,
                                     (image.height, image.width), [42, 56], mirror=True)
    np.testing.assert_allclose(said["polyps boosted"], expected.numpy(), rtol=0, atol=1e-5)
    assert len(passes) == 4 and len(predict.plan(loaded, None)) == 1


def test_three_heads_take_one_pass(small, tmp_path, monkeypatch, capsys):
    calls, intermediate = [], vit.VisionTransformer.intermediate
    monkeypatch.setattr(vit.VisionTransformer, "intermediate",
                        lambda *a, **k: calls.append(1) or intermediate(*a, **k))
    about = run(small, tmp_path, "--batch", "4", "--overlays", "all")
    assert len(calls) == 3  # 12 frames in batches of 4
    assert "3 heads on 1 passes" in capsys.readouterr().out
    assert about["frames"] == 12 and about["damaged"] == 0
    assert sum(about["found"]["landmarks linear"].values()) == 12
    stages = {"decode", "backbone", "mes ordinal", "polyps linear", "overlay", "latency"}
    assert stages <= about["milliseconds: median, 95th, 99th percentile"].keys()
    assert len(list((tmp_path / "overlays").iterdir())) == 12
    pictures = sorted(p.name for p in tmp_path.glob("*.png"))
    assert pictures == ["timeline_video0.png", "timeline_video1.png"]
    for row in table(tmp_path):
        if row["polyps linear box"]:
            left, top, right, bottom = map(int, row["polyps linear box"].split())
            assert 0 <= left < right <= 56 and 0 <= top < bottom <= 42
            assert 0 < float(row["polyps linear area"]) <= (right - left) * (bottom - top) / (56 * 42) + 1e-4


def test_a_timeline_has_all_frames_of_its_video(small, tmp_path, monkeypatch):
    """Also where a manifest names the frames of several videos in turn, and where two videos'
    names differ in what a file's name cannot hold."""
    frames = sorted((small / "frames").rglob("*.png"), key=lambda path: path.name[1])
    names = {"video0": "video:1", "video1": "video-1"}
    rows = [f"{path},{names[path.parent.name]}" for path in frames]
    (tmp_path / "manifest.csv").write_text("\n".join(["path,video", *rows]))
    drawn = {}
    monkeypatch.setattr(predict.figures, "timeline",
                        lambda path, title, times, *_, **__: drawn.update({path.name: len(times)}))
    run(small, tmp_path / "out", source=["--data", str(tmp_path / "manifest.csv")])
    assert drawn == {"timeline_video-1.png": 6, "timeline_video-1-2.png": 6}


def test_half_precision_stays_close(small, tmp_path):
    run(small, tmp_path / "a")
    run(small, tmp_path / "b", "--precision", "bf16")
    for a, b in zip(table(tmp_path / "a"), table(tmp_path / "b")):
        for key in a:
            if " p(" in key:
                assert abs(float(a[key]) - float(b[key])) < 0.1  # 8 bits on weights of order 1


@pytest.mark.parametrize("smooth", ["1", "3"])
@pytest.mark.parametrize("kept", [0, 1, 4, 7, 12])
def test_a_stopped_run_goes_on_to_the_same_table(small, tmp_path, capsys, kept, smooth):
    run(small, tmp_path / "whole", "--smooth", smooth)
    run(small, tmp_path / "again", "--smooth", smooth)
    whole = (tmp_path / "whole" / "predictions.csv").read_bytes()
    lines = whole.splitlines(keepends=True)
    torn = b"".join(lines[:kept + 1]) + (lines[kept + 1][:7] if kept < 12 else b"")
    (tmp_path / "again" / "predictions.csv").write_bytes(torn)
    capsys.readouterr()
    about = run(small, tmp_path / "again", "--smooth", smooth)
    assert (tmp_path / "again" / "predictions.csv").read_bytes() == whole
    assert about["new frames"] == 12 - kept
    assert kept == 0 or f"going on after {kept} frames" in capsys.readouterr().out


def test_smoothing_means_the_last_probabilities_of_one_video(small, tmp_path):
    run(small, tmp_path, "--smooth", "3")
    rows = table(tmp_path)
    assert "landmarks linear label (running mean of 3 frames)" in rows[0]
    p = np.array([[float(row[f"landmarks linear p({c})"]) for c in "abc"] for row in rows])
    for i, row in enumerate(rows):
        first = max(i - 2, 6 * (i // 6))  # a video has six frames
        likeliest = "abc"[p[first:i + 1].mean(0).argmax()]
        assert row["landmarks linear label (running mean of 3 frames)"] == likeliest


def test_a_new_video_forgets_the_one_before():
    head = frozen.Head("landmarks", "linear", ("a", "b"), 42, "crop", (), True, {}, {}, None)
    smooth = predict.Smoothed(head, "it", 3)
    rows = [{"video": video, "error": "", "it p(a)": p, "it p(b)": 1 - p}
            for video, p in (("1", 0.9), ("1", 0.9), ("2", 0.2), ("2", 0.4), ("2", 0.7))]
    assert [smooth(row) for row in rows] == ["a", "a", "b", "b", "b"]
    assert smooth(rows[0]) == "a"


def test_other_heads_or_frames_do_not_mix(small, tmp_path):
    run(small, tmp_path)
    with pytest.raises(SystemExit, match="made with another smoothing"):
        run(small, tmp_path, "--smooth", "2")
    with pytest.raises(SystemExit, match="made with another heads"):
        run(small, tmp_path, which=(MES,))


def test_a_damaged_frame_is_a_row_that_says_so(small, tmp_path):
    (tmp_path / "frames").mkdir()
    good = next((small / "frames" / "video0").iterdir()).read_bytes()
    for name, content in (("a.png", good), ("b.png", good[:300]), ("c.png", good)):
        (tmp_path / "frames" / name).write_bytes(content)
    about = run(small, tmp_path / "out", source=["--data", str(tmp_path / "frames")])
    rows = table(tmp_path / "out")
    assert about["damaged"] == 1 and [bool(row["error"]) for row in rows] == [False, True, False]
    assert "b.png" in rows[1]["error"]
    assert [bool(row["landmarks linear label"]) for row in rows] == [True, False, True]


def test_one_sentence_for_what_cannot_be(small, tmp_path, work):  # noqa: F811
    def sentence(*argv):
        with pytest.raises(SystemExit) as stop:
            predict.main([*map(str, argv), "--out", str(tmp_path / "out"), "--device", "cpu"])
        assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
        return stop.value.code
    (tmp_path / "empty").mkdir()
    heads_of = ["--heads", small / "A.mes.ordinal.pt"]
    assert "no images" in sentence(small / "A.pt", *heads_of, "--data", tmp_path / "empty")
    assert "another backbone" in sentence(work / "teacher_7.pt", *heads_of, "--data", small / "frames")
    assert "is no head" in sentence(small / "A.pt", "--heads", small / "A.pt", "--data", small / "frames")
    assert not (tmp_path / "out").exists()


# --- video: a stand-in for ffmpeg on the PATH


FAKE = """
    import os, signal, sys, time
    words = sys.argv[1:]
    if "-" == words[-1]:                           # the reading end: PPM frames of one colour each
        if "missing.mp4" in words:
            sys.exit("missing.mp4: no such file")
        start = next((w.split("start_frame=")[1].split(",")[0] for w in words if "frame=" in w), 0)
        n = int(os.environ.get("FAKE_FRAMES", 10))
        for i in range(int(start), n):
            sys.stderr.write("x" * 4000)           # nobody may wait for it to be read
            grey = bytes([20 * i % 256, 90, 3 * i % 256]) * (56 * 42)
            sys.stdout.buffer.write(b"P6\\n56 42\\n255\\n" + grey)
            sys.stdout.flush()
            time.sleep(float(os.environ.get("FAKE_PAUSE", 0)))
    else:                                          # the writing end: counts what it is given
        content = sys.stdin.buffer.read()
        open(words[-1], "w").write(f"{content.count(b'P6')} frames")
"""


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n" + textwrap.dedent(FAKE))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    (tmp_path / "film.mp4").write_bytes(b"a film")
    return ["--video", str(tmp_path / "film.mp4"), "--fps", "5"]


def test_a_video_through_a_pipe(small, tmp_path, fake_ffmpeg, monkeypatch):
    film = tmp_path / "annotated.mp4"
    about = run(small, tmp_path / "out", "--save-video", str(film), "--batch", "4",
                "--overlays", "none", source=fake_ffmpeg)
    seconds = [row["seconds"] for row in table(tmp_path / "out")]
    assert about["frames"] == 10 and seconds == [f"{i / 5:.3f}" for i in range(10)]
    assert film.read_text() == "10 frames" and not (tmp_path / "out" / "overlays").exists()
    assert (tmp_path / "out" / "timeline_film-mp4.png").exists()
    whole = (tmp_path / "out" / "predictions.csv").read_bytes()
    monkeypatch.setenv("FAKE_FRAMES", "6")  # as if it had been stopped after six
    run(small, tmp_path / "again", "--batch", "4", source=fake_ffmpeg)
    monkeypatch.setenv("FAKE_FRAMES", "10")
    run(small, tmp_path / "again", "--save-video", str(film), source=fake_ffmpeg)
    assert (tmp_path / "again" / "predictions.csv").read_bytes() == whole
    assert film.read_text() == "4 frames"


def test_a_killed_video_run_goes_on(small, tmp_path, fake_ffmpeg, monkeypatch):
    run(small, tmp_path / "whole", source=fake_ffmpeg)
    monkeypatch.setenv("FAKE_PAUSE", "0.2")
    names = [str(small / f"A.{name}.pt") for name in (LANDMARKS, MES, POLYPS)]
    process = fork(predict.main, [
        str(small / "A.pt"), "--heads", *names, *fake_ffmpeg, "--out", str(tmp_path / "out"),
        "--precision", "fp32", "--device", "cpu", "--batch", "1"])
    path = tmp_path / "out" / "predictions.csv"
    while not path.exists() or path.read_bytes().count(b"\n") < 4:
        assert process.exitcode is None, process.output.read()
    process.kill()
    process.join()
    monkeypatch.setenv("FAKE_PAUSE", "0")
    run(small, tmp_path / "out", source=fake_ffmpeg)
    assert path.read_bytes() == (tmp_path / "whole" / "predictions.csv").read_bytes()


def test_ctrl_c_keeps_what_was_read(small, tmp_path, fake_ffmpeg, monkeypatch):
    """The terminal sends it to everyone in the group; ffmpeg is not to die of it."""
    monkeypatch.setenv("FAKE_PAUSE", "0.2")
    film = tmp_path / "annotated.mp4"
    process = fork(predict.main, [
        str(small / "A.pt"), *fake_ffmpeg, "--heads", str(small / "A.mes.ordinal.pt"),
        "--out", str(tmp_path / "out"), "--precision", "fp32", "--device", "cpu", "--batch", "2",
        "--save-video", str(film)], new_session=True)
    path = tmp_path / "out" / "predictions.csv"
    while not path.exists() or path.read_bytes().count(b"\n") < 3:
        assert process.exitcode is None, process.output.read()
    os.killpg(process.pid, signal.SIGINT)
    process.join()
    said = process.output.read()
    assert process.exitcode == 0 and "the same command goes on from here" in said
    assert (tmp_path / "out" / "summary.json").exists() and film.read_text().endswith("frames")


def test_the_overlay_says_the_labels_own_probability(small, monkeypatch):
    """A median grade is not always the likeliest one."""
    head = frozen.load_head(small / "A.mes.ordinal.pt", vit.load_backbone(small / "A.pt"))
    said, lines = {"mes ordinal": np.array([0.4, 0.15, 0.05, 0.4])}, []
    monkeypatch.setattr(predict.figures, "overlay", lambda image, mask, words, note: lines.extend(words))
    frame = ("a", "v", None, Image.new("RGB", (8, 8)), "")
    row = predict.row_of(frame, said, {"mes ordinal": head})
    row["label"] = predict.Smoothed(head, "mes ordinal", 1)(row)
    predict.drawn(frame, said, row, {"mes ordinal": head}, {"mes ordinal": "label"})
    assert lines == ["mes ordinal: 1 (15%)"]


def test_a_film_that_cannot_be_is_said_before_or_at_once(small, tmp_path, fake_ffmpeg, monkeypatch):
    with pytest.raises(SystemExit):
        run(small, tmp_path / "out", "--save-video", str(tmp_path / "no" / "a.mp4"), source=fake_ffmpeg)
    program = tmp_path / "bin" / "ffmpeg"
    program.write_text(program.read_text().replace("content =", "sys.exit('no such codec')\n    content ="))
    monkeypatch.setenv("FAKE_FRAMES", "200")
    monkeypatch.setenv("FAKE_PAUSE", "0.01")
    with pytest.raises(SystemExit, match="no such codec"):
        run(small, tmp_path / "out", "--save-video", str(tmp_path / "a.mp4"), source=fake_ffmpeg)
    assert len(table(tmp_path / "out")) < 200


def test_live_input_takes_the_newest_frame(small, tmp_path, fake_ffmpeg, monkeypatch):
    monkeypatch.setenv("FAKE_FRAMES", "300")
    about = run(small, tmp_path / "out", "--overlays", "none", source=["--video", "rtsp://camera"])
    assert about["batch"] == 1 and about["dropped"] > 0
    assert about["frames"] + about["dropped"] == 300
    numbers = [int(row["path"].split(":")[-1]) for row in table(tmp_path / "out")]
    assert numbers == sorted(numbers) and numbers[-1] == 299


def test_ffmpeg_missing_or_failing_is_one_sentence(small, tmp_path, fake_ffmpeg, monkeypatch):
    (tmp_path / "missing.mp4").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="missing.mp4: no such file"):
        run(small, tmp_path / "out", source=["--video", "missing.mp4"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match="ffmpeg is not installed"):
        run(small, tmp_path / "other", source=["--video", str(tmp_path / "film.mp4")])


def test_a_reader_on_its_thread_holds_a_few_frames_at_most(fake_ffmpeg, monkeypatch):
    """So an hour of video takes no more memory than a second."""
    monkeypatch.setenv("FAKE_FRAMES", "60")
    taken = []
    for item in (ahead := predict.Ahead(predict.video_frames("x", 5), room=3)):
        taken.append(item[0])
        time.sleep(0.01)  # slower than the reader
        assert len(ahead.seconds) <= len(taken) + 5
    assert taken == [f"x:{i:06d}" for i in range(60)]


def test_it_says_that_it_is_no_medical_device(small, tmp_path, capsys):
    with pytest.raises(SystemExit):
        predict.main(["--help"])
    assert predict.NOTE in capsys.readouterr().out
    run(small, tmp_path)
    said = capsys.readouterr().out
    assert predict.NOTE in said and "2 timeline_<video>.png, 12 annotated frames" in said
    assert f"next: python vit.py {small / 'A.pt'} {small / 'frames/video0/00.png'} --show" in said
    assert json.loads((tmp_path / "summary.json").read_text())["note"] == predict.NOTE
