"""probe_segment.py: metrics against loops, heads against counts made by hand, training on a planted
answer, the whole command."""
import json
import pathlib
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import frozen
import probe_segment as seg
import vit


def random_masks(n, size=(13, 17), seed=0):
    return torch.rand(n, *size, generator=torch.Generator().manual_seed(seed)) > 0.6


def tiny_vit(depth=4, registers=0, seed=0):
    torch.manual_seed(seed)
    model = vit.VisionTransformer(dim=16, depth=depth, heads=2, image_size=56, registers=registers,
                                  layerscale=1.0)
    return model.eval().requires_grad_(False)


def disc_tree(root, n=14, seed=0, colour=0):
    """A Kvasir-SEG tree of red discs on grey, four test frames; the frames differ in size."""
    rng, root = np.random.default_rng(seed), pathlib.Path(root)
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(n):
        h, w = 40 + i % 3 * 4, 50 + i % 2 * 6
        y, x = np.mgrid[:h, :w]
        down, across = y - rng.uniform(12, h - 12), x - rng.uniform(12, w - 12)
        disc = down ** 2 + across ** 2 < rng.uniform(7, 11) ** 2
        frame = rng.normal(90 + colour, 10, (h, w, 3)) + disc[..., None] * (90, 0, 0)
        Image.fromarray(frame.clip(0, 255).astype(np.uint8)).save(root / "images" / f"f{i}.png")
        Image.fromarray(disc.astype(np.uint8) * 255).save(root / "masks" / f"f{i}.png")
    (root / "train.txt").write_text("\n".join(f"f{i}" for i in range(n - 4)))
    (root / "val.txt").write_text("\n".join(f"f{i}" for i in range(n - 4, n)))
    return root


# ---------------------------------------------------------------------------------------------
# Metrics


def test_dice_and_iou_equal_counts_of_pixel_sets():
    for pred, true in zip(random_masks(5), random_masks(5, seed=1)):
        a, b = ({tuple(p) for p in m.nonzero().tolist()} for m in (pred, true))
        dice, iou = 2 * len(a & b) / (len(a) + len(b)), len(a & b) / len(a | b)
        assert seg.dice_iou(pred, true) == pytest.approx((dice, iou), abs=1e-12)
    pred, true = np.array([[True, True, False]]), np.array([[False, True, False]])
    assert seg.dice_iou(pred, true) == pytest.approx((2 / 3, 1 / 2))


def test_empty_masks_have_defined_dice():
    empty, full = torch.zeros(3, 4, dtype=torch.bool), torch.ones(3, 4, dtype=torch.bool)
    assert seg.dice_iou(empty, empty) == (1.0, 1.0)
    assert seg.dice_iou(full, empty) == seg.dice_iou(empty, full) == (0.0, 0.0)
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(4, 3\)"):
        seg.dice_iou(empty, full.T)


@pytest.mark.parametrize("kind", ["noise", "graded", "constant", "empty"])
def test_256_thresholds_equal_the_loop(kind):
    true = random_masks(1)[0] & (kind != "empty")
    noise = torch.rand(13, 17, generator=torch.Generator().manual_seed(2))
    graded, constant = 0.2 + 0.3 * true + 0.1 * noise, torch.full((13, 17), 0.7)
    probability = {"graded": graded, "constant": constant}.get(kind, noise)
    p, g = probability.double().numpy(), true.numpy()
    saved = np.rint((p - p.min()) / max(p.max() - p.min(), 1e-8) * 255)
    dice, iou = [], []
    for threshold in range(256):
        pred = saved >= threshold
        overlap = np.logical_and(pred, g).sum()
        dice.append(2 * overlap / (pred.sum() + g.sum()) if overlap else 0)
        iou.append(overlap / np.logical_or(pred, g).sum() if overlap else 0)
    assert seg.pranet_dice_iou(probability, true) == pytest.approx((np.mean(dice), np.mean(iou)), abs=1e-5)


def test_256_thresholds_are_not_dice_at_one_half():
    true = random_masks(1)[0]
    faint = 0.01 + 0.3 * true  # nothing exceeds 0.5, and stretching makes it perfect except at threshold 0
    assert seg.score(faint, true)[0][0] == 0
    n = true.sum().item()
    assert seg.pranet_dice_iou(faint, true)[0] == pytest.approx((255 + 2 * n / (n + 221)) / 256)


def test_summary_separates_means_over_frames_from_all_pixels():
    true = torch.zeros(2, 4, 4, dtype=torch.bool)
    true[0, :2], true[1, 0, 0] = True, True
    pred = torch.zeros(2, 4, 4)
    pred[0, :2], pred[1, 0, 1] = 1, 1
    row = seg.summary([seg.score(p, t)[0] for p, t in zip(pred, true)], ["a", "b"])
    assert row["Dice"] == row["IoU"] == 0.5 and row["dataset IoU"] == pytest.approx(8 / 10)
    # two groups: one draw in four holds either of them alone
    assert (row["Dice low"], row["Dice high"]) == (0, 1)
    alone = seg.summary([seg.score(pred[0], true[0])[0]] * 2, ["a", "a"])
    assert np.isnan(alone["Dice low"]) and alone["Dice"] == 1


# ---------------------------------------------------------------------------------------------
# Heads


@pytest.mark.parametrize("align", [False, True])
def test_resize_is_bilinear_interpolation(align):
    x = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours, theirs = (f(x) for f in (lambda x: seg.resize(x, (11, 9), align),
                                   lambda x: F.interpolate(x, (11, 9), None, "bilinear", align)))
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (torch.autograd.grad(y.square().sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_by_hand():
    assert count(seg.LinearHead(192, 1)) == 3 * 192 + 1            # scale, shift, weight; bias
    assert count(seg.LinearHead(1536, 4)) == 3 * 6144 + 1
    head = seg.DPTHead(384)  # ViT-S: widths 48, 96, 192, 384 (sum 720), 256 channels
    assert count(head.levels) == (4 * (768 * 384 + 384)            # class token read out by projection
                                  + 384 * 720 + 720                # 1x1 to the widths
                                  + (16 * 48 * 48 + 48)            # rescaled by 4
                                  + (4 * 96 * 96 + 96)             # by 2 (by 1: nothing)
                                  + (9 * 384 * 384 + 384)          # by 1/2
                                  + 9 * 720 * 256)                 # 3x3 to 256, no bias
    # four fusions of two units of two convolutions each, but the deepest has one unit
    assert count(head.fusions) == 7 * 2 * 9 * 256 * 256 + 4 * (256 * 256 + 256)
    assert count(head) - count(head.levels) - count(head.fusions) == (
        (9 * 256 * 256 + 256) + (9 * 256 * 128 + 128) + (9 * 128 * 32 + 32) + 33)


# 5 and 6 are halved to 3; 3 * 32 = 96
@pytest.mark.parametrize("grid, fine", [((4, 4), (64, 64)), ((5, 6), (96, 96))])
def test_head_shapes(grid, fine):
    tokens = torch.randn(2, 4, 1 + grid[0] * grid[1], 16)
    assert seg.LinearHead(16, 4)(tokens, grid).shape == (2, *grid)
    assert seg.DPTHead(16, channels=8)(tokens, grid).shape == (2, *fine)


def test_dpt_fuses_deepest_first_and_by_its_definition():
    torch.manual_seed(0)
    head, tokens, grid, calls = seg.DPTHead(16, channels=8), torch.randn(1, 4, 17, 16), (4, 4), []
    for i, fusion in enumerate(head.fusions):
        fusion.register_forward_hook(lambda _, inputs, output, i=i: calls.append((i, inputs, output)))
    out = head(tokens, grid)
    assert [i for i, _, _ in calls] == [3, 2, 1, 0]
    sides = [tuple(inputs[0].shape[-2:]) for _, inputs, _ in calls]
    assert sides == [(2, 2), (4, 4), (8, 8), (16, 16)]
    assert all(after[1][1] is before[2] for before, after in zip(calls, calls[1:]))
    up = torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    x = None  # the definition once more, with PyTorch's own resize
    for level, fusion in zip(reversed(head.levels), reversed(head.fusions)):
        i = 3 if x is None else i - 1
        cls = tokens[:, i, :1].expand(-1, 16, -1)
        y = F.gelu(level.readout(torch.cat([tokens[:, i, 1:], cls], -1)))
        y = y.transpose(1, 2).reshape(1, 16, 4, 4)
        y = level.reduce(level.rescale(level.project(y)))
        unit = lambda u, z: z + u.conv2(u.conv1(z.relu()).relu())  # noqa: E731
        x = y if x is None else x + unit(fusion.unit1, y)
        x = fusion.project(up(unit(fusion.unit2, x)))
    x = head.classify(head.conv2(up(head.conv1(head.project(x).relu()))).relu())
    torch.testing.assert_close(out, x[:, 0], rtol=1e-4, atol=1e-5)


def test_class_token_matters_to_dpt_alone():
    tokens = torch.randn(2, 4, 17, 16, generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, :, 0] += 1
    for head, same in ((seg.LinearHead(16, 4), True), (seg.DPTHead(16, 8), False)):
        assert torch.equal(head.eval()(tokens, (4, 4)), head(other, (4, 4))) == same


def test_blocks_are_dinov2s():
    dpt = {12: (2, 5, 8, 11), 24: (4, 11, 17, 23), 40: (9, 19, 29, 39)}
    assert {depth: seg.blocks_of("dpt", depth) for depth in dpt} == {d: (b, False) for d, b in dpt.items()}
    assert seg.blocks_of("linear", 12) == ((11,), True)
    assert seg.blocks_of("boosted", 40) == ((36, 37, 38, 39), True)


# ---------------------------------------------------------------------------------------------
# Tokens, training, prediction


def test_loss_by_hand_and_on_empty_masks():
    ones, empty = torch.ones(1, 4, 5), torch.zeros(1, 4, 5)
    loss = seg.segmentation_loss(torch.zeros(1, 4, 5), ones).item()
    assert loss == pytest.approx(np.log(2) + 1 - (2 * 10 + 1) / (10 + 20 + 1))
    z = torch.full((1, 4, 5), -30.0, requires_grad=True)
    loss = seg.segmentation_loss(z, empty)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and z.grad.isfinite().all()


def test_frozen_tokens_are_the_backbones_and_are_kept(tmp_path, monkeypatch):
    paths = data.images_in(disc_tree(tmp_path / "k") / "images")[:10]  # more than a batch of 8
    model, folder = tiny_vit(registers=2), tmp_path / "features"
    how = dict(model=model, paths=paths, kind="dpt", size=28, mirror=True, folder=folder)
    kept = seg.frozen_tokens(**how)
    assert kept.shape == (10, 2, 4, 5, 16) and kept[9].dtype == np.float16
    assert isinstance(kept[9], np.memmap)
    x = frozen.read_batch(paths[9:], 28, "stretch")
    for view, images in enumerate((x, x.flip(-1))):
        blocks = model.intermediate(images, range(4), norm=False)
        expected = torch.stack([torch.cat([b["cls"][:, None], b["patches"]], 1) for b in blocks], 1)
        found = torch.from_numpy(kept[9][view].copy())[None].float()
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    with monkeypatch.context() as m:
        m.setattr(model, "intermediate", lambda *a, **k: pytest.fail("computed again"))
        assert np.array_equal(list(seg.frozen_tokens(**how)), list(kept))
    for other in (dict(model=tiny_vit(registers=2, seed=1)), dict(paths=paths[1:]), dict(size=42),
                  dict(kind="boosted"), dict(mirror=False), dict(dtype=torch.bfloat16)):
        seg.frozen_tokens(**how | other)
    assert len(list(folder.iterdir())) == 7  # each of the six is in the key
    monkeypatch.setattr(frozen.shutil, "disk_usage", lambda folder: mock.Mock(free=100))
    with pytest.raises(ValueError, match="need 0.0 GB.*--features"):
        seg.frozen_tokens(model, paths, "linear", 56, mirror=True, folder=folder)


def planted(n, seed, noise=1.0, dim=12):
    """Tokens of which one direction tells polyp from mucosa, on an 8x8 grid, with mirror images;
    masks of 32x32."""
    g = torch.Generator().manual_seed(seed)
    seeds = (torch.rand(n, 1, 8, 8, generator=g) > 0.93).float()
    cells = F.max_pool2d(seeds, 3, stride=1, padding=1)[:, 0]                # (n, 8, 8)
    tokens = noise * torch.randn(n, 2, 1, 65, dim, generator=g)
    for view, c in enumerate((cells, cells.flip(-1))):
        tokens[:, view, 0, 1:, 3] += 6 * c.flatten(1)
    return tokens.half().numpy(), F.interpolate(cells[:, None], scale_factor=4)[:, 0] > 0.5


def fitted(tokens, masks, seed=0):
    torch.manual_seed(seed)
    head = seg.LinearHead(12, 1)
    seg.fit_head(head, tokens, masks, lr=0.03, steps=150, batch=8, seed=seed)
    return head


def test_linear_head_finds_a_planted_direction_and_nothing_else():
    train, test = planted(40, 0), planted(10, 1)
    assert seg.frame_dice(fitted(*train), test[0][:, :1], list(test[1])).mean() > 0.9
    blind = planted(10, 2)[0]
    # tokens of other frames
    assert seg.frame_dice(fitted(*train), blind[:, :1], list(test[1])).mean() < 0.6


def test_training_repeats_exactly():
    tokens, masks = planted(20, 0)
    first, second, other = (fitted(tokens, masks, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not torch.equal(first["classify.weight"], other["classify.weight"])


def test_training_mirrors_the_mask_with_the_view():
    tokens, masks = planted(40, 0, noise=0.1)
    tokens[:, 0] = 0  # only mirrored views carry the answer
    head = fitted(tokens, masks)
    assert seg.frame_dice(head, tokens[:, 1:], list(masks.flip(-1))).mean() > 0.9


@pytest.mark.parametrize("kind", ["boosted", "dpt"])
def test_mirrored_frame_gives_mirrored_prediction(kind):
    model = tiny_vit()
    torch.manual_seed(0)
    head = seg.new_polyp_head(kind, model.dim, model.depth, 8).eval()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    flipped = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    with_mirror, plain = ([seg.predict(model, head, kind, i, (40, 50), (28, 42), mirror)
                           for i in (image, flipped)] for mirror in (True, False))
    torch.testing.assert_close(with_mirror[0], with_mirror[1].flip(-1), rtol=0, atol=1e-4)
    assert (plain[0] - plain[1].flip(-1)).abs().max() > 1e-3  # without the mirror image it does not
    one = [seg.predict(model, head, kind, image, (40, 50), (s,)) for s in (28, 42)]
    torch.testing.assert_close(plain[0], (one[0] + one[1]) / 2)  # of several sizes the mean


# ---------------------------------------------------------------------------------------------
# The command


SMALL = ("--size 28 --boosted-size 42 --scales 1 1.33 --steps 12 --dpt-channels 8 "
         "--device cpu").split()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Two trees and a checkpoint, of an architecture with a third of its blocks."""
    root = tmp_path_factory.mktemp("segment")
    trees = disc_tree(root / "one"), disc_tree(root / "two", seed=1, colour=20)
    torch.manual_seed(5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vit.ARCHS, "vitt14", vit.ARCHS["vitt14"] | {"depth": 4})
        vit.save_backbone(root / "b.pt", vit.build_vit("vitt14", image_size=56), "vitt14", step=7)
        yield root, trees


def run(root, trees, out):
    return seg.main([str(root / "b.pt"), "--data", str(trees[0]), "--generalise", str(trees[1]),
                     "--heads", "linear", "boosted", "dpt", "--features", str(root / "features"),
                     "--out", str(root / out), *SMALL])


def test_command_prints_rows_twice_the_same(workplace, capsys):
    root, trees = workplace
    rows = run(root, trees, "r.json")
    printed = capsys.readouterr().out
    results = [r for r in rows if r["table"] == "results"]
    backbones = [str(root / "b.pt"), "random initialisation (vitt14)"]
    tried = [("mean training mask", "none"), *((b, h) for b in backbones for h in seg.HEADS.values())]
    assert [(r["backbone"], r["head"], r["tested on"]) for r in results] == [
        (*backbone_and_head, t) for backbone_and_head in tried for t in ("held-out, same source", "two")]
    assert [r["frames tested"] for r in results[:2]] == [4, 14] and results[2]["step"] == 7
    assert json.loads((root / "r.json").read_text())[3]["Dice"] == rows[3]["Dice"]
    assert "| Dice | IoU | dataset IoU | PraNet mDice (256 thresholds) |" in printed
    assert "PraNet: mean over 256" in printed
    gains = [r for r in rows if r["table"] == "difference"]
    assert len(gains) == 6
    dice = {(r["backbone"], r["head"], r["tested on"]): r["Dice"] for r in results}
    for gain in gains:
        of = gain["head"], gain["tested on"]
        assert gain["Dice"] == pytest.approx(dice[gain["backbone"], *of] - dice[gain["minus"], *of])
        assert gain["Dice low"] <= gain["Dice"] <= gain["Dice high"]
    for row in results[2:]:
        with Image.open(root / row["panels"]) as sheet:  # two worst, median, best, none twice
            assert sheet.height // 256 == min(6, row["frames tested"]) and sheet.width >= 3 * 240
    for row in results[2:]:
        row["panels"] = row["panels"].replace("r.", "again.", 1)
    assert run(root, trees, "again.json") == rows


def test_pranet_tree_has_a_row_per_test_set(tmp_path, workplace):
    for part, seed in (("TrainDataset", 0), ("TestDataset/ETIS", 1), ("TestDataset/Kvasir", 2)):
        disc_tree(tmp_path / part, n=12, seed=seed)
    rows = seg.main(["--data", str(tmp_path), "--heads", "linear", "--features", str(tmp_path / "f"),
                     "--out", str(tmp_path / "r.json"), *SMALL])
    assert [(r["head"], r["tested on"], r["frames tested"]) for r in rows] == [
        (head, test, 12) for head in ("none", "linear") for test in ("ETIS", "Kvasir")]
    # preferred, with its own test frames alone: PraNet's are among those that it trains on
    disc_tree(tmp_path / "Kvasir-SEG")
    labelled, sets = seg.open_sets(seg.parse(["--data", str(tmp_path)]), "polyps")
    assert labelled.name.startswith("Kvasir-SEG")
    assert [tested.words for tested in sets] == ["held-out, same source"]


def test_other_sets_need_no_lists_and_synthetic_ones_say_so(tmp_path, workplace):
    root, (tree, _) = workplace
    clinic = disc_tree(tmp_path / "clinic", n=6, seed=3)
    for name in ("train.txt", "val.txt"):
        (clinic / name).unlink()
    made = disc_tree(tmp_path / "made", n=14, seed=4)
    (made / "made_by.json").write_text(json.dumps({"videos": 1, "scale": 1, "seed": 0}))
    rows = seg.main(["--data", str(tree), "--generalise", str(clinic), "--generalise", str(made),
                     "--heads", "linear", "--features", str(tmp_path / "f"),
                     "--out", str(tmp_path / "r.json"), *SMALL])
    assert [(r["tested on"], r["frames tested"]) for r in rows[:3]] == [
        ("held-out, same source", 4), ("clinic", 6), ("synthetic made", 14)]
    assert "; synthetic made: synthetic frames in the layout of" in rows[0]["also tested on"]
    twin = disc_tree(tmp_path / "elsewhere/clinic", n=6, seed=6)
    args = seg.parse(["--data", str(tree), "--generalise", str(clinic), "--generalise", str(twin)])
    assert [s.words for s in seg.open_sets(args, "polyps")[1][1:]] == [str(clinic), str(twin)]
    labelled, sets = seg.open_sets(seg.parse(["--data", str(made)]), "polyps")
    assert labelled.name.startswith("synthetic")
    assert [s.words for s in sets] == ["synthetic held-out, same source"]


def test_trivial_row_knows_where_polyps_were_and_nothing_else():
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    masks[:, 2:5, 3:6] = True
    masks[0, 0, 0] = True  # one frame in four: below the cut
    region = seg.resize(seg.prior(masks, [masks[1]]), (8, 8)) > 0.5
    assert torch.equal(region, masks[1])


def test_one_sentence_for_wrong_inputs(tmp_path, workplace):
    root, trees = workplace
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="Kvasir-SEG.*TrainDataset.*found nothing"):
        seg.main(["--data", str(tmp_path / "empty")])
    (tmp_path / "notes.pt").write_text("not a checkpoint")
    with pytest.raises(SystemExit, match="notes.pt"):
        seg.main([str(tmp_path / "notes.pt"), "--data", str(trees[0]), *SMALL])
    with pytest.raises(SystemExit, match="--steps and --batch"):
        seg.main(["--steps", "0"])
    with pytest.raises(SystemExit, match="--boosted-size 100.*14"):
        seg.main(["--boosted-size", "100"])
    with pytest.raises(SystemExit, match="--scales 0.01: 336 pixels times that are less than a patch"):
        seg.main(["--scales", "1", "0.01", "--device", "cpu"])
    with pytest.raises(SystemExit, match="--size 0: give a multiple"):
        seg.main(["--size", "0"])
    bad = vit.build_vit("vitt14", image_size=56)
    with torch.no_grad():
        bad.blocks[3].mlp.fc1.weight[0, 0] = float("nan")
    vit.save_backbone(tmp_path / "nan.pt", bad, "vitt14")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="nan.pt.*finite"):
        patch.setattr(seg, "prior", lambda *a: pytest.fail("work began"))
        seg.main([str(root / "b.pt"), str(tmp_path / "nan.pt"), "--data", str(trees[0]), *SMALL])


def test_twenty_frames_without_lists_are_enough(workplace, tmp_path):
    root, _ = workplace
    own = disc_tree(tmp_path / "own", n=20, seed=5)
    for name in ("train.txt", "val.txt"):
        (own / name).unlink()
    rows = seg.main([str(root / "b.pt"), "--data", str(own), "--shots", "10", *SMALL, "--steps", "2",
                     "--features", str(tmp_path / "f"), "--out", str(tmp_path / "r.json")])
    assert [r["labelled frames"] for r in rows if r["table"] == "few-shot"] == [10, 10]
    assert (tmp_path / "b.polyps.linear.pt").exists()


def test_shots_write_a_head_from_a_few_frames(workplace, tmp_path):
    root, trees = workplace
    flags = ["--data", str(trees[0]), "--features", str(tmp_path / "f"), "--precision", "fp32",
             *SMALL, "--steps", "3", "--out", str(tmp_path / "r.json")]
    rows = seg.main([str(root / "b.pt"), *flags, "--shots", "1", "4"])
    few = [r for r in rows if r["table"] == "few-shot"]
    assert [(r["backbone"], r["labelled frames"]) for r in few] == [
        (b, n) for b in (str(root / "b.pt"), "random initialisation (vitt14)") for n in (1, 4)]
    assert all(r["Dice sd"] >= 0 and r["setting"] == "lr 0.01 (fixed)" for r in few)
    assert len(rows) == 5
    model = vit.load_backbone(root / "b.pt")
    head = frozen.load_head(tmp_path / "b.polyps.linear.pt", model)
    assert head.setting == seg.FEW_SHOT | {"labelled frames": 4}
    assert set(head.metrics["test"]) == {"Dice"}
    args, labelled = seg.parse(flags), seg.data.open_labelled(trees[0], "polyps")
    drawn = labelled.splits[0].train[np.random.default_rng((0, 0)).permutation(9)[:4]]
    tokens = list(seg.tokens_of(args, model, "linear", labelled, drawn, mirror=True))
    masks = seg.masks_of(labelled, drawn, 28)
    again = seg.trained_head(args, model, "linear", tokens, masks, 1e-2, seed=0).state_dict()
    assert all(torch.equal(t, again[k]) for k, t in head.network.state_dict().items())
