"""The method: DINOv2's own training steps, schedules and parameter groups, from its numbers."""
import copy
import json

import numpy as np
import pytest
import torch
from conftest import REFERENCE
from fill import array
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import dino
import pretrain
import vit
from custom_kernels import prototype_loss

META = json.loads((REFERENCE / "meta.json").read_text())


def reference_model(cfg, filled):
    ffn = "swiglu" if "swiglu" in cfg["ffn"] else "mlp"
    backbone = vit.VisionTransformer(cfg["dim"], cfg["depth"], cfg["heads"], ffn=ffn,
                                     registers=cfg["reg"], image_size=cfg["global_size"])
    model = dino.DINOv2(
        backbone, n_prototypes=cfg["prototypes"], hidden_dim=cfg["hidden"],
        bottleneck_dim=cfg["bottleneck"], separate_ibot_head=cfg["separate_head"],
        ibot_bottleneck_dim=cfg["bottleneck"], koleo_weight=cfg["koleo_weight"],
        centering="centering" if cfg["centering"] == "centering" else "sinkhorn")
    for side in (model.student, model.teacher):
        for name, module in side.items():
            filled(module, name + ".")
    return model.train()


@pytest.mark.parametrize("case", ["sk_separate", "center_shared"])
def test_four_steps_equal_dinov2(case, reference, filled):
    """Losses to 1e-4, gradient norms to 1e-3, parameters of student and teacher after the last
    step to 1e-3."""
    cfg, expected = META[f"steps_{case}"], reference(f"steps_{case}")
    model = reference_model(cfg, filled)
    groups = dino.param_groups(model.student, cfg["layerwise_decay"], cfg["patch_embed_lr_mult"])
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=cfg["betas"])
    B, L, G, g = (cfg[k] for k in ("batch", "local_crops", "global_size", "local_size"))
    for step in range(cfg["steps"]):
        want = {k.split("/")[1]: expected[k] for k in expected if k.startswith(f"step{step}/")}
        batch = {"global_crops": array(f"{case}global{step}", (2 * B, 3, G, G)),
                 "local_crops": array(f"{case}local{step}", (L * B, 3, g, g)), "masks": want["masks"]}
        batch = {name: torch.from_numpy(values) for name, values in batch.items()}
        lr, wd, momentum, temp, last_lr = want["hyper"]
        now = {"lr": lr, "backbone_lr": lr, "last_layer_lr": last_lr, "weight_decay": wd,
               "momentum": momentum, "temp": temp}
        terms, norms, finite = dino.train_step(model, optimizer, batch, now, cfg["clip"])
        assert finite
        found = {"dino_local_crops_loss": terms["dino_local"],
                 "dino_global_crops_loss": terms["dino_global"], "total": terms["loss"],
                 "koleo_loss": terms["koleo"] / 2, "ibot_loss": terms["ibot"] / 2}  # it logs halves
        for name, value in found.items():
            assert value.item() == pytest.approx(want[name].item(), rel=1e-4), (step, name)
        assert len(norms) == sum(k.startswith("grad_norm") for k in want)
        for name, value in norms.items():
            expected_norm = want[f"grad_norm_{name}"].item()
            assert value.item() == pytest.approx(expected_norm, rel=1e-3), (step, name)
    for side in ("student", "teacher"):
        for name, p in getattr(model, side).named_parameters():
            module, name = name.split(".", 1)
            want = expected[f"final/{side}/{module}/{name}"]
            p = p.detach()
            # the gradient of the keys' bias is zero but for rounding, which Adam blows up to
            # full steps
            atol = 1e-4 if name.endswith("qkv.bias") else 1e-5
            found = [p.mean(), p.std(correction=0), p.flatten()[0]]
            np.testing.assert_allclose(found, want, rtol=1e-3, atol=atol, err_msg=f"{side} {name}")


def test_schedules_equal_dinov2(reference):
    expected, s = reference("schedules"), META["schedules"]
    args = pretrain.parse(["--recipe", "scratch-long", "--device", "cpu", "--lr", "0.0002",
                           "--steps", str(s["total"])])
    for name in ("warmup", "temp_warmup", "freeze_last_layer"):
        setattr(args, name, s[name] / s["total"])
    found = dino.make_schedules(args, global_batch=3072)
    for name in ("lr", "last_layer_lr", "weight_decay", "momentum", "temp"):
        theirs = expected["teacher_temp" if name == "temp" else name][: s["total"]]
        np.testing.assert_allclose(found[name], theirs, rtol=1e-12, atol=1e-15, err_msg=name)
    assert (found["backbone_lr"] == found["lr"]).all()


def test_a_warm_start_can_hold_the_backbone_then_ramp():
    args = pretrain.parse(["--recipe", "adapt", "--device", "cpu", "--steps", "1000", "--lr", "2e-4",
                           "--min-lr", "-1", "--freeze-backbone", "0.4", "--backbone-ramp", "0.04",
                           "--freeze-last-layer", "0.018", "--warmup", "0.12"])
    assert args.backbone_lr == 0.05
    s = dino.make_schedules(args, global_batch=64)
    assert s["lr"][399] == pytest.approx(5e-5)  # FINO: at 64 frames per step
    assert (s["backbone_lr"][:400] == 0).all() and (np.diff(s["backbone_lr"][399:441]) > 0).all()
    assert (s["backbone_lr"][440:] == 0.05 * s["lr"][440:]).all()
    assert (s["last_layer_lr"][:18] == 0).all() and s["last_layer_lr"][18] > 0


def test_param_groups_equal_dinov2():
    cfg = META["param_groups"]
    backbone = vit.VisionTransformer(64, 3, 2, registers=4, image_size=56)
    student = dino.DINOv2(backbone, 64, 48, 16, separate_ibot_head=False).student
    groups = dino.param_groups(student, cfg["layerwise_decay"], cfg["patch_embed_lr_mult"])
    found = {name: [g["lr_multiplier"], g["wd_multiplier"], g["is_last_layer"]]
             for g in groups for name in g["names"]}
    wanted = ({f"backbone.{k}": v for k, v in cfg["backbone"].items()}
              | {f"dino_head.{k}": v for k, v in cfg["head"].items()})
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value), name
    assert sum(len(g["params"]) for g in groups) == len(found)


def test_each_submodule_is_clipped_on_its_own():
    student = torch.nn.ModuleDict(
        {"backbone": torch.nn.Linear(4, 4), "dino_head": torch.nn.Linear(4, 4)})
    for p in student["backbone"].parameters():
        p.grad = torch.full_like(p, 10.0)
    for p in student["dino_head"].parameters():
        p.grad = torch.full_like(p, 0.1)
    norms = dino.clip_gradients(student, 3.0)
    assert norms["backbone"].item() == pytest.approx(10 * 20**0.5)
    assert norms["dino_head"].item() == pytest.approx(0.1 * 20**0.5)
    assert student["backbone"].weight.grad[0, 0].item() == pytest.approx(3 / 20**0.5, rel=1e-5)
    assert (student["dino_head"].weight.grad == 0.1).all()


# --- one step: what it changes, and what it asks for -------------------------------------------


def small_step(fused=True, **kwargs):
    """(model, optimiser, a batch, this step's schedules) of a network of two blocks; two steps
    behind it."""
    torch.manual_seed(0)
    backbone = vit.VisionTransformer(32, 2, 2, image_size=56, drop_path=0.2)
    model = dino.DINOv2(backbone, 64, hidden_dim=48, bottleneck_dim=16, **kwargs).train()
    groups = dino.param_groups(model.student, 0.9, 0.2)
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=fused)
    masks = torch.zeros(8, 16, dtype=torch.bool)
    masks[::2, :5] = True
    batch = {"global_crops": torch.randn(8, 3, 56, 56), "local_crops": torch.randn(8, 3, 28, 28),
             "masks": masks, "masked": masks.flatten().nonzero().squeeze(1)}
    now = {"lr": 1e-3, "backbone_lr": 1e-3, "last_layer_lr": 1e-3, "weight_decay": 0.04,
           "momentum": 0.9, "temp": 0.04}
    for _ in range(2):
        assert dino.train_step(model, optimizer, batch, now, clip=3.0)[2]
    return model, optimizer, batch, now


def everything(model, optimizer):
    """Copies of all that a step may change."""
    states = [s for state in optimizer.state_dict()["state"].values() for s in state.values()]
    return copy.deepcopy([*model.state_dict().values(), *states])


def equal(tensors, others):
    return all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


@pytest.mark.parametrize("crops", ["global_crops", "local_crops"])
@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_bad_step_changes_nothing(fused, centering, crops):
    """Weights, moments, step counters, teacher and centres, though the optimiser was called."""
    model, optimizer, batch, now = small_step(fused, centering=centering)
    before = everything(model, optimizer)
    poisoned = batch | {crops: batch[crops].clone()}
    poisoned[crops][0, 0, 0, 0] = float("nan")
    terms, norms, finite = dino.train_step(model, optimizer, poisoned, now, clip=3.0)
    assert not finite and not terms["loss"].isfinite()
    assert equal(before, everything(model, optimizer))
    assert dino.train_step(model, optimizer, batch, now, clip=3.0)[2]
    assert not equal(before, everything(model, optimizer))


def test_fused_and_plain_adamw_step_alike():
    fused, plain = (everything(*small_step(fused)[:2]) for fused in (True, False))
    torch.testing.assert_close(fused, plain)


def test_teacher_is_the_moving_average_to_the_bit():
    model = small_step()[0]
    teacher = [p.clone() for p in model.teacher.parameters()]
    get_ema_multi_avg_fn(0.99)(teacher, list(model.student.parameters()), None)
    model.update_teacher(0.99, torch.tensor(True))
    assert equal(teacher, model.teacher.parameters())


class Questions(TorchDispatchMode):
    """The operations for whose answer the host would have to wait for a GPU, in the order of
    asking."""
    ASKING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"}

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        by_mask = any(torch.is_tensor(i) and i.dtype == torch.bool for i in indices)
        sizeless = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in self.ASKING or by_mask or sizeless:
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("centering", ["sinkhorn", "centering"])
def test_a_step_asks_the_device_for_nothing(centering, precision, monkeypatch):
    """So that a GPU is given the next work before it has done this. Sinkhorn-Knopp as on a GPU:
    the form for CPUs asks how wide the logits' range is. A batch without "masked" has to ask how
    many patches it hides."""
    def on_gpu(logits, temp, center=None):
        rows = logits.flatten(0, -2)
        bias = prototype_loss.sinkhorn_bias(rows, temp) if center is None else -center / temp
        return prototype_loss.Targets(logits, bias, temp)
    model, optimizer, batch, now = small_step(centering=centering)
    batch["kept"] = model.student["backbone"].draw_kept([8, 8])
    monkeypatch.setattr(dino.losses, "teacher_targets", on_gpu)
    dtype = vit.PRECISIONS[precision]
    with Questions() as questions:
        finite = dino.train_step(model, optimizer, batch, now, 3.0, vit.autocast("cpu", dtype))[2]
    assert questions.asked == []
    with Questions() as questions:
        assert finite
        del batch["masked"]
        dino.train_step(model, optimizer, batch, now, 3.0, vit.autocast("cpu", dtype))
    assert questions.asked == ["_local_scalar_dense", "nonzero"]


def test_a_new_term_is_a_row():
    """Its weight in WEIGHTS is all that the step and the log need to know of it."""
    def weights(**kwargs):
        return dino.DINOv2(vit.VisionTransformer(32, 1, 2, image_size=56), 64, 48, 16, **kwargs).weights
    assert weights() == dino.WEIGHTS
    assert weights(weights={"ibot": 2.0}) == dino.WEIGHTS | {"ibot": 2.0}
    with pytest.raises(ValueError, match="no term .*kolleo"):
        weights(weights={"kolleo": 2.0})


# --- float16 -----------------------------------------------------------------------------------


def test_a_float16_step_equals_float32():
    """Losses to 2e-3, gradient norms to 2e-2, weights to a hundredth of what the step moved them
    by."""
    found = {}
    for name in ("fp32", "fp16"):
        model, optimizer, batch, now = small_step()
        generator = torch.Generator().manual_seed(0)
        batch["kept"] = model.student["backbone"].draw_kept([8, 8], generator)
        scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=name == "fp16")
        autocast = vit.autocast("cpu", vit.PRECISIONS[name])
        terms, norms, finite = dino.train_step(model, optimizer, batch, now, 3.0, autocast,
                                               scaler=scaler)
        assert finite and not hasattr(optimizer, "found_inf")
        found[name] = terms, norms
    for a, b, rtol in zip(found["fp16"], found["fp32"], (2e-3, 2e-2)):
        for key in b:
            torch.testing.assert_close(a[key], b[key], rtol=rtol, atol=2e-3,
                                       msg=lambda m: f"{key} {m}")


@pytest.mark.parametrize("fused", [True, False])
def test_an_overflow_changes_nothing_but_the_scale(fused):
    model, optimizer, batch, now = small_step(fused, centering="centering")
    before = everything(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 40)
    terms, _, finite = dino.train_step(model, optimizer, batch, now, 3.0,
                                       vit.autocast("cpu", torch.float16), scaler=scaler)
    assert terms["loss"].isfinite() and not finite
    assert scaler.get_scale() == 2.0 ** 39
    assert equal(before, everything(model, optimizer))


def test_a_loss_that_is_not_finite_holds_back_a_float16_step():
    """The scaler looks at gradients alone."""
    model, optimizer, batch, now = small_step()
    before = everything(model, optimizer)
    scaler, autocast = torch.amp.GradScaler("cpu", 16.0), vit.autocast("cpu", torch.float16)
    model.weights["koleo"] = float("inf")  # of a loss of 0 times a gradient of 0, say
    assert not dino.train_step(model, optimizer, batch, now, 3.0, autocast, scaler=scaler)[2]
    assert equal(before, everything(model, optimizer))
