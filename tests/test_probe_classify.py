"""probe_classify.py: metrics and kNN against recorded numbers, the fit against Newton's method, the
whole command."""
import json
import pathlib
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import images
import frozen
import probe_classify as pc
import probe_mes as mes
import results
import vit

METRICS = json.loads((pathlib.Path(__file__).parent / "reference" / "metrics.json").read_text())


def tiny_vit(depth=4, seed=0):
    torch.manual_seed(seed)
    model = vit.VisionTransformer(dim=64, depth=depth, heads=1, image_size=56, layerscale=1.0)
    return model.eval().requires_grad_(False)


def frame(path, label, seed):
    """Noise with stripes whose direction is the label's."""
    rng = np.random.default_rng((seed, label))
    y, x = np.mgrid[:40, :48]
    stripes = 60 * np.sin(0.8 * (x * np.cos(label) + y * np.sin(label)) + rng.uniform(0, 6))
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.normal(120, 25, (40, 48, 3)) + stripes[..., None]
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


def hyper_kvasir(root, seed=0, counts=(("cecum", 15), ("ileum", 2), ("pylorus", 10)), first_fold=0):
    """HyperKvasir's tree with official folds: two ileum frames, so that three of five folds have none."""
    lines = ["file-name;class-name;split-index"]
    for label, (name, n) in enumerate(counts):
        tract = "upper" if name == "pylorus" else "lower"
        for i in range(n):
            folder = root / f"labeled-images/{tract}-gi-tract/anatomical-landmarks/{name}"
            frame(folder / f"{name}{seed}x{i}.jpg", label, 100 * seed + i)
            lines.append(f"{name}{seed}x{i}.jpg;normal-{name};{i * 5 // n if n >= 5 else i}")
    (root / "official_splits").mkdir(exist_ok=True)
    (root / "official_splits/5_fold_split.csv").write_text("\n".join(lines) + "\n")
    return root


# ---------------------------------------------------------------------------------------------
# Metrics


@pytest.mark.parametrize("name", METRICS)
def test_metrics_equal_the_reference(name):
    case = METRICS[name]
    true, pred, n = case["true"], case["pred"], case["n_classes"]
    assert pc.accuracy(true, pred) == pytest.approx(case["accuracy"], abs=1e-12)
    assert pc.macro_f1(true, pred, n) == pytest.approx(case["macro_f1"], abs=1e-12)
    assert pc.confusion(true, pred, n).tolist() == case["confusion"]


def test_metrics_of_nothing_and_of_wrong_labels():
    empty = torch.empty(0, dtype=torch.long)
    assert np.isnan(pc.accuracy(empty, empty)) and np.isnan(pc.macro_f1(empty, empty, 3))
    assert pc.confusion(empty, empty, 3).sum() == 0
    with pytest.raises(ValueError, match=r"0\.\.2"):
        pc.confusion(torch.tensor([0, 3]), torch.tensor([0, 1]), 3)


def test_bootstrap_draws_whole_groups():
    value = np.repeat([0.0, 1.0, 2.0, 3.0], 50)  # four patients, each with 50 equal frames
    groups = np.repeat(list("abcd"), 50)
    low, high = results.bootstrap_interval(lambda rows: value[rows].mean(), groups)
    assert low < 0.6 and high > 2.4  # by frames it would be 1.5 +- 0.16
    assert (low, high) == results.bootstrap_interval(lambda rows: value[rows].mean(), groups)
    alone = results.bootstrap_interval(lambda rows: [1.0, 2.0], ["a", "a"])
    assert np.isnan(alone).all() and np.shape(alone) == (2, 2)
    assert np.isnan(results.bootstrap_interval(lambda rows: float("nan"), ["a", "b"], n=5)).all()


# ---------------------------------------------------------------------------------------------
# Heads


@pytest.mark.parametrize("k", [5, 20])
def test_knn_equals_the_reference(reference, k):
    z = {name: torch.from_numpy(a) for name, a in reference("knn").items()}
    expected = z[f"probs_k{k}"]
    given = z["train_x"], z["train_y"], z["test_x"]
    found = pc.knn_probabilities(*given, k, 0.07, 5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(pc.knn_predict(*given, k=k, n_classes=5), expected.argmax(1))


def test_knn_with_few_frames_and_ties():
    x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1, 0])
    near = torch.tensor([[3.0, 0.1], [0.1, 5.0]])
    assert pc.knn_predict(x, y, near).tolist() == [1, 0]  # k = 20 is cut to 2
    assert pc.knn_predict(x, y, torch.tensor([[2.0, 2.0]]), n_classes=4).tolist() == [0]  # a tie
    assert pc.knn_probabilities(x, y, torch.ones(3, 2), n_classes=4).shape == (3, 4)
    with pytest.raises(ValueError, match="one training frame"):
        pc.knn_predict(x[:0], y[:0], x)


def problem(n=60, dim=6, n_classes=3, seed=0, overlap=1.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % n_classes
    means = torch.randn(n_classes, dim, generator=g, dtype=torch.double)
    return means[y] + overlap * torch.randn(n, dim, generator=g, dtype=torch.double), y


def objective(w, b, x, y, l2, weight):
    """Mean (weighted) cross-entropy + l2/2 |W|^2, written out."""
    z = x @ w.T + b
    nll = z.exp().sum(1).log() - z[torch.arange(len(y)), y]
    share = torch.ones(len(y), dtype=x.dtype) if weight is None else weight[y]
    return (share * nll).sum() / share.sum() + l2 / 2 * (w**2).sum()


def newton(x, y, n_classes, l2, weight):
    """The minimum by Newton's method with the whole Hessian. The biases' common constant is fixed by
    a start at 0 (lstsq)."""
    split = n_classes * x.shape[1]
    f = lambda p: objective(p[:split].view(n_classes, -1), p[split:], x, y, l2, weight)
    p = torch.zeros(split + n_classes, dtype=torch.double)
    for _ in range(50):
        g, h = torch.autograd.functional.jacobian(f, p), torch.autograd.functional.hessian(f, p)
        step = torch.linalg.lstsq(h, g, driver="gelsd").solution
        t = 1.0
        while f(p - t * step) > f(p) and t > 1e-9:
            t /= 2
        p = p - t * step
    assert torch.autograd.functional.jacobian(f, p).abs().max() < 1e-12
    return p[:split].view(n_classes, -1), p[split:]


@pytest.mark.parametrize("l2, weight", [
    (1.0, None), (1e-2, None), (1e-4, None), (1e-2, (1.0, 0.2, 3.0)), (0.0, None)])
def test_fit_linear_equals_newton(l2, weight):
    # without a penalty the classes must overlap, or there is no minimum
    x, y = problem(overlap=1.0 if l2 else 4.0)
    weight = None if weight is None else torch.tensor(weight, dtype=torch.double)
    head, (w, b) = pc.fit_linear(x, y, 3, l2, weight), newton(x, y, 3, l2, weight)
    # without a penalty a common shift of all rows is free
    centred = (lambda m: m - m.mean(0)) if l2 == 0 else (lambda m: m)
    torch.testing.assert_close(centred(head.weight), centred(w), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.bias - head.bias.mean(), b - b.mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("l2", [10.0, 1e-1, 1e-4])
@pytest.mark.parametrize("shape", ["tall", "more dimensions than frames", "collinear"])
def test_fit_linear_leaves_no_gradient(l2, shape):
    x, y = problem(*{"more dimensions than frames": (30, 120)}.get(shape, (200, 10)))
    if shape == "collinear":  # badly scaled as well
        mixed = x @ torch.randn(10, 10, dtype=torch.double)
        x = torch.cat([x, mixed, 1e-3 * x, 100 * x[:, :1], torch.zeros(200, 1)], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = pc.fit_linear(x, y, 3, l2).requires_grad_(True)
    value = objective(head.weight, head.bias, x, y, l2, None)
    grads = torch.autograd.grad(value, [head.weight, head.bias])
    scale = x.square().sum(1).mean().sqrt().item()
    assert max(g.abs().max().item() for g in grads) < 1e-6 * scale


@pytest.mark.parametrize("n, d", [(18, 384), (60, 384)])
def test_fit_linear_ends_soon_on_few_separable_frames(n, d, monkeypatch):
    """Some 250 evaluations; where minimise does not scale its objective, L-BFGS stalls."""
    g, y = torch.Generator().manual_seed(0), torch.arange(n) % 6
    x = torch.randn(6, d, generator=g)[y] + torch.randn(n, d, generator=g)
    x = x.cumsum(1)  # neighbouring dimensions resemble each other
    calls, real = [], pc.minimise
    monkeypatch.setattr(pc, "minimise", lambda objective, params: real(
        lambda: calls.append(1) or objective(), params))
    pc.fit_linear((x - x.mean(0)) / x.std(0), y, 6, 1e-3)
    assert len(calls) < 500


def test_fit_linear_does_not_penalise_the_bias():
    x, y = problem(60)
    y = torch.where(torch.arange(60) < 45, 0, torch.where(torch.arange(60) < 55, 1, 2))
    head = pc.fit_linear(x, y, 3, 1e9)
    assert head.weight.abs().max() < 1e-6
    torch.testing.assert_close(head.bias.softmax(0), torch.tensor([45, 10, 5]) / 60, check_dtype=False)


def test_weights_count_like_copies():
    x, y = problem(30)
    copies = torch.cat([torch.arange(30), torch.nonzero(y == 1)[:, 0]])
    ours = pc.fit_linear(x, y, 3, 0.01, torch.tensor([1.0, 2.0, 1.0]))
    theirs = pc.fit_linear(x[copies], y[copies], 3, 0.01)
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-4, atol=1e-5)


def test_fit_linear_with_an_absent_class_and_without_frames():
    x, y = problem(40)
    x, y = x[y != 1], y[y != 1]
    state = torch.get_rng_state()
    head = pc.fit_linear(x.float(), y, 3, 0.1)
    assert torch.equal(state, torch.get_rng_state())
    assert head.weight.dtype == torch.float32 and not head.weight.requires_grad
    assert head.bias[1] == -torch.inf and not head.weight[1].any()
    assert head(x.float()).softmax(1)[:, 1].eq(0).all()
    two = pc.fit_linear(x, y // 2, 2, 0.1)  # the other classes are fitted as if it did not exist
    torch.testing.assert_close(head.weight[[0, 2]], two.weight.float())
    one = pc.fit_linear(x[:1], y[:1], 3, 0.1)  # one frame of one class
    assert one(x).argmax(1).unique().tolist() == [y[0]]
    with pytest.raises(ValueError, match="one training frame"):
        pc.fit_linear(x[:0], y[:0], 3, 0.1)


def test_a_fit_that_stops_early_warns():
    x, y = problem()
    w = torch.zeros(3, 6, dtype=torch.double, requires_grad=True)
    with pytest.warns(UserWarning, match="gradient entry of .* after 2 iterations"):
        pc.minimise(lambda: F.cross_entropy(x @ w.T, y), [w], max_iter=2)


def planted_features(n=40, dim=8, n_blocks=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"cls": torch.randn(n, n_blocks, dim, generator=g), "patch": torch.randn(n, dim, generator=g)}


@pytest.mark.parametrize("blocks, patch, width", [
    (1, False, 8), (4, False, 32), (1, True, 16), (4, True, 40)])
def test_linear_inputs_are_standardised_by_training_rows_alone(blocks, patch, width):
    features, rows = planted_features(), np.arange(25)
    features["cls"][:25, :, 2] = 7.0  # constant in training
    y = torch.arange(40) % 2
    inputs = pc.linear_head(features, y, rows, 2, blocks, patch, 1.0).inputs
    x = inputs(features, rows)
    assert x.shape == (25, width) and x.isfinite().all()
    assert inputs(features, np.arange(40)).isfinite().all()
    assert x.mean(0).abs().max() < 1e-6
    assert set(x.std(0, correction=0).round(decimals=4).tolist()) <= {0.0, 1.0}
    before = inputs(features, np.arange(5))
    features["cls"][30:] = 1e6
    again = pc.linear_head(features, y, rows, 2, blocks, patch, 1.0)
    assert torch.equal(before, again.inputs(features, np.arange(5)))
    last = (features["cls"][:5, -1] - features["cls"][:25, -1].mean(0))[:, 0]
    there = before[:, (blocks - 1) * 8]  # the last block's token stands last
    assert torch.corrcoef(torch.stack([last, there]))[0, 1] > 0.9999


def test_choice_reads_validation_labels_alone():
    features = planted_features(90, seed=1)
    y = (features["cls"][:, 0, 0] > 0).long()  # readable from the first of the four blocks only
    split = data.Split(np.arange(40), np.arange(40, 65), np.arange(65, 90))

    def choice(labels):
        return results.best_on_validation(pc.linear_head, pc.GRID, features, labels, split, 2,
                                          pc.macro_f1).setting

    setting = choice(y)
    assert setting["blocks"] == 4
    poisoned = y.clone()
    poisoned[split.test] = 1 - y[split.test]
    assert choice(poisoned) == setting
    # all tie: the strongest regularisation, the smallest input
    assert choice(torch.zeros(90, dtype=torch.long)) == pc.GRID[0]


# ---------------------------------------------------------------------------------------------
# Features


def test_extract_is_the_backbones_tokens_and_leaves_no_trace(tmp_path):
    for i in range(5):
        frame(tmp_path / f"{i}.png", i, i)
    paths, model = data.images_in(tmp_path), tiny_vit(depth=6)
    model.train()
    state = torch.get_rng_state()
    found = frozen.extract(model, paths, "cpu", image_size=56, batch=2)
    assert model.training and torch.equal(state, torch.get_rng_state())
    model.eval()
    blocks = model.intermediate(frozen.read_batch(paths, 56), [2, 3, 4, 5])
    cls, patch = torch.stack([b["cls"] for b in blocks], 1), blocks[-1]["patches"].mean(1)
    torch.testing.assert_close(found["cls"], cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["patch"], patch, rtol=1e-4, atol=1e-5)
    assert frozen.extract(model, [], "cpu")["cls"].shape == (0, 4, 64)
    assert frozen.extract(tiny_vit(depth=2), paths[:1], "cpu", 56)["cls"].shape == (1, 2, 64)


# ---------------------------------------------------------------------------------------------
# The command


FIVE_EACH = ("cecum", 5), ("ileum", 5), ("pylorus", 5)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Two capture efforts in HyperKvasir's layout and a small checkpoint."""
    root = tmp_path_factory.mktemp("classify")
    hyper_kvasir(root / "set/hyper-kvasir")
    hyper_kvasir(root / "set/scope2/hyper-kvasir", seed=1, counts=FIVE_EACH)
    vit.save_backbone(root / "b.pt", tiny_vit(seed=5), None, step=7)
    return root


@pytest.fixture
def quick(workplace, monkeypatch):
    """Few draws and strengths, features under the test's folder, the small set in the synthetic
    set's place."""
    monkeypatch.chdir(workplace)
    interval = results.bootstrap_interval
    monkeypatch.setattr(results, "bootstrap_interval", lambda *a, **k: interval(*a, **k | {"n": 20}))
    monkeypatch.setattr(pc, "HEADS", pc.HEADS | {"linear": (pc.linear_head, pc.GRID[2:8])})
    monkeypatch.setattr(results.synthetic, "ensure", lambda: workplace / "set")
    return workplace


def test_command_prints_the_same_rows_twice(quick, monkeypatch, capsys):
    rows = pc.main(["b.pt", "--device", "cpu"])
    printed = capsys.readouterr().out
    random = "random initialisation (ViT 64/4/1/0)"
    results = [r for r in rows if r["table"] == "results"]
    tried = [("majority class", "none"), ("b.pt", "kNN"), ("b.pt", "linear"), (random, "kNN"),
             (random, "linear")]
    assert [(r["backbone"], r["head"], r["tested on"]) for r in results] == [
        (*each, t) for each in tried for t in ("held-out, same source", "scope2")]
    # of the majority: folds of 3 + 2 cecum and pylorus frames, 0 or 1 ileum; then balanced frames
    assert results[0]["accuracy"] == pytest.approx(15 / 27, abs=0.02)
    assert results[1]["accuracy"] == pytest.approx(1 / 3)
    tested = {"held-out, same source": 27, "scope2": 5 * 15}
    for row in results:
        matrix = np.array(row["confusion"])
        assert matrix.sum() == tested[row["tested on"]]
        assert matrix.trace() / matrix.sum() == pytest.approx(row["accuracy"], abs=0.03)
        f1 = [row[f"F1 {c}"] for c in ("cecum", "ileum", "pylorus")]
        assert row["macro F1"] == pytest.approx(np.mean(f1))
    assert len(results[4]["chosen on validation"]) == 5 and results[4]["step"] == 7
    shots = [r for r in rows if r["table"] == "few-shot" and r["backbone"] == "b.pt"]
    assert [r["labelled per class"] for r in shots] == [1, 5, 10, 25, 50]
    assert all(r["draws"] >= 5 for r in shots)
    # ileum's two frames lie in folds 0 and 1: with one tested and one validated, training has none
    assert shots[0]["fewer at hand"] == "ileum: 0"
    assert shots[3]["fewer at hand"] == "cecum: 9, ileum: 0, pylorus: 6"
    found = {(r["backbone"], r["head"], r["tested on"]): r["accuracy"] for r in results}
    for gain in (r for r in rows if r["table"] == "difference"):
        of = gain["head"], gain["tested on"]
        difference = found[gain["backbone"], *of] - found[random, *of]
        assert gain["minus"] == random and gain["accuracy"] == pytest.approx(difference)
        assert gain["accuracy low"] - 0.2 <= gain["accuracy"] <= gain["accuracy high"] + 0.2
    assert json.loads((quick / "b.landmarks.json").read_text()) == rows
    for words in ("| backbone | head | tested on | accuracy | macro F1 |", "Confusion, b.pt, linear",
                  "paper value: not available", "seed: 0", "frames: 27",
                  "also tested on: scope2: HyperKvasir anatomical landmarks, official folds 0, 1, 2, "
                  "3, 4, 15 frames of "):
        assert words in printed
    monkeypatch.setattr(vit.VisionTransformer, "intermediate",
                        lambda *a, **k: pytest.fail("features were computed again"))
    assert pc.main(["b.pt", "--device", "cpu", "--out", "again.json"]) == rows


@pytest.fixture
def two_draws(monkeypatch):
    """Two of few labels, for tests that do not count them."""
    monkeypatch.setattr(results, "DRAWS", 2)


def test_size_is_what_the_backbone_sees(quick, two_draws, monkeypatch):
    seen, embed = set(), vit.VisionTransformer.embed
    monkeypatch.setattr(vit.VisionTransformer, "embed",
                        lambda self, x, *a: seen.add(tuple(x.shape[2:])) or embed(self, x, *a))
    rows = pc.main(["b.pt", "--device", "cpu", "--size", "56", "--splits", "2", "--out", "small.json"])
    chosen = [len(r["chosen on validation"]) for r in rows if "chosen on validation" in r]
    assert set(chosen) == {2} and rows[0]["split"].startswith("2 ")
    assert seen == {(56, 56)} and {r["pixels"] for r in rows} == {56}
    for flag, value in (("--size", "57"), ("--splits", "0")):
        with pytest.raises(SystemExit, match=value):
            pc.main(["b.pt", "--device", "cpu", flag, value])


TINY = ["--device", "cpu", "--size", "28"]


def test_against_the_weights_that_a_run_started_from(quick, two_draws, tmp_path):
    files = [tmp_path / "from.pt", tmp_path / "after.pt"]
    vit.save_backbone(files[0], tiny_vit(seed=5), None)
    vit.save_backbone(files[1], tiny_vit(seed=8), None, args={"init": str(tmp_path / "x/../from.pt")})

    def pairs(*argv):
        rows = pc.main([*map(str, argv), *TINY, "--splits", "1", "--out", str(tmp_path / "r.json")])
        results = {(r["backbone"], r["head"], r["tested on"]): r["accuracy"]
                   for r in rows if r["table"] == "results"}
        found = {}
        for r in (r for r in rows if r["table"] == "difference"):
            of = r["head"], r["tested on"]
            gain = results[r["backbone"], *of] - results[r["minus"], *of]
            assert r["accuracy"] == pytest.approx(gain)
            found[pathlib.Path(r["backbone"]).name, pathlib.Path(r["minus"]).name] = True
        return list(found)

    random = "0)"  # the last part of "random initialisation (ViT 64/4/1/0)"
    plain = [("after.pt", random), ("from.pt", random)]
    assert pairs(files[1], files[0]) == [*plain, ("after.pt", "from.pt")]
    assert pairs(files[1]) == plain[:1]  # what it started from is not tested
    against = [("b.pt", random), plain[1], ("b.pt", "from.pt")]
    assert pairs("b.pt", "--against", files[0]) == against


def test_several_other_sets_each_under_its_folders_name(quick, tmp_path):
    hyper_kvasir(tmp_path / "lisbon", seed=2, counts=FIVE_EACH)
    rows = pc.main(["b.pt", *TINY, "--splits", "1", "--out", str(tmp_path / "r.json"),
                    "--data", "set/hyper-kvasir", "--generalise", "set/scope2",
                    "--generalise", str(tmp_path / "lisbon")])
    sets = ["held-out, same source", "scope2", "lisbon"]
    assert [r["tested on"] for r in rows if r["table"] == "results"] == sets * 5
    assert rows[0]["root"] == "set/hyper-kvasir"
    assert re.match("scope2: HyperKvasir .*; lisbon: ", rows[0]["also tested on"])


def test_every_row_says_its_setting(quick, two_draws, capsys):
    rows = pc.main(["b.pt", "--device", "cpu", "--size", "28"])
    setting = {(r["table"], r["head"]): r["setting"]
               for r in rows if "setting" in r and r["backbone"] == "b.pt"}
    assert setting["results", "kNN"] == "k 20, temp 0.07 (5 of 5 splits)"
    assert re.fullmatch(r"blocks [14], patch (True|False), l2 [\d.]+ \([1-5] of 5 splits\)",
                        setting["results", "linear"])
    assert setting["few-shot", "linear"] == "blocks 1, patch True, l2 0.1 (fixed)"
    assert "| k 20, temp 0.07 (5 of 5 splits) |" in capsys.readouterr().out
    assert results.most_often([{"l2": 1}, {"l2": 2}, {"l2": 2}]) == "l2 2 (2 of 3 splits)"


def test_a_fold_where_a_metric_is_undefined():
    folds = [{"AUC": 0.5, "F1": 1.0}, {"AUC": float("nan"), "F1": 0.0}, {"AUC": 0.7, "F1": 0.5}]
    row = results.mean_of(folds) | results.deviation_of(folds)
    assert row["AUC"] == pytest.approx(0.6) and row["AUC sd"] == pytest.approx(0.1)
    assert row["AUC splits"] == "2 of 3" and "F1 splits" not in row
    assert "| 0.600 ± 0.100 (2 of 3 splits) | 0.500 ± 0.408 |" in results.markdown_table([row])
    nowhere = results.mean_of(folds[1:2]) | results.deviation_of(folds[1:2])
    assert np.isnan(nowhere["AUC"]) and "| n/a ± n/a |" in results.markdown_table([nowhere])


def test_shots_write_a_head_from_a_few_frames(quick, two_draws, tmp_path):
    def few(rows):
        return [(r["labelled per class"], r["accuracy"]) for r in rows
                if r["table"] == "few-shot" and r["backbone"] == "b.pt"]

    out = [*TINY, "--precision", "fp32", "--out", str(tmp_path / "r.json")]
    rows = pc.main(["b.pt", "--shots", "1", "5", *out])
    results = {r["backbone"] for r in rows if r["table"] == "results"}
    assert {r["table"] for r in rows} == {"results", "few-shot"} and results == {"majority class"}
    assert few(rows) == few(pc.main(["b.pt", *out]))[:2]  # the draws of the whole table
    pc.main(["b.pt", "--shots", "5", *out])
    model, labelled = vit.load_backbone("b.pt"), data.open_labelled("set", "landmarks")
    head = frozen.load_head(tmp_path / "b.landmarks.linear.pt", model)
    assert head.setting == pc.FEW_SHOT | {"labelled per class": 5}
    assert set(head.metrics["test"]) >= {"accuracy", "macro F1"}
    split, rng = labelled.splits[0], np.random.default_rng((0, 0))
    drawn = np.concatenate([rng.permutation(split.train[labelled.labels[split.train] == c])[:5]
                            for c in range(3)])
    features = frozen.extract(model, labelled.paths, "cpu", 28)
    fitted = pc.linear_head(features, torch.from_numpy(labelled.labels), drawn, 3, **pc.FEW_SHOT)
    assert torch.equal(fitted.weight, head.network.weight)


def test_stretched_view(quick, tmp_path, monkeypatch):
    seen, square = set(), images.square
    monkeypatch.setattr(images, "square", lambda image, size, view="crop": (
        seen.add(view) or square(image, size, view)))
    rows = pc.main(["b.pt", "--device", "cpu", "--size", "42", "--splits", "1", "--view", "stretch",
                    "--out", str(tmp_path / "r.json")])
    assert seen == {"stretch"} and rows[0]["view"] == "stretch"
    head = frozen.load_head(tmp_path / "b.landmarks.linear.pt", vit.load_backbone("b.pt"))
    assert head.view == "stretch"


def test_without_arguments_random_weights_and_the_majority(quick, monkeypatch):
    monkeypatch.setattr(frozen.vit, "build_vit", lambda arch: tiny_vit(seed=torch.initial_seed()))
    rows = pc.main([])
    assert {r["backbone"] for r in rows} == {"majority class", "random initialisation (vitt14)"}
    assert (quick / "runs/random.landmarks.json").exists()
    assert not [r for r in rows if r["table"] == "difference"]


def test_any_tree_of_class_folders(quick, tmp_path):
    for label, name in enumerate(("left", "right")):
        for patient in range(6):
            for i in range(2):
                frame(tmp_path / "tree" / name / f"p{patient}" / f"{i}.png", label, 10 * patient + i)
    rows = pc.main(["b.pt", "--data", str(tmp_path / "tree"), "--device", "cpu",
                    "--out", str(tmp_path / "r.json")])
    linear = next(r for r in rows if r["head"] == "linear" and r["backbone"] == "b.pt")
    assert linear["groups"].startswith("6 groups") and linear["frames"] == 24
    assert "F1 left" in linear and "accuracy sd" in linear


def test_one_split_gives_an_interval_by_patient_and_one_patient_gives_none():
    labels, n = np.array([0, 1] * 10), 20
    metrics = pc.landmark_metrics(("a", "b"))
    pred = torch.from_numpy(np.where(np.arange(n) < 12, labels, 1 - labels))[None]
    outcome = results.Answers(pred, torch.rand(1, n, 2))
    for groups, known in ((list(np.arange(n) // 4), True), (["a"] * n, False)):
        labelled = data.Labelled("x", [], labels, ("a", "b"), groups, None, [])
        row = results.summarise(metrics, labelled, outcome, 0)
        assert row["accuracy"] == 0.6 and np.isnan(row["accuracy low"]) != known
        # the last patient alone is tested: nothing to draw from
        few = outcome._replace(pred=torch.where(torch.arange(n) < 16, -1, pred))
        assert np.isnan(results.summarise(metrics, labelled, few, 0)["F1 a low"])
    assert row["accuracy"] == 0.6 and "| 0.600 [n/a, n/a] |" in results.markdown_table([row])


def test_table_and_json_of_undefined_numbers(tmp_path):
    row = {"a": 0.5, "a sd": 0.25, "b": float("nan"), "b low": 0.0, "b high": 1.0, "n": 3,
           "c": None, "list": [1], "hide": 1}
    assert results.markdown_table([row], hidden={"hide"}).splitlines() == [
        "| a | b | n | c |", "|---|---|---|---|", "| 0.500 ± 0.250 | n/a [0.000, 1.000] | 3 |  |"]
    results.write_rows([row], tmp_path / "new" / "r.json")
    assert json.loads((tmp_path / "new" / "r.json").read_text())[0]["b"] is None


def test_one_sentence_for_wrong_inputs(quick, tmp_path):
    def sentence(*argv):
        with pytest.raises(SystemExit) as stop:
            pc.main([*map(str, argv), "--device", "cpu"])
        assert stop.value.code and "\n" not in str(stop.value)
        return str(stop.value)

    (tmp_path / "empty").mkdir()
    words = sentence("--data", tmp_path / "empty")
    assert "labeled-images/*/anatomical-landmarks" in words and "found nothing" in words
    assert "no such folder" in sentence("--data", tmp_path / "absent")
    for folder in ("images", "masks"):
        frame(tmp_path / "polyps" / folder / "0.png", 0, 0)
    # a segmentation set is not two classes
    assert "found images, masks" in sentence("--data", tmp_path / "polyps")
    hyper_kvasir(tmp_path / "alone", counts=(("ileum", 5),))
    assert "two or more classes for landmarks, found ileum" in sentence("--data", tmp_path / "alone")
    hyper_kvasir(tmp_path / "other", counts=(("cecum", 5), ("z-line", 5)))
    assert "other: expected the classes" in sentence("--generalise", tmp_path / "other")
    ours = quick / "set/hyper-kvasir"
    assert "27 of its frames are --data's own" in sentence("--data", ours, "--generalise", ours)
    assert "--size 0: give a multiple of the patch size" in sentence("--size", 0)
    assert "--shots 0: give at least one" in sentence("--shots", 0)
    (tmp_path / "file").write_text("in the way of a folder")
    assert "results cannot be written there" in (words := sentence("--out", tmp_path / "file/r.json"))
    assert str(tmp_path / "file") in words and "give --out a file in another folder" in words
    assert "is a folder: give the name of a JSON file" in sentence("--out", tmp_path)
    assert sentence("b.pt", "absent.pt") == "absent.pt: no such checkpoint file"
    assert "no such checkpoint file" in sentence(tmp_path / "typing error/b.pt")
    assert not (tmp_path / "typing error").exists()  # said before anything is made
    (tmp_path / "notes.pt").write_text("not a checkpoint")
    assert "notes.pt is not a PyTorch checkpoint" in sentence(tmp_path / "notes.pt")
    torch.save({"optimizer": {}, "step": 3}, tmp_path / "last.pt")
    assert "holds no backbone" in sentence(tmp_path / "last.pt")
    tree = hyper_kvasir(tmp_path / "broken")
    cecum = tree / "labeled-images/lower-gi-tract/anatomical-landmarks/cecum"
    (cecum / "cecum0x3.jpg").write_bytes(b"\xff\xd8\xff")
    assert "cecum0x3.jpg" in sentence("--data", tree)
    for label in range(2):
        for i in range(4):
            frame(tmp_path / "patient" / str(label) / "p0" / f"{i}.png", label, i)
    # one patient cannot be split
    assert "need three patients of each class" in sentence("--data", tmp_path / "patient")


def test_a_draw_that_leaves_a_fold_without_frames_is_left_out():
    """Two folds of two patients; the second fold's AUC has no positive at all and never counts."""
    found = results.Answers(torch.tensor([[0, 1, -1, -1], [-1, -1, 0, 0]]), torch.zeros(2, 4, 2))
    labelled = data.Labelled("x", [], np.array([0, 1, 0, 0]), ("a", "b"), list("abcd"), None, [])

    def metrics(true, pred, prob):
        return {"accuracy": pc.accuracy(true, pred), "AUC": mes.auc(true == 1, pred)}

    score = results.measure(metrics, labelled, found).score
    assert score(np.array([0, 1, 2, 3])) == {"accuracy": 1, "AUC": 1}
    without = score(np.array([0, 1, 0, 1]))
    assert np.isnan(without["accuracy"]) and without["AUC"] == 1
