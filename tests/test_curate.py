"""Curation on small synthetic frames: planted faults, duplicates, imbalance, kills, processes, damage."""
import csv
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageFilter

import bench
import clusters
import curate
import data
import images
import synthetic
import vit
from test_clusters import blobs

SIZE = 128


def scene(kind, patient, n=1):
    """n frames of one patient at one place, as PIL images."""
    job = dict(kind=kind, patient=patient, place=0, images=[None] * n, masks=None, scope=1,
               video=n > 1, seed=11, size=SIZE)
    return [Image.fromarray(image) for image, _ in synthetic.frames_of(job)]


@pytest.fixture(scope="session")
def scenes():
    """16 frames of different patients: eight of retroflex-stomach, then eight of pylorus."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kinds = enumerate(("retroflex-stomach", "pylorus"))
    made = [scene(kind, 20 * c + p)[0] for c, kind in kinds for p in range(8)]
    torch.set_num_threads(threads)
    return made


def black(image, rng):
    return Image.fromarray(rng.integers(0, 12, (SIZE, SIZE, 3), dtype=np.uint8))


def blurred(image, rng):
    return image.filter(ImageFilter.GaussianBlur(0.025 * SIZE))


def overexposed(image, rng):
    return ImageEnhance.Brightness(image).enhance(6)


def outside(image, rng):
    grey = np.full((SIZE, SIZE, 3), rng.integers(90, 160), np.uint8)
    return Image.fromarray(grey + rng.integers(0, 8, (SIZE, SIZE, 1), dtype=np.uint8))


FAULTS = {"dark": black, "sharp": blurred, "glare": overexposed, "tissue": outside}


@pytest.fixture(scope="session")
def planted(scenes, tmp_path_factory):
    """A folder of four videos: 16 good frames, of each a copy saved anew, and one of each fault; one
    file that is no image."""
    root, rng = tmp_path_factory.mktemp("planted"), np.random.default_rng(0)
    for i, image in enumerate(scenes):
        folder = root / f"video{i % 4}"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{i:02d}.jpg", quality=92)
        image.save(folder / f"{i:02d}_copy.jpg", quality=75)
        for name, fault in FAULTS.items():
            fault(image, rng).save(folder / f"{i:02d}_{name}.jpg", quality=90)
    (root / "video0" / "broken.jpg").write_bytes(b"no image")
    return root


def manifest(out):
    return (out / "manifest.csv").read_bytes()


def run(root, out, *flags):
    """The report and the rows of the manifest."""
    report = curate.main(["--data", str(root), "--out", str(out), "--workers", "0", *map(str, flags)])
    with open(out / "manifest.csv", newline="") as file:
        return report, list(csv.DictReader(file))


def test_planted_faults_and_duplicates_go_and_good_frames_stay(planted, tmp_path):
    report, rows = run(planted, tmp_path, "--target", 1000, "--per-video", 1000)
    stems = [os.path.basename(row["path"])[:-4] for row in rows]
    assert not [s for s in stems if any(s.endswith(f"_{fault}") for fault in FAULTS)]
    assert sorted(s[:2] for s in stems) == [f"{i:02d}" for i in range(16)]  # one of two copies
    dropped = report["dropped"]
    assert sum(dropped[fault] for fault in curate.QUALITY) == 16 * len(FAULTS)
    assert dropped["dark"] == dropped["glare"] == dropped["sharp"] == dropped["near-duplicate"] == 16
    assert dropped["unreadable"] == 1
    assert len(data.Frames(tmp_path / "manifest.csv")) == 16
    assert all(os.path.isfile(tmp_path / row["path"]) for row in rows)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["dropped"] == dropped and written["arguments"]["seed"] == 0
    assert sum(b for _, b in written["frames per video before and after"].values()) == 16
    assert Image.open(tmp_path / "sheet.png").size[0] > 0


def test_a_threshold_given_by_flag_counts(planted, tmp_path):
    report, _ = run(planted, tmp_path, "--sharp", 0, 9)
    assert report["dropped"]["sharp"] == 0 and report["thresholds"]["sharp"] == (0, 9)


def test_the_sharpest_of_neighbours_stays_and_other_videos_do_not_count():
    x = F.normalize(torch.tensor([[1, 0, 0], [1, .1, 0], [0, 1, 0], [1, 0, .05], [1, 0, 0]]), dim=1)
    video = np.array([0, 0, 0, 0, 1])
    drop = curate.duplicates(x, video, np.array([1., 3., 1., 2., 0.]), 0.95)
    assert drop.tolist() == [True, False, False, True, False]
    drop = curate.duplicates(x, video, np.ones(5), 0.95, window=1)
    assert drop.tolist() == [False, True, False, False, False]


def clip(kind, patient, seconds):
    """The frames that a video of one landmark shows at these times, as PIL images."""
    key = (11, 1, patient)
    look, rng = synthetic.appearance(synthetic.generator(*key)), synthetic.generator(*key, kind, 0)
    maps, s = synthetic.skin(rng, SIZE * 3 // 2), synthetic.anatomy(kind, rng)
    path = int(rng.integers(2 ** 31))
    for t in seconds:
        view = synthetic.camera(s, synthetic.generator(path), t)
        yield Image.fromarray(synthetic.render(s, look, maps, *view, rng, SIZE)[0])


@pytest.mark.parametrize("common, rare", (("retroflex-stomach", "pylorus"), ("cecum", "z-line")))
def test_landmarks_at_50_to_1_come_out_within_2_to_1(common, rare, tmp_path):
    """Eight videos in which the camera dwells on one landmark, 50 frames each in two seconds, and eight
    with one frame of another."""
    for i in range(8):
        for name, kind, patient, seconds in (("common", common, i, np.arange(50) / 25),
                                             ("rare", rare, 20 + i, [0])):
            folder = tmp_path / "frames" / f"{name}{i}"
            folder.mkdir(parents=True)
            for j, image in enumerate(clip(kind, patient, seconds)):
                image.save(folder / f"{j:02d}.jpg", quality=90)
    report, rows = run(tmp_path / "frames", tmp_path / "out", "--target", 16)
    assert report["frames"] == 408 and len(rows) == 16
    assert 16 / 3 <= sum(row["video"].startswith("rare") for row in rows) <= 16 * 2 / 3


@pytest.fixture(scope="session")
def rare_of_12(scenes, tmp_path_factory):
    """How many of 12 chosen frames show the rare landmark, when one in 51 does: both are seen in eight
    patients, but each view of the common one recurs 50 times, turned, dimmed and in other videos,
    where no near-duplicate is looked for."""
    root, rng = tmp_path_factory.mktemp("imbalance"), np.random.default_rng(0)
    for i, image in enumerate(scenes):
        for j in range(50 if i < 8 else 1):
            folder = root / "frames" / (f"common{j:02d}" if i < 8 else "rare")
            folder.mkdir(parents=True, exist_ok=True)
            turned = image.rotate(rng.uniform(-10, 10))
            varied = ImageEnhance.Brightness(turned).enhance(rng.uniform(.85, 1.15))
            varied.save(folder / f"{i:02d}.jpg", quality=90)
    _, rows = run(root / "frames", root / "out", "--target", 12)
    assert len(rows) == 12
    return sum(row["video"] == "rare" for row in rows)


@pytest.mark.xfail(reason="not reached with the untrained descriptor: it groups frames by their look "
                          "more than by their landmark")
def test_50_to_1_in_other_videos_comes_out_within_2_to_1(rare_of_12):
    assert 4 <= rare_of_12 <= 8, rare_of_12


def test_a_rare_landmark_gets_several_times_its_share(rare_of_12):
    assert rare_of_12 / 12 > 4 / 51


def test_excluded_frames_and_what_resembles_them_are_never_chosen(scenes, planted, tmp_path):
    test = tmp_path / "test"
    test.mkdir()
    for i in (3, 9):
        scenes[i].resize((200, 160)).save(test / f"t{i}.png")
    (tmp_path / "list.txt").write_text(str(planted / "video2" / "06.jpg") + "\n")
    report, rows = run(planted, tmp_path / "out", "--target", 100, "--exclude", test,
                       "--exclude", tmp_path / "list.txt")
    kept = sorted(int(os.path.basename(row["path"])[:2]) for row in rows)
    assert kept == [i for i in range(16) if i not in (3, 6, 9)]
    assert report["dropped"]["excluded"] == 6  # and their copies


STAGES = (("curate", "quality"), ("curate", "descriptor"), ("curate", "duplicates"),
          ("clusters", "kmeans"), ("curate", "balanced_sample"), ("curate", "write_manifest"))


def test_the_result_is_the_same_after_a_kill_in_any_stage(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "BATCH", 16)
    run(planted, tmp_path / "whole", "--target", 8)
    for module, name in STAGES:
        module, calls = globals()[module], []
        real = getattr(module, name)

        def dies(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2 or name not in ("quality", "descriptor"):  # within a pass, else at once
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, dies)
            run(planted, tmp_path / "killed", "--target", 8)
    seen = []
    monkeypatch.setattr(curate, "quality", lambda *a: seen.append(a))
    run(planted, tmp_path / "killed", "--target", 8)
    assert not seen  # what was done is not done again
    for file in ("manifest.csv", "sheet.png"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_another_seed_in_a_used_folder_gives_what_it_gives_in_a_fresh_one(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "SAMPLE", 8)  # the moments then depend on the seed
    for folder, seed in (("used", 0), ("used", 1), ("fresh", 1)):
        run(planted, tmp_path / folder, "--target", 8, "--seed", seed, "--duplicate", 0.5)
    assert manifest(tmp_path / "used") == manifest(tmp_path / "fresh")
    assert len(list((tmp_path / "used/work").glob("duplicates-*"))) == 2


def test_what_resembles_is_found_whatever_the_products_are_computed_in():
    x, others = blobs(500), blobs(20, seed=1)
    cosines = (x.double() @ others.double().T).amax(1)
    threshold = cosines.sort().values[400].item()
    assert curate.resembling(x, others, threshold).sum() == 100
    assert np.array_equal(curate.resembling(x, others, threshold), cosines >= threshold)


def test_no_stage_reads_more_than_a_chunk_of_the_embeddings(monkeypatch):
    class Counted(torch.utils.data.Subset):
        most, device = 0, "cpu"
        __getitems__ = None  # asked for by Subset of whoever overrides __getitem__

        def __getitem__(self, at):
            rows = super().__getitem__(at)
            Counted.most = max(Counted.most, len(rows))
            return rows

    monkeypatch.setattr(clusters, "CHUNK", 64 * 64)
    monkeypatch.setattr(clusters, "SAMPLE", 64)
    x = Counted(blobs(), np.arange(len(blobs())))
    clusters.hierarchy(x, [16], 0, 3, lambda name, compute: compute())
    curate.resembling(x, blobs()[:2], 0.9)
    assert len(x) > 128 and Counted.most <= 64


def processes(plan, tmp_path):
    """Run curate_worker.py: the word printed for each run of the plan, and what stands in stderr."""
    (tmp_path / "plan.json").write_text(json.dumps(plan, default=str))
    worker = os.path.join(os.path.dirname(__file__), "curate_worker.py")
    root = os.path.dirname(os.path.abspath(curate.__file__))
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": root}
    result = subprocess.run([sys.executable, worker, tmp_path / "plan.json"], env=one_thread,
                            capture_output=True, text=True)
    words = [line for line in result.stdout.splitlines() if line in ("done", "killed")]
    assert result.returncode == 0 and len(words) == len(plan), result.stderr
    return words, result.stderr


def test_one_two_and_three_processes_give_one_manifest(planted, scenes, tmp_path):
    """So do three that are killed in each stage in turn, after which two go on."""
    scenes[3].save(tmp_path / "3.png")
    (tmp_path / "excluded.txt").write_text(str(tmp_path / "3.png") + "\n")
    flags = ["--data", planted, "--target", "8", "--workers", "0", "--device", "cpu",
             "--exclude", tmp_path / "excluded.txt", "--clusters", "8", "4", "--duplicate", "0.97"]
    parallel = (*STAGES[:3], ("curate", "resembling"), STAGES[3], ("clusters", "assign"))
    plan = [(n, None, [*flags, "--out", tmp_path / str(n)]) for n in (1, 2, 3)]
    plan += [(3, stage, [*flags, "--out", tmp_path / "killed"]) for stage in parallel]
    plan += [(2, None, [*flags, "--out", tmp_path / "killed"])]
    assert processes(plan, tmp_path)[0] == ["done"] * 3 + ["killed"] * 6 + ["done"]
    one = manifest(tmp_path / "1")
    assert len(one.splitlines()) == 9
    for other in ("2", "3", "killed"):
        assert manifest(tmp_path / other) == one, other


def test_three_processes_end_with_one_sentence(planted, tmp_path):
    flags = ["--workers", "0", "--device", "cpu", "--out", tmp_path / "out"]
    words, said = processes([[3, None, ["--data", tmp_path / "nowhere", *flags]],
                             [3, None, ["--data", planted, "--dark", "2", "3", *flags]],
                             [3, None, ["--data", planted, "--clusters", "99", *flags]]], tmp_path)
    assert words == ["killed"] * 3 and "Traceback" not in said.partition("nowhere")[0]
    for sentence in ("nowhere: no such folder", "passes the quality filters", "99 clusters asked"):
        assert said.count(sentence) == 1


def test_torchrun_starts_several_processes(planted, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(20000 + os.getpid() % 20000), curate.__file__, "--workers", "0", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += ["--data", planted, "--target", "8", "--out", tmp_path / "out"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.count("8 chosen from") == 1, found.stderr
    run(planted, tmp_path / "one", "--target", "8")
    assert manifest(tmp_path / "one") == manifest(tmp_path / "out")


def test_the_cap_per_video_holds(planted, tmp_path):
    report, rows = run(planted, tmp_path, "--target", 16, "--per-video", 2)
    assert len(rows) == 8 and max(b for _, b in report["frames per video before and after"].values()) == 2


def test_one_frame_empty_videos_and_too_large_a_target(scenes, tmp_path, capsys):
    (tmp_path / "in" / "empty").mkdir(parents=True)
    (tmp_path / "in" / "video").mkdir()
    scenes[0].save(tmp_path / "in" / "video" / "a.jpg")
    _, rows = run(tmp_path / "in", tmp_path / "out", "--target", 5)
    assert len(rows) == 1 and "only 1 are left" in capsys.readouterr().out


def test_nothing_usable_is_one_sentence(tmp_path):
    (tmp_path / "in" / "v").mkdir(parents=True)
    with pytest.raises(SystemExit, match="no images here"):
        run(tmp_path / "in", tmp_path / "out")
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "in" / "v" / "a.png")
    with pytest.raises(SystemExit, match="none of the 1 frames passes.*1 dark"):
        run(tmp_path / "in", tmp_path / "out")
    for flag in ("--target", "--per-video"):
        with pytest.raises(SystemExit, match="2"):
            curate.main([flag, "0"])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="empty.txt: the list is empty"):
        curate.open_excluded(tmp_path / "empty.txt")


def test_the_descriptor_does_not_see_a_roll(scenes):
    images = [scenes[i].crop((14, 14, 114, 114)).resize((SIZE, SIZE)) for i in (0, 9)]
    turned = [image.rotate(90) for image in images]
    a, b, c, d = curate.descriptor(torch.stack([curate.pil_to_tensor(i) for i in images + turned]))
    assert (a - c).norm() < 0.05 * (a - b).norm() and (b - d).norm() < 0.05 * (a - b).norm()


# -----------------------------------------------------------------------------------------------
# Disks, files and names as they are

def test_damaged_work_files_are_computed_again_and_named(planted, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curate, "BATCH", 16)
    run(planted, tmp_path / "whole", "--target", 8)
    whole = manifest(tmp_path / "whole")

    def damage(pattern, change):
        path, = [p for p in (tmp_path / "whole" / "work").glob(pattern) if "crc" not in p.name]
        content = bytearray(path.read_bytes())
        path.write_bytes(change(content))
        capsys.readouterr()
        run(planted, tmp_path / "whole", "--target", 8)
        assert manifest(tmp_path / "whole") == whole
        return path.name in capsys.readouterr().out

    def zeros(content):
        content[-1500:-1000] = bytes(500)
        return content

    assert damage("quality-*.npy", lambda content: content[:-1500])  # the old code: zeros, so "tissue"
    assert damage("quality-*.npy", zeros)
    damage("quality-*.npy", lambda content: b"")
    assert damage("embeddings-*.npy", zeros)
    assert damage("duplicates-*.npz", lambda content: content[:-10])
    assert damage("clusters1-*.npz", zeros)
    assert damage("clusters1-*.npz", lambda content: b"")


def test_a_failing_disk_is_no_bad_frame(planted, tmp_path, monkeypatch):
    """Six failed opens were six missing frames for ever: now the run ends and later goes on."""
    monkeypatch.setattr(curate, "BATCH", 16)
    monkeypatch.setattr(images, "PAUSE", 0)
    run(planted, tmp_path / "whole", "--target", 8)
    real, failures = data.open_file, []

    def failing(path):
        if str(path).endswith("03.jpg"):
            failures.append(path)
            raise OSError(5, "Input/output error")
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(images, "open_file", failing)
        with pytest.raises(SystemExit, match="03.jpg: Input/output error"):
            run(planted, tmp_path / "out", "--target", 8)
    assert len(failures) == 3
    run(planted, tmp_path / "out", "--target", 8)
    assert manifest(tmp_path / "out") == manifest(tmp_path / "whole")


def test_an_out_that_cannot_be_written_is_found_before_any_work(planted, tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "fingerprint", lambda *args: pytest.fail("worked before"))
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="--out .*file: cannot be written .*; name another folder"):
        run(planted, tmp_path / "file")

    def read_only(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(curate.tempfile, "TemporaryFile", read_only)
    with pytest.raises(SystemExit, match="cannot be written .Read-only file system.; name another folder"):
        run(planted, tmp_path / "out")


def test_too_little_room_for_the_embeddings_is_one_sentence(planted, tmp_path, monkeypatch):
    usage = type(curate.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(curate.shutil, "disk_usage", lambda path: usage(10 ** 9, 10 ** 9, 2000))
    with pytest.raises(SystemExit, match="needs 0.0 MB, and the disk has 0.0 MB left; make room"):
        run(planted, tmp_path / "out")


def test_names_that_are_no_utf8_come_through(scenes, tmp_path):
    folder = tmp_path / os.fsdecode(b"in") / os.fsdecode(b"vid\xe9o")
    folder.mkdir(parents=True)
    for i in range(4):
        scenes[4 * i].save(folder / os.fsdecode(b"\xff%d.jpg" % i))
    flags = ["--workers", "0", "--target", "2"]
    curate.main(["--data", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *flags])
    frames = data.Frames(tmp_path / "out" / "manifest.csv")
    assert [data.read_image(frames.path(i)).size for i in range(len(frames))] == [(SIZE, SIZE)] * 2


def test_a_checkpoint_without_numbers_is_refused_before_any_work(planted, tmp_path, monkeypatch):
    model = vit.build_vit("vitt14", image_size=28)
    model.cls_token.data[:] = torch.nan
    vit.save_backbone(tmp_path / "nan.pt", model, "vitt14")
    monkeypatch.setattr(curate, "quality", lambda *args: pytest.fail("worked before"))
    with pytest.raises(SystemExit, match="nan.pt.*not finite"):
        run(planted, tmp_path / "out", "--checkpoint", tmp_path / "nan.pt")


def test_precision_is_that_of_the_backbone(planted, tmp_path, monkeypatch):
    model, seen = vit.build_vit("vitt14", image_size=28), []
    vit.save_backbone(tmp_path / "tiny.pt", model, "vitt14")
    real = vit.autocast
    small = lambda path, box: curate.thumbnail(path, box).float()[:, :28, :28] / 255
    monkeypatch.setattr(vit, "autocast", lambda *how: seen.append(how[1]) or real(*how))
    monkeypatch.setattr(curate, "backbone_view", small)
    for name in ("fp32", "bf16"):
        flags = ("--checkpoint", tmp_path / "tiny.pt", "--precision", name)
        _, rows = run(planted, tmp_path / "out", *flags)
        assert rows and set(seen) == {vit.PRECISIONS[name]}
        seen.clear()


def test_the_video_of_an_excluded_frame_goes_with_it_when_asked(scenes, planted, tmp_path, capsys):
    scenes[3].save(tmp_path / "t.png")
    flags = ("--target", 100, "--per-video", 100, "--exclude", tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text(str(tmp_path / "t.png") + "\n")
    _, kept = run(planted, tmp_path / "out", *flags, "--no-exclude-videos")
    words = capsys.readouterr().out
    assert "2 frames of 1 videos resemble one of its images; 3 other good frames" in words
    _, rows = run(planted, tmp_path / "out", *flags, "--exclude-videos")
    assert {row["video"] for row in kept} == {f"video{i}" for i in range(4)}
    assert {row["video"] for row in rows} == {"video0", "video1", "video2"}


def test_frames_in_shards_give_the_manifest_of_their_folders(planted, tmp_path):
    (tmp_path / "packed").mkdir()
    for video in sorted(planted.iterdir()):
        with tarfile.open(tmp_path / "packed" / f"{video.name}.tar", "w") as tar:
            for path in sorted(video.iterdir()):
                tar.add(path, arcname=path.name)
    _, plain = run(planted, tmp_path / "plain", "--target", 8)
    _, packed = run(tmp_path / "packed", tmp_path / "out", "--target", 8)
    for row in plain:
        row["path"] = f"../packed/{row['video']}.tar/{os.path.basename(row['path'])}"
        row["video"] += ".tar"
    assert plain == packed
    frames = data.Frames(tmp_path / "out" / "manifest.csv")
    assert data.read_image(frames.path(0)).size == (SIZE, SIZE)
    shard = tmp_path / "packed" / "video2.tar"
    shard.write_bytes(shard.read_bytes()[:-30000])
    with pytest.raises(SystemExit, match="video2.tar: cut short"):
        run(tmp_path / "packed", tmp_path / "torn", "--target", 8)


def test_bench_counts_what_ten_million_frames_take(capsys):
    bench.main(["curate", "--rows", "3000", "--frames", "8", "--workers", "0"])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()]
    rows = {cells[1].strip(): cells[2:] for cells in lines if len(cells) == 8}
    read, flop, _, hours, _, _ = rows["a pass of k-means"]
    assert float(read) == 2 and float(flop) == 240 and float(hours) > 0  # 2 and 2e5 times 120e7
    assert [name for name in rows if "4 x first centres, 128 passes" in name]  # 50 + 3 (50 / 2 + 1)
