"""The method: DINOv2's own training steps, schedules and parameter groups, from its numbers."""
import json

import numpy as np
import pytest
import torch
from conftest import REFERENCE
from fill import array

import dino
import pretrain
import vit

META = json.loads((REFERENCE / "meta.json").read_text())


def reference_model(cfg, filled):
    backbone = vit.VisionTransformer(cfg["dim"], cfg["depth"], cfg["heads"], ffn="swiglu" if "swiglu" in cfg["ffn"] else "mlp",
                                     registers=cfg["reg"], image_size=cfg["global_size"])
    model = dino.DINOv2(backbone, cfg["prototypes"], cfg["hidden"], cfg["bottleneck"], cfg["separate_head"], cfg["bottleneck"],
                            "centering" if cfg["centering"] == "centering" else "sinkhorn", cfg["koleo_weight"])
    for side in (model.student, model.teacher):
        for name, module in side.items():
            filled(module, name + ".")
    return model.train()


@pytest.mark.parametrize("case", ["sk_separate", "center_shared"])
def test_four_steps_equal_dinov2(case, reference, filled):
    """Losses to 1e-4, gradient norms to 1e-3, parameters of student and teacher after the last step to 1e-3."""
    cfg, expected = META[f"steps_{case}"], reference(f"steps_{case}")
    model = reference_model(cfg, filled)
    optimizer = torch.optim.AdamW(dino.param_groups(model.student, cfg["layerwise_decay"], cfg["patch_embed_lr_mult"]),
                                  lr=0.0, betas=cfg["betas"])
    B, L, G, g = (cfg[k] for k in ("batch", "local_crops", "global_size", "local_size"))
    for step in range(cfg["steps"]):
        want = {k.split("/")[1]: expected[k] for k in expected if k.startswith(f"step{step}/")}
        batch = {"global_crops": torch.from_numpy(array(f"{case}global{step}", (2 * B, 3, G, G))),
                 "local_crops": torch.from_numpy(array(f"{case}local{step}", (L * B, 3, g, g))), "masks": torch.from_numpy(want["masks"])}
        lr, wd, momentum, temp, last_lr = want["hyper"]
        now = {"lr": lr, "backbone_lr": lr, "last_layer_lr": last_lr, "weight_decay": wd, "momentum": momentum, "temp": temp}
        terms, norms, finite = dino.train_step(model, optimizer, batch, now, cfg["clip"])
        assert finite
        found = {"dino_local_crops_loss": terms["dino_local"], "dino_global_crops_loss": terms["dino_global"], "total": terms["loss"],
                 "koleo_loss": terms["koleo"] / 2, "ibot_loss": terms["ibot"] / 2}  # DINOv2 logs half of these two
        for name, value in found.items():
            assert value.item() == pytest.approx(want[name].item(), rel=1e-4), (step, name)
        assert len(norms) == sum(k.startswith("grad_norm") for k in want)
        for name, value in norms.items():
            assert value.item() == pytest.approx(want[f"grad_norm_{name}"].item(), rel=1e-3), (step, name)
    for side in ("student", "teacher"):
        for name, p in getattr(model, side).named_parameters():
            module, name = name.split(".", 1)
            want = expected[f"final/{side}/{module}/{name}"]
            p = p.detach()
            # the gradient of the keys' bias is zero but for rounding, which Adam blows up to full steps
            atol = 1e-4 if name.endswith("qkv.bias") else 1e-5
            np.testing.assert_allclose([p.mean(), p.std(correction=0), p.flatten()[0]], want, rtol=1e-3, atol=atol, err_msg=f"{side} {name}")


def test_schedules_equal_dinov2(reference):
    expected, s = reference("schedules"), META["schedules"]
    args = pretrain.parse(["--recipe", "scratch-long", "--device", "cpu", "--steps", str(s["total"]), "--lr", "0.0002"])
    args.warmup, args.temp_warmup, args.freeze_last_layer = (s[k] / s["total"] for k in ("warmup", "temp_warmup", "freeze_last_layer"))
    found = dino.make_schedules(args, global_batch=3072)
    for name, theirs in {"lr": "lr", "last_layer_lr": "last_layer_lr", "weight_decay": "weight_decay", "momentum": "momentum",
                         "temp": "teacher_temp"}.items():
        np.testing.assert_allclose(found[name], expected[theirs][: s["total"]], rtol=1e-12, atol=1e-15, err_msg=name)
    assert (found["backbone_lr"] == found["lr"]).all()


def test_adapt_holds_the_backbone_then_ramps():
    args = pretrain.parse(["--recipe", "adapt", "--device", "cpu", "--steps", "1000"])
    s = dino.make_schedules(args, global_batch=64)
    assert (s["backbone_lr"][:400] == 0).all() and s["lr"][399] == pytest.approx(5e-5)   # FINO: 5e-5 at 64 frames per step
    assert (np.diff(s["backbone_lr"][399:441]) > 0).all() and (s["backbone_lr"][440:] == s["lr"][440:]).all()
    assert (s["last_layer_lr"][:18] == 0).all() and s["last_layer_lr"][18] > 0


def test_param_groups_equal_dinov2():
    cfg = META["param_groups"]
    backbone = vit.VisionTransformer(64, 3, 2, registers=4, image_size=56)
    student = dino.DINOv2(backbone, 64, 48, 16, separate_ibot_head=False).student
    groups = dino.param_groups(student, cfg["layerwise_decay"], cfg["patch_embed_lr_mult"])
    found = {name: [g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]] for g in groups for name in g["names"]}
    wanted = {f"backbone.{k}": v for k, v in cfg["backbone"].items()} | {f"dino_head.{k}": v for k, v in cfg["head"].items()}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value), name
    assert sum(len(g["params"]) for g in groups) == len(found)


def test_each_submodule_is_clipped_on_its_own():
    student = torch.nn.ModuleDict({"backbone": torch.nn.Linear(4, 4), "dino_head": torch.nn.Linear(4, 4)})
    for p in student["backbone"].parameters():
        p.grad = torch.full_like(p, 10.0)
    for p in student["dino_head"].parameters():
        p.grad = torch.full_like(p, 0.1)
    norms = dino.clip_gradients(student, 3.0)
    assert norms["backbone"].item() == pytest.approx(10 * 20**0.5) and norms["dino_head"].item() == pytest.approx(0.1 * 20**0.5)
    assert student["backbone"].weight.grad[0, 0].item() == pytest.approx(3 / 20**0.5, rel=1e-5)
    assert (student["dino_head"].weight.grad == 0.1).all()
