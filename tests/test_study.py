"""docs/study.py and docs/search.py from end to end, on a few frames of 64 pixels and a tiny
architecture."""
import re

import pytest
import torch

import curate
import data
import pretrain
import probe_segment
import synthetic
import vit
from docs import search, study

TINY = ("--steps 2 --batch 4 --global-size 28 --local-size 28 --local-crops 2 --prototypes 16 "
        "--head-hidden 32 --workers 0 --device cpu")
CURATE = "--sharp 0 9 --workers 0 --device cpu"  # so few pixels are blurred


def test_study_trains_and_scores(tmp_path, monkeypatch, capsys, synthetic_set):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vit.ARCHS, "tiny", dict(dim=32, depth=2, heads=2))
    monkeypatch.setattr(synthetic, "ensure", lambda: synthetic_set)
    trained, choose = [], curate.main
    monkeypatch.setattr(study.curate, "main", lambda argv: choose(argv + CURATE.split()))

    def train(runs, jobs):
        for flags in runs:
            trained.append(flags)
            pretrain.main(flags)
    monkeypatch.setattr(study, "pretrain_all", train)
    study.main(f"--targets 4 --archs tiny --seeds 0 --out study {TINY}".split())
    out = capsys.readouterr().out
    assert len(trained) == 3
    rows = re.findall(r"^\| tiny \| ([^|]+) \| (\d+) \|(.*)\|$", out, re.M)
    assert [(kind, n) for kind, n, _ in rows] == [
        ("none: random initialisation", "0"), ("curated", "4"), ("random", "4"), ("all", "12"),
        ("curated - random", "4")]
    numbers = [[float(cell) for cell in cells.split("|")] for *_, cells in rows]
    assert numbers[4] == pytest.approx([a - b for a, b in zip(numbers[1], numbers[2])], abs=2e-3)
    listed = (tmp_path / "study/random-4-0.txt").read_text().split()
    assert len(set(listed)) == 4
    assert all((synthetic_set / "unlabelled" / name).exists() for name in listed)


def test_a_run_that_has_a_teacher_is_not_repeated_and_a_failed_one_ends_the_study(tmp_path):
    done, broken = tmp_path / "done", tmp_path / "broken"
    done.mkdir()
    torch.save({}, done / "teacher_2.pt")
    study.pretrain_all([["--no-such-flag", str(done)]], 1)
    with pytest.raises(SystemExit, match="output.txt"):
        study.pretrain_all([["--no-such-flag", str(broken)]], 1)
    assert "--no-such-flag" in (broken / "output.txt").read_text()


def test_scores_of_several_seeds_are_a_mean_and_a_deviation():
    assert study.cells([[0.25, 1.0]]) == ["0.250", "1.000"]
    assert study.cells([[0.2, 1.0], [0.4, 1.0]]) == ["0.300 ± 0.141", "1.000 ± 0.000"]


def test_search_scores_settings_on_validation_frames_alone(tmp_path, monkeypatch, capsys,
                                                           synthetic_set):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vit.ARCHS, "tiny", dict(dim=32, depth=2, heads=2))
    monkeypatch.setattr(search, "pretrain_all", lambda runs, jobs: [*map(pretrain.main, runs)])
    read, polyps = set(), data.open_labelled(synthetic_set, "polyps")
    real = probe_segment.read_batch
    monkeypatch.setattr(probe_segment, "read_batch",
                        lambda paths, **how: read.update(paths) or real(paths, **how))
    torch.manual_seed(0)
    vit.save_backbone("w.pt", vit.build_vit("tiny", image_size=28), "tiny")
    monkeypatch.setattr(search, "SETTINGS", {"base": "", "rate 1/50": "--backbone-lr 0.02"})
    search.main(f"w.pt --arch tiny --data {synthetic_set}/unlabelled --polyps {synthetic_set} "
                f"--grades {synthetic_set} {TINY}".split())
    rows = re.findall(r"^\| ([^|]+) \|( [-0-9.]+ \|){4}$", capsys.readouterr().out, re.M)
    assert [name for name, _ in rows] == ["as released", "base", "rate 1/50"]
    test = {polyps.paths[i] for i in polyps.splits[0].test}
    assert len(read) == len(polyps.paths) - len(test) and not read & test
    args = torch.load("runs/search/rate-1-of-50/teacher_2.pt", weights_only=True)["args"]
    assert args["backbone_lr"] == 0.02 and args["init"] == "w.pt"
