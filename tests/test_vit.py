"""vit.py against the official code's numbers; packing, stochastic depth and loading against
their definitions."""
import contextlib
import json
import math
import pathlib
import pickle
import types
import urllib.error

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import vit
from figures import principal_colours
from vit import (ARCHS, VisionTransformer, build_vit, class_attention, kept_rows, load_backbone, main,
                 save_backbone)

META = json.loads((pathlib.Path(__file__).parent / "reference" / "meta.json").read_text())
CASES = [name for name in META if name.startswith("vit_")]
SIZES = [(224, 224), (98, 98), (154, 280)]
# the official files of these cases hold every 7th patch token
PATCH_STEP = 7


def small(name, filled):
    m = META[name]
    ffn = "swiglu" if m.get("ffn", "mlp").startswith("swiglu") else "mlp"
    registers, image_size = m.get("reg", 0), m["img_size"]
    return filled(VisionTransformer(m["dim"], m["depth"], m["heads"], ffn, registers, image_size)).eval()


@pytest.mark.parametrize("name", CASES)
def test_names_shapes_and_order_of_the_state_dict(name, filled):
    state = small(name, filled).state_dict()
    assert [(k, list(v.shape)) for k, v in state.items()] == list(META[name]["keys"].items())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("H,W", SIZES)
def test_forward_equals_official(name, H, W, filled, reference, named_input):
    model, r = small(name, filled), reference(name)
    images = named_input(f"image_{H}x{W}", (2, 3, H, W))
    masks = torch.from_numpy(mask_of_the_reference(H // 14 * (W // 14)))
    with torch.no_grad():
        outs = {"": model(images), "masked_": model(images, masks)}
        outs["layer0_"], outs["layer1_"] = model.intermediate(images, [model.depth - 2, -1])
    for prefix, out in outs.items():
        cls, patches = (torch.from_numpy(r[f"{H}x{W}/{prefix}{part}"]) for part in ("cls", "patch"))
        assert_close(out["cls"], cls, rtol=1e-5, atol=5e-6)
        assert_close(out["patches"][:, ::PATCH_STEP], patches, rtol=1e-5, atol=5e-6)
    if model.registers:
        registers = torch.from_numpy(r[f"{H}x{W}/reg"])
        assert_close(outs[""]["registers"], registers, rtol=1e-5, atol=5e-6)


def mask_of_the_reference(n_patches):
    return np.random.RandomState(5).rand(2, n_patches) < 0.4


@pytest.mark.parametrize("name", ["vits14", "vitb14", "vitl14"])
def test_full_size_equals_official(name, filled, reference, named_input):
    r = reference("vit_full")
    with torch.device("meta"):
        model = build_vit(name, image_size=518)
    model = filled(model.to_empty(device="cpu")).eval()
    count = sum(p.numel() for p in model.parameters())
    assert count == int(r[f"{name}/n_params"]) == META[name]["n_params"]
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == META[name]["keys"]
    with torch.no_grad():
        out = model(named_input("image_full", (1, 3, 224, 224)))
    assert_close(out["cls"], torch.from_numpy(r[f"{name}/cls"]), rtol=1e-4, atol=1e-4)
    assert_close(out["patches"][:, ::32], torch.from_numpy(r[f"{name}/patch"]), rtol=1e-4, atol=1e-4)


def test_vitg14_has_the_published_size():
    with torch.device("meta"):
        model = build_vit("vitg14", image_size=518)
    state = model.state_dict()
    assert sum(p.numel() for p in model.parameters()) == 1_136_480_768
    assert len(state) == 567
    assert state["blocks.39.mlp.w12.weight"].shape == (2 * 4096, 1536)


@pytest.mark.parametrize("name", list(ARCHS))
def test_every_architecture_has_heads_of_64(name):
    with torch.device("meta"):
        model = build_vit(name)
    assert model.dim == 64 * model.heads and model.registers == (4 if name.endswith("_reg4") else 0)


def test_unknown_architecture_lists_the_known():
    with pytest.raises(ValueError, match="vitb14"):
        build_vit("vitx14")


# --- initialisation ----------------------------------------------------------------------------


def test_initialisation():
    torch.manual_seed(0)
    model = build_vit("vitt14_reg4")
    assert model.blocks[5].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert (model.blocks[5].mlp.fc1.bias == 0).all()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.03)
    assert 0 < model.cls_token.abs().max() < 1e-5 and 0 < model.register_tokens.abs().max() < 1e-5
    assert (model.mask_token == 0).all() and (model.blocks[0].ls1.gamma == 1e-5).all()
    bound = (3 * 14 * 14) ** -0.5  # the convolution keeps PyTorch's uniform default, bias included
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert model.patch_embed.proj.bias.abs().max() > 0
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)} == {1e-6}


# --- packing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("registers", [0, 4])
def test_packed_equals_separate_with_gradients(registers, filled):
    model = filled(VisionTransformer(64, 2, 2, registers=registers, image_size=56))
    g = torch.Generator().manual_seed(0)
    images = [torch.randn(3, 3, 56, 56, generator=g), torch.randn(5, 3, 28, 42, generator=g)]
    masks = [torch.rand(3, 16, generator=g) < 0.5, None]
    packed = model.forward_packed(images, masks)
    separate = [model(i, m) for i, m in zip(images, masks)]
    gradients = []
    for outs in (packed, separate):
        for a, b in zip(outs, separate):
            assert_close(a, b, rtol=1e-5, atol=1e-5)
        loss = sum((o["cls"] ** 3).sum() + (o["patches"] ** 2).mean() for o in outs)
        gradients.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    for a, b in zip(*gradients):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_masked_patches_show_nothing_of_the_image(filled):
    model = filled(VisionTransformer(64, 2, 2, image_size=28)).eval()
    a, b = torch.randn(1, 3, 28, 28), torch.randn(1, 3, 28, 28)
    all_masked = torch.ones(1, 4, dtype=torch.bool)
    assert_close(model(a, all_masked), model(b, all_masked))
    patches = model(a, all_masked)["patches"][0]
    assert (patches[0] - patches[1]).abs().max() > 1e-3  # they keep their position


def test_size_that_does_not_divide_into_patches():
    with pytest.raises(ValueError, match="100x84 .* 98x84"):
        build_vit("vitt14")(torch.zeros(1, 3, 100, 84))


@pytest.mark.parametrize("registers", [0, 4])
def test_crops_of_two_sizes_train_the_stored_grid(registers, filled):
    """A 37 x 37 grid under crops of 7 x 7 and 3 x 3 patches: each crop size has the positions
    that the grid stored for it would have, and the gradient is the adjoint of the resize, which
    is linear in the grid."""
    model = filled(VisionTransformer(64, 1, 1, registers=registers, image_size=518))
    crops = [torch.randn(2, 3, 98, 98), torch.randn(3, 3, 42, 42)]
    out = model.forward_packed(crops, [None, None])
    assert [o["patches"].shape[1] for o in out] == [49, 9]
    for size, group, ours in zip((98, 42), crops, out):
        stored = filled(VisionTransformer(64, 1, 1, registers=registers, image_size=518))
        stored.resize_position_embedding(size)
        assert stored.pos_embed.shape[1] == 1 + (size // 14) ** 2
        assert_close(ours["patches"], stored(group)["patches"])
    weights = [torch.randn(1, 1 + n, 64) for n in (49, 9)]
    positions = [model.position_embedding(side, side) for side in (7, 3)]
    sum((w * p).sum() for w, p in zip(weights, positions)).backward()
    direction, gradient = torch.randn_like(model.pos_embed), model.pos_embed.grad
    with torch.no_grad():
        model.pos_embed.copy_(direction)
        change = sum((w * model.position_embedding(side, side)).sum() for w, side in zip(weights, (7, 3)))
    assert_close((gradient * direction).sum(), change, rtol=1e-4, atol=1e-3)


# --- stochastic depth --------------------------------------------------------------------------


def test_kept_counts_are_official():
    model = VisionTransformer(64, 2, 1, image_size=28, drop_path=0.3)
    # max(int(b * 0.7), 1): a batch of one is never dropped, small batches lose more than 30 %
    kept = model.draw_kept([1, 2, 4, 8, 16, 20])
    assert [k.shape for k in kept] == [(2, 2, n) for n in (1, 1, 2, 5, 11, 14)]
    assert all((k.sort(-1).values.diff(dim=-1) > 0).all() for k in kept)  # no sample twice
    assert not torch.equal(kept[5][0, 0], kept[5][0, 1])  # a fresh draw per branch
    assert model.eval().draw_kept([4]) is None
    a, b = (model.train().draw_kept([9, 5], torch.Generator().manual_seed(7)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_stochastic_depth_is_the_rescaled_branch_of_the_kept_samples(filled):
    """Written out sample by sample, per crop group and branch, from the block's own parts."""
    model = filled(VisionTransformer(64, 3, 2, image_size=56, drop_path=0.4)).train()
    images = [torch.randn(5, 3, 56, 56), torch.randn(4, 3, 28, 28)]
    kept = model.draw_kept([5, 4], torch.Generator().manual_seed(0))
    ours = model.forward_packed(images, [None, None], kept)
    for group, k, out in zip(images, kept, ours):
        x = model.embed(group)                                                    # (B, T, D)
        for i, block in enumerate(model.blocks):
            for branch, (norm, scale) in enumerate([(block.norm1, block.ls1), (block.norm2, block.ls2)]):
                y = x.clone()
                for sample in k[i, branch].tolist():
                    z = norm(x[sample])
                    z = block.attn(z, ((1, len(z)),)) if branch == 0 else block.mlp(z)
                    y[sample] = x[sample] + scale(z) * len(group) / k.shape[-1]
                x = y
        assert_close(out["patches"], model.norm(x)[:, 1:], rtol=1e-4, atol=1e-5)
        assert_close(out["cls"], model.norm(x)[:, 0], rtol=1e-4, atol=1e-5)


def test_stochastic_depth_computes_the_kept_samples_alone(monkeypatch):
    seen = []
    original = torch.nn.Linear.forward

    def forward(self, x):
        seen.append(len(x))
        return original(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    model = VisionTransformer(64, 1, 1, image_size=28, drop_path=0.5).train()
    model(torch.zeros(8, 3, 28, 28))
    assert seen == [4 * 5] * 4  # qkv, proj, fc1, fc2 on 4 of 8 images of 5 tokens


def test_kept_rows():
    kept = [torch.tensor([[[2], [0]]]), torch.tensor([[[1, 0], [0, 1]]])]  # depth 1, two branches
    rows, factor, runs = kept_rows(kept, ((3, 2), (2, 3)))
    assert rows.tolist() == [[[4, 5, 9, 10, 11, 6, 7, 8], [0, 1, 6, 7, 8, 9, 10, 11]]]
    assert factor[:, 0].tolist() == [3, 3, 1, 1, 1, 1, 1, 1] and runs == ((1, 2), (2, 3))


def test_activation_checkpointing_gives_the_same_gradients(filled):
    model = filled(VisionTransformer(64, 2, 2, image_size=28, drop_path=0.5)).train()
    images, gradients = torch.randn(6, 3, 28, 28), []
    kept = model.draw_kept([6], torch.Generator().manual_seed(0))
    for model.checkpoint_activations in (False, True):
        loss = (model(images, kept=kept)["cls"] ** 3).sum()
        trained = [p for name, p in model.named_parameters() if name != "mask_token"]
        gradients.append(torch.autograd.grad(loss, trained))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# --- loading -----------------------------------------------------------------------------------


def released(name="vitt14", **overrides):
    """A state dict as the official files hold it, from a small model with random weights."""
    return build_vit(name, depth=4, image_size=56, **overrides).state_dict()


def same(model, state):
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("overrides", [{}, {"ffn": "swiglu"}, {"registers": 4}])
def test_load_released_training_and_own_files(tmp_path, overrides, capsys):
    state = released(**overrides)
    chunked = {f"backbone.{k}": v for k, v in state.items() if not k.startswith("blocks.")}
    # Two chunks of two blocks; the index inside a chunk counts from the first block of all
    for k, v in state.items():
        if k.startswith("blocks."):
            i = int(k.split(".")[1])
            chunked[f"backbone.blocks.{i // 2}.{k.removeprefix('blocks.')}"] = v
    chunked["dino_head.last_layer.weight_g"] = torch.ones(8, 1)
    files = {"released": state, "training": {"teacher": chunked},
             "prefixed": {f"backbone.{k}": v for k, v in state.items()}}
    for name, file in files.items():
        torch.save(file, tmp_path / f"{name}.pth")
        model = load_backbone(tmp_path / f"{name}.pth")
        assert same(model, state) and not model.training and model.heads == 3
        assert str(tmp_path / f"{name}.pth") in capsys.readouterr().out
    save_backbone(tmp_path / "ours.pt", model, "vitt14", step=7, metrics={"kappa": 0.5})
    model = load_backbone(tmp_path / "ours.pt")
    assert same(model, state)
    assert model.info["step"] == 7 and model.info["metrics"] == {"kappa": 0.5}
    assert [f.name for f in tmp_path.iterdir() if ".tmp" in f.name] == []


def test_load_names_the_architecture(tmp_path):
    for name in ("vitt14", "vits14_reg4"):
        save_backbone(tmp_path / "b.pt", build_vit(name), name)
        assert load_backbone(tmp_path / "b.pt").arch == name


@pytest.mark.parametrize("registers", [0, 4])
def test_load_resizes_the_position_embedding_as_forward_does(tmp_path, registers):
    torch.save(released(registers=registers), tmp_path / "b.pth")
    kept = load_backbone(tmp_path / "b.pth")
    resized = load_backbone(tmp_path / "b.pth", image_size=98)
    assert kept.pos_embed.shape[1] == 17 and resized.pos_embed.shape[1] == 50
    images = torch.randn(1, 3, 98, 98)
    assert_close(kept(images), resized(images))


def test_load_is_strict(tmp_path):
    def message(state):
        torch.save(state, tmp_path / "b.pth")
        with pytest.raises(ValueError) as error:
            load_backbone(tmp_path / "b.pth")
        assert str(tmp_path / "b.pth") in str(error.value)
        return str(error.value)

    state = released()
    without = {k: v for k, v in state.items() if k != "blocks.1.ls1.gamma"}
    assert "1 missing (blocks.1.ls1.gamma)" in message(without)
    assert "1 surplus (classifier)" in message(state | {"classifier": torch.ones(1)})
    assert "1 misshapen (norm.bias (5,) for (192,))" in message(state | {"norm.bias": torch.ones(5)})
    assert "no square grid" in message(state | {"pos_embed": torch.ones(1, 19, 192)})
    assert "lacks part" in message({k: v for k, v in state.items() if k != "pos_embed"})
    assert "no backbone" in message({"optimizer": {"state": {}}, "step": 3})
    assert "list" in message([1, 2])
    assert "no backbone" in message(torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict())
    assert "no backbone" in message({"format": "endodino-1", "step": 3})
    assert "5 heads" in message({"format": "endodino-1", "backbone": state, "heads": 5})
    assert "lacks part" in message(state | {"register_tokens": torch.ones(3)})


class Malicious:
    def __reduce__(self):
        return (pathlib.Path.touch, (pathlib.Path("executed"),))


def test_load_refuses_bad_files_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(released(), "whole.pth")
    whole = pathlib.Path("whole.pth").read_bytes()
    pathlib.Path("truncated.pth").write_bytes(whole[: len(whole) // 2])
    pathlib.Path("text.pth").write_text("accuracy 0.9\n")
    pathlib.Path("empty.pth").write_bytes(b"")
    torch.save({"cls_token": Malicious()}, "code.pth")
    pathlib.Path("two bytes.pth").write_bytes(b"\x80\x02")
    torch.save(released(), "legacy.pth", _use_new_zipfile_serialization=False)
    pathlib.Path("cut legacy.pth").write_bytes(pathlib.Path("legacy.pth").read_bytes()[:300])
    pathlib.Path("code.pkl").write_bytes(pickle.dumps({"cls_token": Malicious()}, protocol=2))
    expected = {"truncated.pth": "truncated", "text.pth": "not a PyTorch checkpoint",
                "empty.pth": "not a PyTorch checkpoint", "two bytes.pth": "damaged",
                "cut legacy.pth": "damaged", "code.pth": "could run code", "code.pkl": "could run code"}
    for name, words in expected.items():
        with pytest.raises(ValueError, match=words) as error:
            load_backbone(name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not pathlib.Path("executed").exists()
    with pytest.raises(FileNotFoundError):
        load_backbone("absent.pth")


# --- names and wrappers of other tools ---------------------------------------------------------


@pytest.mark.parametrize("prefix, inside", [
    ("module.", None), ("_orig_mod.", "model"), ("backbone.", "state_dict"),
    ("module._orig_mod.backbone.", "teacher"), ("teacher.backbone.", "model")])
def test_load_takes_wrapped_weights(tmp_path, prefix, inside):
    state = released()
    file = {prefix + k.replace("blocks.1.", "blocks.1._orig_mod."): v for k, v in state.items()}
    if "backbone" in prefix:
        file[prefix.replace("backbone", "dino_head") + "last_layer.weight"] = torch.ones(2)
    if prefix.startswith("teacher"):
        file |= {"student." + k.removeprefix("teacher."): v + 1 for k, v in file.items()}
    torch.save({inside: file, "epoch": 3} if inside else file, tmp_path / "w.pth")
    assert same(load_backbone(tmp_path / "w.pth"), state)


def test_load_does_not_guess_between_two_sets_of_weights(tmp_path):
    state = released()
    beside = {f"{place}.{k}": v for place in "ab" for k, v in state.items()}
    for file in ({"model": state, "model_ema": state}, beside):
        torch.save(file, tmp_path / "two.pth")
        with pytest.raises(ValueError, match="several sets .* .(model, model_ema|a., b.)"):
            load_backbone(tmp_path / "two.pth")


@pytest.mark.parametrize("overrides", [{}, {"registers": 4}, {"ffn": "swiglu"}])
def test_load_takes_timm_names_and_gives_the_same_features(tmp_path, overrides):
    """As timm's own conversion of the released files writes them."""
    model = build_vit("vitt14", depth=2, image_size=56, **overrides).eval()
    torch.nn.init.normal_(model.cls_token)
    state = {k.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): v
             for k, v in model.state_dict().items()}
    del state["mask_token"]
    if "registers" in overrides:
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    torch.save(state, tmp_path / "timm.pth")
    loaded, images = load_backbone(tmp_path / "timm.pth"), torch.randn(2, 3, 56, 42)
    for name, wanted in model(images).items():
        assert_close(loaded(images)[name], wanted)


def test_load_reads_safetensors(tmp_path):
    state = released()
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    half = {k: v.to(list(types)[i % 3]) for i, (k, v) in enumerate(state.items())}
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for k, v in half.items():
        raw = v.contiguous().view(torch.uint8).numpy().tobytes()
        place = [len(content), len(content) + len(raw)]
        header[k] = {"dtype": types[v.dtype], "shape": list(v.shape), "data_offsets": place}
        content += raw
    header = json.dumps(header).encode()
    whole = len(header).to_bytes(8, "little") + header + content
    (tmp_path / "w.safetensors").write_bytes(whole)
    model = load_backbone(tmp_path / "w.safetensors")
    assert same(model, {k: v.float() for k, v in half.items()})
    for cut in (len(whole) - 10, 300):
        (tmp_path / "w.safetensors").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="w.safetensors is damaged"):
            load_backbone(tmp_path / "w.safetensors")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_load_refuses_weights_that_are_not_finite(tmp_path, value):
    state = released()
    state["blocks.2.attn.qkv.bias"][5] = value
    torch.save(state, tmp_path / "nan.pth")
    Image.new("RGB", (28, 28)).save(tmp_path / "i.png")
    words = r"nan.pth holds weights that are not finite \(blocks.2.attn.qkv.bias\)"
    with pytest.raises(ValueError, match=words):
        load_backbone(tmp_path / "nan.pth")
    with pytest.raises(SystemExit, match="not finite"):
        main([str(tmp_path / "nan.pth"), str(tmp_path / "i.png"), "--show", str(tmp_path / "o.png")])
    assert not (tmp_path / "o.png").exists()


def test_load_fetches_released_weights_by_name(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)  # a file of that name would come first
    asked, state = [], released("vits14_reg4")

    def download(url, **options):
        assert options == dict(map_location="cpu", progress=True, weights_only=True)
        asked.append(url)
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    model = load_backbone("dinov2_vits14_reg4")
    assert same(model, state) and model.info["path"] == "dinov2_vits14_reg4"
    place = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14"
    assert asked == [f"{place}/dinov2_vits14_reg4_pretrain.pth"]
    assert len(vit.RELEASED) == 8 and "dinov2_vitg14" in vit.RELEASED

    def no_network(url, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    words = "dinov2_vitb14 could not be downloaded .*not known.*dinov2_vitb14_pretrain.pth"
    with pytest.raises(SystemExit, match=words):
        main(["dinov2_vitb14"])
    torch.save(state, "dinov2_vitb14")
    assert same(load_backbone("dinov2_vitb14"), state)


@pytest.mark.parametrize("overrides", [{}, {"registers": 4}, {"ffn": "swiglu"}])
def test_export_is_a_released_file(tmp_path, overrides, capsys):
    """Names, order and shapes as the official code's; the weights bit for bit, there and
    back."""
    model = build_vit("vitt14", depth=3, image_size=224, **overrides)
    save_backbone(tmp_path / "teacher_7.pt", model, "vitt14", step=7)
    main([str(tmp_path / "teacher_7.pt"), "--export", str(tmp_path / "out.pth")])
    assert f"wrote {tmp_path / 'out.pth'}" in capsys.readouterr().out
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    case = {"": "vit_mlp_224", "registers": "vit_reg4_224", "ffn": "vit_swiglu_224"}["".join(overrides)]
    assert list(state) == list(META[case]["keys"])
    build_vit("vitt14", depth=3, image_size=224, **overrides).load_state_dict(state, strict=True)
    again = load_backbone(tmp_path / "out.pth")
    assert same(again, model.state_dict()) and again.info["format"] == "released DINOv2 weights"


# --- pictures ----------------------------------------------------------------------------------


def test_class_attention_is_that_of_the_last_block(filled):
    """Of the second head, rebuilt from the block's parts; the columns of the class token and the
    registers are left out."""
    model = filled(VisionTransformer(64, 2, 2, registers=4, image_size=28)).eval()
    images = torch.randn(3, 3, 28, 42)
    weights = class_attention(model, images)                                      # (3, 2, 6)
    x = model.embed(images)  # (3, 1 + 4 + 6, 64)
    x = model.blocks[0](x.flatten(0, 1), ((3, 11),)).unflatten(0, (3, 11))
    qkv = model.blocks[1].attn.qkv(model.blocks[1].norm1(x))
    q, k, _ = qkv.chunk(3, dim=-1)  # (3, 11, 64): head 1 is the last 32 channels
    expected = (q[:, :1, 32:] @ k[..., 32:].mT / 32 ** 0.5).softmax(-1)[:, 0, 5:]
    assert_close(weights[:, 1], expected)


def test_principal_colours_of_two_groups_are_two_colours():
    sides = torch.tensor([1.0, -1.0]).repeat(25)[:, None]
    tokens = torch.randn(1, 16).repeat(50, 1) * sides + 1e-3 * torch.randn(50, 16)
    colours = principal_colours(tokens)
    assert colours.shape == (50, 3) and colours.min() == 0 and colours.max() == 1
    assert (colours[::2, 0] - colours[1::2, 0]).abs().min() > 0.9


def test_principal_colours_leave_what_is_black_out_of_the_components():
    """Ten tokens far away would take the first component; left out, the two groups have it again."""
    sides = torch.tensor([1.0, -1.0]).repeat(25)[:, None]
    tokens = torch.randn(1, 16) * sides + 1e-3 * torch.randn(50, 16)
    tokens = torch.cat([tokens, 100 + torch.randn(10, 16)])
    lit = torch.arange(60) < 50
    colours = principal_colours(tokens, lit)
    assert (colours[:50:2, 0] - colours[1:50:2, 0]).abs().min() > 0.9 and (colours[50:] == 0).all()
    dark = principal_colours(tokens, torch.zeros(60, dtype=torch.bool))  # a black frame: all count
    assert torch.equal(dark, principal_colours(tokens))


def test_show_writes_a_picture_of_images_of_any_shape(tmp_path, capsys):
    save_backbone(tmp_path / "b.pt", build_vit("vitt14", depth=2, image_size=56), "vitt14")
    Image.new("RGB", (90, 60), "red").save(tmp_path / "wide one.png")
    Image.radial_gradient("L").resize((50, 100)).save(tmp_path / "tall.jpg")
    files = [str(tmp_path / name) for name in ("b.pt", "wide one.png", "tall.jpg")]
    main([*files, "--show", str(tmp_path / "out.png"), "--size", "84"])
    with Image.open(tmp_path / "out.png") as picture:
        # Four columns and two rows of 280 px on the longer side, 4 px apart, under a line of
        # titles
        assert picture.size == (4 * 284 + 4, 4 + 16 + 187 + 4 + 280 + 4)
        # Patches of the second image differ
        assert len(picture.crop((288, 300, 400, 400)).getcolors()) > 3
    for bad in ([files[1], files[2]], [files[0], str(tmp_path / "absent.png")]):
        words = bad[1] if "absent" in bad[1] else "not a PyTorch checkpoint"
        with pytest.raises(SystemExit, match=words):
            main([*bad, "--show", str(tmp_path / "x.png")])


def test_show_puts_a_second_checkpoint_beside_the_first(tmp_path):
    for name in "ab":
        save_backbone(tmp_path / f"{name}.pt", build_vit("vitt14", depth=2, image_size=56), "vitt14")
    Image.radial_gradient("L").resize((56, 56)).save(tmp_path / "i.png")
    Image.fromarray(np.eye(56, dtype=bool)).save(tmp_path / "m.png")
    names = "a.pt", "b.pt", "i.png", "m.png", "out.png"
    a, b, image, mask, out = (str(tmp_path / name) for name in names)
    main([a, image, "--beside", b, "--masks", mask, "--show", out, "--size", "56"])
    with Image.open(out) as picture:
        assert picture.size == (5 * 284 + 4, 4 + 28 + 280 + 4)
    for wrong in ([a, image], [a, "--show", out], [a, image, "--show", out, "--masks", mask, mask]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)


# --- number types ------------------------------------------------------------------------------


@pytest.mark.parametrize("major, expected", [  # T4 and V100, A100, H100
    (7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_precision_of_gpus_is_what_their_hardware_multiplies(monkeypatch, major, expected):
    """A T4 answers yes to bfloat16 where emulation counts; auto must not believe it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    properties = types.SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert vit.precision("cuda:0") == expected
    assert vit.precision("cuda:0", "bf16") == torch.bfloat16


@pytest.mark.parametrize("amx, avx, expected", [
    (True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, torch.float32),
    (None, None, torch.float32)])
def test_precision_of_cpus_is_asked_of_torch(monkeypatch, amx, avx, expected):
    """None: a torch that has no such question."""
    for name, answer in (("_is_amx_tile_supported", amx), ("_is_avx512_bf16_supported", avx)):
        if answer is None:
            monkeypatch.delattr(torch.cpu, name, raising=False)
        else:
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    assert vit.precision(torch.device("cpu")) == expected
    by_name = [vit.precision("cpu", name) for name in vit.PRECISIONS]
    assert by_name == [torch.bfloat16, torch.float16, torch.float32]
    assert vit.precision("mps") == torch.float16


@pytest.mark.parametrize("dtype", vit.PRECISIONS.values())
def test_autocast_multiplies_in_the_asked_type(dtype):
    with vit.autocast("cpu", dtype):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
