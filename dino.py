"""The method on one page: DINOv2's student and teacher, its parameter groups and schedules, and one training step.

    model = DINOv2(backbone, n_prototypes=65536)
    optimizer = torch.optim.AdamW(param_groups(model.student, layerwise_decay=0.9, patch_embed_lr_mult=0.2), fused=True)
    terms, norms, finite = train_step(model, optimizer, batch, now, clip=3.0)

What a batch is made of stands in data.py, the losses in dino_loss.py, the run around the step in pretrain.py.
"""
import contextlib
import copy
import math
import re

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

import dino_loss as losses


class DINOv2(nn.Module):
    """Student and teacher, each a ModuleDict(backbone, dino_head[, ibot_head]), and the losses between them
    (Oquab et al. 2023, arXiv 2304.07193, section 4; the code of facebookresearch/dinov2 decides where they differ).

    The teacher starts as a copy of the student, heads included, without stochastic depth. Without a separate iBOT head the
    DINO head serves both losses. centering: "sinkhorn" (SwAV, 3 iterations) or "centering" (DINO's moving average).
    """

    def __init__(self, backbone, n_prototypes, hidden_dim=2048, bottleneck_dim=256, separate_ibot_head=True,
                 ibot_bottleneck_dim=256, centering="sinkhorn", koleo_weight=0.1):
        super().__init__()
        if centering not in ("sinkhorn", "centering"):
            raise ValueError(f"centering must be sinkhorn or centering, not {centering!r}")
        self.centering, self.koleo_weight = centering, koleo_weight
        student = {"backbone": backbone, "dino_head": losses.DINOHead(backbone.dim, n_prototypes, hidden_dim, bottleneck_dim)}
        if separate_ibot_head:
            student["ibot_head"] = losses.DINOHead(backbone.dim, n_prototypes, hidden_dim, ibot_bottleneck_dim)
        self.student = nn.ModuleDict(student)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.teacher["backbone"].drop_path = 0.0
        self.register_buffer("dino_center", torch.zeros(n_prototypes))
        self.register_buffer("ibot_center", torch.zeros(n_prototypes))
        self.next_centers = ()  # with centering: what they become if this step is taken
        self.teacher_logits = None  # (2B, K) class logits of the last batch, kept for the collapse statistics

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()  # always
        return self

    def forward(self, batch, teacher_temp):
        """batch: {"global_crops" (2B,3,S,S), "local_crops" (L*B,3,s,s), "masks" (2B,N) bool}, crop-major, normalised; and
        optionally "kept", the samples that stochastic depth keeps (VisionTransformer.draw_kept of [2B, L*B]).

        Returns {"loss", "dino_global", "dino_local", "ibot", "koleo"}: each term as it enters the loss, which is their sum.
        """
        images, masks = batch["global_crops"], batch["masks"]
        B = len(images) // 2
        masked = masks.flatten().nonzero().squeeze(1)                                # (M,) row of each hidden patch
        teacher_cls, teacher_patch = self.teacher_targets(images, masked, teacher_temp)  # (2, B, K), (M, K)

        glob, loc = self.student["backbone"].forward_packed([images, batch["local_crops"]], [masks, None], batch.get("kept"))
        hidden = glob["patches"].flatten(0, 1)[masked]                               # (M, D)
        student_local, student_global, patch_logits = project(self.student, [loc["cls"], glob["cls"]], hidden)
        student_local, student_global = (x.unflatten(0, (-1, B)) for x in (student_local, student_global))  # (L, B, K), (2, B, K)

        dino_global, dino_local = losses.dino_loss(student_global, student_local, teacher_cls)
        ibot = losses.ibot_loss(patch_logits, teacher_patch, masks)
        koleo = self.koleo_weight * sum(losses.koleo_loss(x) for x in glob["cls"].split(B))  # before the head, per process
        terms = {"dino_global": dino_global, "dino_local": dino_local, "ibot": ibot, "koleo": koleo}
        return {"loss": sum(terms.values()), **terms}

    @torch.no_grad()
    def teacher_targets(self, images, masked, temp):
        """The teacher sees the whole image: target distributions for class tokens (2, B, K) and hidden patches (M, K)."""
        out = self.teacher["backbone"](images)
        cls, patch = project(self.teacher, [out["cls"]], out["patches"].flatten(0, 1)[masked])  # (2B, K), (M, K)
        self.teacher_logits = cls
        if self.centering == "sinkhorn":
            targets = losses.teacher_targets(cls.unflatten(0, (2, -1)), temp), losses.teacher_targets(patch, temp)
        else:
            targets = (losses.teacher_targets(cls.unflatten(0, (2, -1)), temp, self.dino_center),
                       losses.teacher_targets(patch, temp, self.ibot_center))
            self.next_centers = losses.update_center(self.dino_center, cls), losses.update_center(self.ibot_center, patch)
        return targets

    @torch.no_grad()
    def update_teacher(self, momentum):
        """teacher <- momentum * teacher + (1 - momentum) * student, over backbone and heads, in float32. The centres of this
        batch come into force as well: they serve the next one."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # a forward without a backward leaves whole copies, which are not the parameters
        teacher = [local(p) for p in self.teacher.parameters()]
        student = [local(p) for p in self.student.parameters()]
        get_ema_multi_avg_fn(momentum)(teacher, student, None)
        for center, new in zip((self.dino_center, self.ibot_center), self.next_centers):
            center.copy_(new)


def project(heads, groups, patches):
    """Groups of class tokens, each (n, D), and patches (M, D) through their heads: logits of each group, then of the patches. A
    shared head runs once, on all; so does its weight norm."""
    sizes = [len(group) for group in groups]
    if "ibot_head" in heads:
        return *heads["dino_head"](torch.cat(groups), sizes), heads["ibot_head"](patches)
    return heads["dino_head"](torch.cat([*groups, patches]), [*sizes, len(patches)])


def local(tensor):
    """This process's part of a sharded tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def param_groups(student, layerwise_decay, patch_embed_lr_mult):
    """Optimiser groups: {"params", "names", "lr_multiplier", "wd_multiplier", "is_last_layer", "is_backbone"}.

    Of L blocks, block i (from 0) learns at layerwise_decay^(L-i), the tokens and the patch embedding at ^(L+1), the latter
    times patch_embed_lr_mult; final norm and heads at 1. Biases, norms and LayerScale alone are spared weight decay: DINOv2
    decays the tokens, the position embedding and both halves of the weight-normalised last layer."""
    names = [name for name, _ in student.named_parameters()]
    depth = 1 + max((int(i) for name in names for i in re.findall(r"blocks\.(\d+)\.", name)), default=-1)
    groups = {}
    for name, parameter in student.named_parameters():
        block = re.search(r"blocks\.(\d+)\.", name)
        lr = 1.0
        if block:
            lr = layerwise_decay ** (depth - int(block[1]))
        elif any(part in name for part in ("cls_token", "pos_embed", "register_tokens", "mask_token", "patch_embed")):
            lr = layerwise_decay ** (depth + 1)
        if "patch_embed" in name:
            lr *= patch_embed_lr_mult
        wd = 0.0 if name.endswith("bias") or "norm" in name or "gamma" in name else 1.0
        key = (lr, wd, "last_layer" in name, name.startswith("backbone."))
        group = groups.setdefault(key, {"params": [], "names": [], **dict(zip(
            ("lr_multiplier", "wd_multiplier", "is_last_layer", "is_backbone"), key))})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def cosine_schedule(base, final, total, warmup=0, warmup_start=0.0):
    """(total,) float64: `warmup` steps from warmup_start up to and including base, then half a cosine towards final."""
    i = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / len(i)))
    return np.concatenate([np.linspace(warmup_start, base, warmup), cosine])


def make_schedules(args, global_batch):
    """{name: (steps,) array} of everything that changes with the step. The learning rate follows the square-root rule."""
    n = args.steps
    lr = args.lr * math.sqrt(global_batch / 1024)
    rates = cosine_schedule(lr, lr if args.min_lr < 0 else args.min_lr, n, round(args.warmup * n))
    frozen, ramp = round(args.freeze_backbone * n), round(args.backbone_ramp * n)
    backbone = np.clip((np.arange(n) - frozen + 1) / (ramp + 1), 0, 1)
    return {
        "lr": rates,
        "backbone_lr": rates * backbone,
        "last_layer_lr": rates * (np.arange(n) >= round(args.freeze_last_layer * n)),
        "weight_decay": cosine_schedule(args.weight_decay, args.weight_decay_end, n),
        "momentum": cosine_schedule(args.momentum, 1.0, n),
        "temp": cosine_schedule(args.teacher_temp, args.teacher_temp, n, round(args.temp_warmup * n), args.teacher_temp_start),
    }


def clip_gradients(student, max_norm):
    """Scale the gradients of each submodule (backbone, dino_head, ibot_head) to a norm of at most max_norm, each on its own
    and over the shards of all processes. Returns {submodule: norm before clipping}."""
    norms = {name: nn.utils.clip_grad_norm_(module.parameters(), max_norm) for name, module in student.named_children()}
    return {name: norm.full_tensor() if isinstance(norm, DTensor) else norm for name, norm in norms.items()}


def train_step(model, optimizer, batch, now, clip, autocast=contextlib.nullcontext(), wrapped=None):
    """One step of the method. now: this step's value of each schedule; wrapped: the model as DDP sees it.

    Returns the loss terms, the gradient norms, and whether everything was finite: if not, nothing was changed.
    """
    # ----------------------------------------------------------------------------------------------------------------
    for group in optimizer.param_groups:  # 1. schedules
        rate = now["last_layer_lr"] if group["is_last_layer"] else now["backbone_lr"] if group["is_backbone"] else now["lr"]
        group["lr"] = float(rate * group["lr_multiplier"])
        group["weight_decay"] = float(now["weight_decay"] * group["wd_multiplier"])
    with autocast:  # 2. targets of the teacher, losses of the student
        terms = (wrapped or model)(batch, float(now["temp"]))
    terms["loss"].backward()  # 3. gradients, averaged over processes
    norms = clip_gradients(model.student, clip)  # 4. each submodule on its own
    finite = everywhere(torch.stack([terms["loss"].detach(), *norms.values()]).isfinite().all())
    if finite:
        optimizer.step()  # 5. the student follows the gradient
        model.update_teacher(float(now["momentum"]))  # 6. the teacher follows the student
    optimizer.zero_grad(set_to_none=True)
    # ----------------------------------------------------------------------------------------------------------------
    return {name: term.detach() for name, term in terms.items()}, norms, finite


def everywhere(flag):
    """Whether a boolean tensor holds in every process."""
    return bool(losses.all_reduce((~flag).float()) == 0)
