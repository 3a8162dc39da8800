"""probe_mes.py: metrics against recorded numbers and loops, the ordinal head against its definition,
figures, the whole command."""
import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
import figures
import probe_classify as pc
import probe_mes as mes
import probe_segment
import results
import vit
from test_probe_classify import METRICS, frame, hyper_kvasir, planted_features, problem, tiny_vit

CLASSES = tuple(f"Mayo {k}" for k in range(4))


def limuc(root, seed=0):
    """LIMUC's tree with three official lists: ten patients with all grades, the last two of them
    the test set; one file name
    under two grades."""
    lists = [{"train": {c: [] for c in CLASSES}, "val": {c: [] for c in CLASSES}} for _ in range(3)]
    for patient in range(10):
        for grade, c in enumerate(CLASSES):
            for i in range(1 if grade == 3 else 2):
                number = 1 if (patient, grade, i) == (4, 1, 0) else 10 * grade + i
                name = f"UC_patient_{patient}_{number}.bmp"
                part = "test_set" if patient >= 8 else "train_and_validation_sets"
                frame(root / part / c / name, grade, 100 * seed + 10 * patient + i)
                for k, fold in enumerate(lists):
                    if patient < 8 and name not in fold["val" if patient // 2 == k else "train"][c]:
                        fold["val" if patient // 2 == k else "train"][c].append(name)
    for k, fold in enumerate(lists):
        folder = root / f"cross_validation_folds_train_val_info/fold_{k}"
        folder.mkdir(parents=True)
        for part, names in fold.items():
            (folder / f"{part}.json").write_text(json.dumps(names))
    return root


# ---------------------------------------------------------------------------------------------
# Metrics


@pytest.mark.parametrize("name", METRICS)
def test_kappa_equals_the_reference(name):
    case = METRICS[name]
    kappa = mes.quadratic_kappa(case["true"], case["pred"], case["n_classes"])
    assert kappa == pytest.approx(case["quadratic_kappa"], abs=1e-12)


def test_kappa_where_it_is_not_defined():
    assert mes.quadratic_kappa([2, 2], [2, 2]) == 0.0 and np.isnan(mes.quadratic_kappa([], []))
    assert mes.quadratic_kappa([0, 1, 2, 3], [3, 2, 1, 0]) == pytest.approx(-1)


@pytest.mark.parametrize("levels", [3, 1000])
def test_auc_counts_pairs(levels):
    rng = np.random.default_rng(0)
    positive, score = rng.random(40) < 0.3, rng.integers(levels, size=40) / levels
    pairs = [(p > n) + 0.5 * (p == n) for p in score[positive] for n in score[~positive]]
    assert mes.auc(positive, score) == pytest.approx(np.mean(pairs))
    assert np.isnan(mes.auc([True, True], [0.1, 0.2])) and np.isnan(mes.auc([False], [0.1]))


def test_remission_metrics_call_active_disease_positive():
    true, pred = torch.tensor([0, 1, 1, 2, 2, 3, 3, 3]), torch.tensor([0, 0, 2, 2, 1, 1, 3, 2])
    m = mes.mes_metrics(CLASSES)(true, pred, torch.nn.functional.one_hot(pred, 4).float())
    assert m["sensitivity"] == pytest.approx(3 / 5)  # of five active
    assert m["specificity"] == pytest.approx(2 / 3)  # of three in remission
    assert m["F1"] == pytest.approx(2 * 3 / (5 + 4))
    assert m["AUC"] == pytest.approx((3 / 5 + 2 / 3) / 2)
    assert m["accuracy"] == 3 / 8 and m["kappa"] == mes.quadratic_kappa(true, pred)
    true, pred = torch.tensor([0, 1, 2]), torch.tensor([0, 0, 2])
    grades = mes.mes_metrics(data.GRADES)(true, pred, torch.eye(3))  # 1, 2, 3: the first is remission
    assert grades["sensitivity"] == 0.5 and grades["specificity"] == 1
    none = mes.mes_metrics(CLASSES)(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.rand(2, 4))
    assert np.isnan([none["sensitivity"], none["AUC"], none["F1"]]).all() and none["specificity"] == 1


# ---------------------------------------------------------------------------------------------
# Heads


def test_balance_gives_every_class_or_every_frame_the_same_weight():
    y = torch.tensor([0] * 8 + [1] * 2 + [3])
    each, frames = mes.balance(y, 4, 1), mes.balance(y, 4, 0)
    assert [(each[c] * (y == c).sum()).item() for c in range(4)] == pytest.approx([1, 1, 0, 1])
    assert frames.tolist() == [1, 1, 0, 1]


def negative_log_likelihood(w, theta, x, y, l2, weight):
    """The stated objective by differences of cumulative probabilities."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.double).expand(len(x), 2)
    below = torch.sigmoid(theta - (x @ w)[:, None])
    p = torch.cat([ends[:, :1], below, ends[:, 1:]], 1).diff(dim=1)[torch.arange(len(y)), y]
    share = torch.ones(len(y), dtype=torch.double) if weight is None else weight[y]
    return -(share * p.log()).sum() / share.sum() + l2 / 2 * (w**2).sum()


@pytest.mark.parametrize("weight", [None, (1.0, 3.0, 0.5, 2.0)])
@pytest.mark.parametrize("l2", [1.0, 1e-3])
def test_ordinal_fit_leaves_no_gradient(l2, weight):
    x, y = problem(80, 6, 4)
    weight = None if weight is None else torch.tensor(weight, dtype=torch.double)
    w, theta = (t.requires_grad_(True) for t in mes.fit_ordinal(x, y, 4, l2, weight))
    assert (theta.diff() > 0).all()
    for g in torch.autograd.grad(negative_log_likelihood(w, theta, x, y, l2, weight), [w, theta]):
        assert g.abs().max() < 1e-5


def test_ordinal_of_two_classes_is_logistic_regression():
    x, y = problem(60, 5, 2, overlap=2.0)
    # |W|^2 of two opposite rows is half of |w|^2
    (w, theta), head = mes.fit_ordinal(x, y, 2, 0.05), pc.fit_linear(x, y, 2, 0.1)
    torch.testing.assert_close(w, head.weight[1] - head.weight[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(-theta[0], head.bias[1] - head.bias[0], rtol=1e-4, atol=1e-5)


def test_ordinal_finds_planted_thresholds():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20000, 3, generator=g, dtype=torch.double)
    u = torch.rand(20000, generator=g, dtype=torch.double)
    true_w = torch.tensor([2.0, -1.0, 0.0], dtype=torch.double)
    true_theta = torch.tensor([-1.0, 0.5, 2.5], dtype=torch.double)
    y = torch.bucketize(x @ true_w + (u / (1 - u)).log(), true_theta)  # logistic noise
    w, theta = mes.fit_ordinal(x, y, 4, 0.0)
    torch.testing.assert_close(w, true_w, rtol=0, atol=0.1)
    torch.testing.assert_close(theta, true_theta, rtol=0, atol=0.1)


@pytest.mark.parametrize("absent", [None, 0, 2, 3])
def test_ordinal_predicts_the_median_grade(absent):
    features, y = planted_features(60), torch.arange(60) % 4
    rows = np.flatnonzero((y != absent).numpy()) if absent is not None else np.arange(60)
    head = mes.ordinal_head(features, y, rows, 4, blocks=1, patch=False, l2=0.1, power=1)
    p, pred = head(features, np.arange(60))
    assert p.shape == (60, 4) and (p >= 0).all() and p.isfinite().all()
    torch.testing.assert_close(p.sum(1), torch.ones(60))
    assert torch.equal(pred, (p.cumsum(1) < 0.5).sum(1))
    assert absent is None or (absent not in pred.tolist() and not p[:, absent].any())


def test_ordinal_with_one_class_alone():
    features, y, rows = planted_features(12), torch.full((12,), 2), np.arange(6)
    head = mes.ordinal_head(features, y, rows, 4, blocks=1, patch=False, l2=0.1, power=1)
    p, pred = head(features, np.arange(12))
    assert pred.eq(2).all() and p[:, 2].eq(1).all()


# ---------------------------------------------------------------------------------------------
# The online score, the figures, the command


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Two capture efforts in LIMUC's layout, and a run folder with a log and two exported teachers."""
    root = tmp_path_factory.mktemp("mes")
    limuc(root / "set/LIMUC")
    limuc(root / "set/scope2/LIMUC", seed=1)
    run = root / "runs/demo"
    run.mkdir(parents=True)
    log = [{"step": s, "loss": 10 - 0.1 * s} for s in range(0, 40, 5)]
    log += [{"step": s, "probe": {"kappa": 0.01 * s}} for s in (10, 20, 30)]
    lines = "".join(json.dumps(row) + "\n" for row in log)
    (run / "log.jsonl").write_text(lines + '{"step": 9')  # a kill tore the last line
    for step in (9, 100):  # by number, not by name
        vit.save_backbone(run / f"teacher_{step}.pt", tiny_vit(seed=step), None, step=step)
    return root


@pytest.fixture
def quick(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    interval = results.bootstrap_interval
    monkeypatch.setattr(results, "bootstrap_interval", lambda *a, **k: interval(*a, **k | {"n": 20}))
    grid = [s | {"power": p} for s in pc.GRID[4:6] for p in (1, 0)]
    heads = {"softmax": (mes.softmax_head, grid), "ordinal": (mes.ordinal_head, grid)}
    monkeypatch.setattr(mes, "HEADS", mes.HEADS | heads)
    monkeypatch.setattr(results.synthetic, "ensure", lambda: workplace / "set")
    return workplace


def test_online_score_reads_no_test_frame_and_leaves_no_trace(quick):
    labelled, model = data.open_labelled(quick / "set", "mes"), tiny_vit()
    model.train()
    state = torch.get_rng_state()
    score = mes.online_score(model, labelled, "cpu")
    assert set(score) == {"kappa", "macro_f1", "accuracy", "knn_kappa"}
    assert model.training and torch.equal(state, torch.get_rng_state())
    test = set(labelled.splits[0].test)
    blind = [("no such file" if i in test else p) for i, p in enumerate(labelled.paths)]
    labels = np.where([i in test for i in range(len(blind))], 0, labelled.labels)
    unseen = dataclasses.replace(labelled, paths=blind, labels=labels)
    assert mes.online_score(model, unseen, "cpu") == score
    empty = [data.Split(labelled.splits[0].train, np.array([], int), labelled.splits[0].test)]
    with pytest.raises(ValueError, match="found 42 and 0"):
        mes.online_score(model, dataclasses.replace(labelled, splits=empty), "cpu")


def test_command_prints_the_same_rows_twice(quick, monkeypatch, capsys):
    rows = mes.main(["runs/demo/teacher_9.pt", "--out", "r.json", "--device", "cpu"])
    printed = capsys.readouterr().out
    results = [r for r in rows if r["table"] == "results"]
    heads = ("kNN", "softmax", "ordinal")
    backbones = "runs/demo/teacher_9.pt", "random initialisation (ViT 64/4/1/0)"
    tried = [("majority class", "none"), *itertools.product(backbones, heads)]
    assert [(r["backbone"], r["head"], r["tested on"]) for r in results] == [
        (*each, t) for each in tried for t in ("held-out, same source", "scope2")]
    # three folds, each tested on the 14 frames of two patients, or on all 70 of the other set
    tested = {"held-out, same source": 3 * 14, "scope2": 3 * 70}
    columns = "kappa", "macro F1", "accuracy", "sensitivity", "specificity", "F1", "AUC"
    for row in results:
        assert np.sum(row["confusion"]) == tested[row["tested on"]]
        assert {f"{k} sd" for k in columns} <= set(row)
    assert results[0]["kappa"] == 0 and results[0]["AUC"] == 0.5
    assert results[0]["accuracy"] == pytest.approx(4 / 14)
    assert results[2]["groups"].startswith("10 groups") and results[2]["step"] == 9
    assert {r["labelled per class"] for r in rows if r["table"] == "few-shot"} == {1, 5, 10, 25, 50}
    assert {r["head"] for r in rows if r["table"] == "difference"} == set(heads)
    for words in ("## Mayo endoscopic score\n", "MES 2-3 (no remission) as the positive class",
                  "imbalance", "| kappa | macro F1 | accuracy |"):
        assert words in printed
    monkeypatch.setattr(vit.VisionTransformer, "intermediate",
                        lambda *a, **k: pytest.fail("features were computed again"))
    assert mes.main(["runs/demo/teacher_9.pt", "--out", "again.json", "--device", "cpu"]) == rows


def test_uc_grades_are_named_a_stand_in(quick, tmp_path, capsys):
    root = tmp_path / "hyper-kvasir"
    findings = root / "labeled-images/lower-gi-tract/pathological-findings"
    lines = ["file-name;class-name;split-index"]
    for label, grade in enumerate(data.GRADES):
        for i in range(6):
            frame(findings / f"{grade}/{grade}x{i}.jpg", label, i)
            lines.append(f"{grade}x{i}.jpg;{grade};{i // 2}")
    (root / "official_splits").mkdir()
    (root / "official_splits/5_fold_split.csv").write_text("\n".join(lines))
    rows = mes.main(["runs/demo/teacher_9.pt", "--data", str(tmp_path), "--device", "cpu",
                     "--out", str(tmp_path / "r.json")])
    assert "three grades only: a smaller stand-in" in capsys.readouterr().out
    assert rows[0]["frames"] == 18


def coloured(path, colour):
    """(n, 2) positions (x, y) of the pixels of about one colour."""
    pixels = np.array(Image.open(path).convert("RGB")).astype(int)
    rgb = [int(colour[i:i + 2], 16) for i in (1, 3, 5)]
    y, x = np.nonzero(np.abs(pixels - rgb).sum(2) < 40)
    return np.stack([x, y], 1)


def test_curve_with_polyps_has_a_third_panel_and_reads_no_test_frame(quick, monkeypatch,
                                                                          synthetic_set):
    masked, read = data.open_labelled(synthetic_set, "polyps"), set()
    real = probe_segment.read_batch
    monkeypatch.setattr(probe_segment, "read_batch",
                        lambda paths, **how: read.update(paths) or real(paths, **how))
    rows = mes.main(["--curve", "runs/demo", "--polyps", str(synthetic_set), "--size",
                     "28", "--device", "cpu"])
    assert all(0 <= r["dice"] <= 1 for r in rows) and rows[0]["dice"] != rows[1]["dice"]
    assert not read & {masked.paths[i] for i in masked.splits[0].test}
    with Image.open(quick / "runs/demo/curve.png") as image:
        assert image.size == (820, 890)


def test_curve_draws_the_log_and_scores_the_teachers(quick):
    rows = mes.main(["--curve", "runs/demo", "--device", "cpu"])
    labelled = data.open_labelled(quick / "set", "mes")
    assert [r["step"] for r in rows] == [9, 100]
    assert rows[1]["kappa"] == mes.online_score(tiny_vit(seed=100), labelled, "cpu")["kappa"]
    path = quick / "runs/demo/curve.png"
    with Image.open(path) as image:
        assert image.size == (820, 620)
    loss = coloured(path, figures.BLUE)
    # the upper panel: a straight line down to the right, over the first 35 of 102 steps
    loss = loss[loss[:, 1] < 300]
    assert np.corrcoef(loss.T)[0, 1] > 0.99
    assert loss[:, 0].min() == pytest.approx(80, abs=3)
    assert loss[:, 0].max() == pytest.approx(80 + 710 * 35 / 102, abs=4)
    teachers = coloured(path, figures.ORANGE)
    teachers = teachers[teachers[:, 1] > 345]
    assert teachers[:, 0].max() == pytest.approx(80 + 710 * 100 / 102, abs=6)


def test_histogram_is_to_scale(quick):
    rows = mes.main(["--histogram", "--out", "h.png"])
    assert [r["frames"] for r in rows] == [20, 20, 20, 10]
    assert sum(r["share"] for r in rows) == pytest.approx(1)
    x = coloured(quick / "h.png", figures.BLUE)[:, 0]
    bars = np.histogram(x, bins=np.linspace(90, 790, 5))[0]
    assert bars / bars.sum() == pytest.approx([2 / 7, 2 / 7, 2 / 7, 1 / 7], abs=0.01)


@pytest.mark.parametrize("low, high", [(0, 1), (-0.3, 0.7), (3.2, 3.3), (0, 12345), (0.5, 0.5)])
def test_ticks_are_round_and_inside(low, high):
    values = figures.ticks(low, high)
    assert len(values) <= 7 and all(low - 1e-9 <= v <= high + 1e-9 for v in values)
    assert low == high or len(values) >= 2


def test_one_sentence_for_wrong_inputs(quick, tmp_path):
    def sentence(*argv):
        with pytest.raises(SystemExit) as stop:
            mes.main([*map(str, argv), "--device", "cpu"])
        assert stop.value.code and "\n" not in str(stop.value)
        return str(stop.value)

    hyper_kvasir(tmp_path / "landmarks")
    words = sentence("--data", tmp_path / "landmarks")
    assert "LIMUC/train_and_validation_sets" in words and "found labeled-images" in words
    assert "log.jsonl" in sentence("--curve", tmp_path)
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 0, "loss": 1.0}) + "\n")
    assert "--probe-every, --export-every" in sentence("--curve", tmp_path)
    (tmp_path / "teacher_5.pt").write_text("nothing")
    assert "teacher_5.pt is not a PyTorch checkpoint" in sentence("--curve", tmp_path)
    assert "no such checkpoint file" in sentence("nowhere.pt")
    assert pathlib.Path("set").is_dir()
