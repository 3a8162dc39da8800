"""docs/study.py and docs/search.py from end to end, on a few frames of 64 pixels and a tiny
architecture."""
import json
import pathlib
import re
import types

import numpy as np
import pytest
import torch

import curate
import data
import pretrain
import probe_segment
import results
import synthetic
import vit
from docs import search, study

TINY = ("--steps 2 --batch 4 --global-size 28 --local-size 28 --local-crops 2 --prototypes 16 "
        "--head-hidden 32 --workers 0 --device cpu")
CURATE = "--sharp 0 9 --workers 0 --device cpu"  # so few pixels are blurred


def test_study_trains_and_scores(tmp_path, monkeypatch, capsys, synthetic_set, few_draws):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vit.ARCHS, "tiny", dict(dim=32, depth=2, heads=2))
    monkeypatch.setattr(synthetic, "ensure", lambda: synthetic_set)
    trained, choose = [], curate.main
    monkeypatch.setattr(study.curate, "main", lambda argv: choose(argv + CURATE.split()))

    def train(runs, jobs):
        for flags in runs:
            trained.append(flags)
            pretrain.main(flags)
    monkeypatch.setattr(study, "STEPS", 4)
    monkeypatch.setattr(study, "pretrain_all", train)
    study.main(f"--targets 4 --archs tiny --seeds 0 1 --out study {TINY}".split())
    out = capsys.readouterr().out
    assert len(trained) == 6
    rows = json.loads(pathlib.Path("study/study.json").read_text())
    assert [(row["pre-trained on"], row["frames"]) for row in rows] == [
        ("random initialisation", 0), ("curated", 4), ("random", 4), ("all", 12),
        ("curated - random", 4), ("curated - all", 4)]
    columns = [key for key in rows[0] if "," in key and not key.endswith(" sd")]
    assert sorted(column.split(", synthetic")[0] for column in columns) == sorted(
        2 * ["landmarks accuracy", "grades kappa, softmax", "grades kappa, kNN", "polyps Dice"])
    for column in columns:
        curated, random, gain = rows[1][column], rows[2][column], rows[4][column]
        assert gain == pytest.approx(curated - random, abs=1e-9)
        low, high = rows[4][f"{column} low"], rows[4][f"{column} high"]
        assert low is None or low <= gain + 1e-9 <= high + 2e-9      # a single group says nothing
    assert len(re.findall(r"^\| tiny \|", out, re.M)) == 6
    listed = (tmp_path / "study/random-4-0.txt").read_text().split()
    assert len(set(listed)) == 4
    assert all((synthetic_set / "unlabelled" / name).exists() for name in listed)
    # what is there is not computed again, and says the same
    monkeypatch.setattr(study, "segment", None)
    study.main(f"--targets 4 --archs tiny --seeds 0 1 --out study {TINY}".split())
    assert json.loads(pathlib.Path("study/study.json").read_text()) == rows


def test_study_of_given_frames_starts_from_given_weights(tmp_path, monkeypatch, synthetic_set,
                                                         few_draws):
    """The same sets as folders of one's own: a second root is tested on whole; an architecture with
    --init takes the recipe adapt, and its first row is of the weights as released."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vit.ARCHS, "tiny", dict(dim=32, depth=2, heads=2))
    choose = curate.main
    monkeypatch.setattr(study.curate, "main", lambda argv: choose(argv + CURATE.split()))
    monkeypatch.setattr(study, "STEPS", 4)
    monkeypatch.setattr(study, "pretrain_all", lambda runs, jobs: [*map(pretrain.main, runs)])
    vit.save_backbone("w.pt", vit.build_vit("tiny", image_size=28), "tiny")
    study.main(f"--data {synthetic_set}/unlabelled --polyps {synthetic_set} {synthetic_set}/scope2 "
               f"--grades {synthetic_set} --init tiny=w.pt --targets 4 --archs tiny --seeds 0 "
               "--kinds curated random "
               f"--exclude {synthetic_set}/scope2/Kvasir-SEG/images --out study {TINY}".split())
    rows = json.loads(pathlib.Path("study/study.json").read_text())
    assert [(row["pre-trained on"], row["frames"]) for row in rows] == [
        ("as released", 0), ("curated", 4), ("random", 4), ("curated - random", 4)]
    assert not any("landmarks" in key for key in rows[0])
    assert "polyps Dice, synthetic scope2" in rows[0]
    args = torch.load("study/tiny-4-curated-0/teacher_2.pt", weights_only=True)["args"]
    assert args["recipe"] == "adapt" and args["init"] == "w.pt"
    with pytest.raises(SystemExit):
        study.parse(["--init", "w.pt"])


def test_a_run_that_has_a_teacher_is_not_repeated_and_a_failed_one_ends_the_study(tmp_path):
    done, broken = tmp_path / "done", tmp_path / "broken"
    done.mkdir()
    torch.save({}, done / "teacher_2.pt")
    study.pretrain_all([["--no-such-flag", str(done)]], 1)
    with pytest.raises(SystemExit, match="output.txt"):
        study.pretrain_all([["--no-such-flag", str(broken)]], 1)
    assert "--no-such-flag" in (broken / "output.txt").read_text()


def test_differences_are_paired_over_seeds_and_frames():
    """Two seeds of two frames' Dice, worked out by hand: the interval draws frames, the deviation
    is that of the seeds."""
    labelled = types.SimpleNamespace(groups=np.array(["a", "b"]), classes=("polyp",))
    tested = results.Tested("here", labelled, [np.arange(2)])
    sets, key = {"polyps": (labelled, [tested])}, "polyps Dice, here"
    ours = [{key: np.array([0.5, 0.75])}, {key: np.array([0.75, 1.0])}]
    theirs = [{key: np.array([0.25, 0.75])}, {key: np.array([0.25, 0.75])}]
    ours, theirs = ([study.measured(sets, found) for found in side] for side in (ours, theirs))
    assert study.spread([study.values(seed) for seed in ours]) == pytest.approx(
        {key: 0.75, f"{key} sd": 0.125 * 2**0.5})
    row = study.paired(ours, theirs)
    assert row[key] == 0.25 and row[f"{key} sd"] == pytest.approx(0.125 * 2 * 2**0.5 / 2)
    # frame a alone gains 0.375, frame b alone 0.125
    assert (row[f"{key} low"], row[f"{key} high"]) == (0.125, 0.375)


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
