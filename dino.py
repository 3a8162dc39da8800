"""The method on one page: DINOv2's student and teacher, its parameter groups and schedules, one
training step.

    model = DINOv2(backbone, n_prototypes=65536)
    groups = param_groups(model.student, layerwise_decay=0.9, patch_embed_lr_mult=0.2)
    optimizer = torch.optim.AdamW(groups, fused=True)
    terms, norms, finite = train_step(model, optimizer, batch, now, clip=3.0)

The student sees crops of an image and predicts what the teacher says of other, larger crops of
it. The teacher is the student's moving average: it learns from nobody, and is a little ahead of
the student all the time. What a batch is made of stands in augment.py, the losses in
dino_loss.py, the run around the step in pretrain.py. B images, L local crops, N patches, M of
them hidden, D width, K prototypes; crops are crop-major (crop 1 of all images, then crop 2 of
all images).
"""
import contextlib
import copy
import math
import re

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor

import dino_loss as losses

# Each term of the loss and its weight. A new one takes a row here, one in DINOv2.forward, and a
# function in dino_loss.py; the log, its means over processes and the check that all is finite
# take what they find.
WEIGHTS = {"dino_global": 1.0, "dino_local": 1.0, "ibot": 1.0, "koleo": 0.1}


class DINOv2(nn.Module):
    """Student and teacher, each a ModuleDict(backbone, dino_head[, ibot_head]), and the losses
    between them (Oquab et al. 2023, arXiv 2304.07193, section 4; the code of
    facebookresearch/dinov2 decides where they differ).

    Without a separate iBOT head the DINO head serves both losses. centering: "sinkhorn" (SwAV, 3
    iterations) or "centering" (DINO's moving average). weights: of terms in WEIGHTS, where they
    differ; koleo_weight is short for one of them."""

    def __init__(self, backbone, n_prototypes, hidden_dim=2048, bottleneck_dim=256,
                 separate_ibot_head=True, ibot_bottleneck_dim=256, centering="sinkhorn",
                 koleo_weight=0.1, weights=None):
        super().__init__()
        if centering not in ("sinkhorn", "centering"):
            raise ValueError(f"centering must be sinkhorn or centering, not {centering!r}")
        self.centering = centering
        self.weights = WEIGHTS | {"koleo": koleo_weight} | (weights or {})
        if surplus := self.weights.keys() - WEIGHTS.keys():
            raise ValueError(f"the loss has no term {', '.join(surplus)}: it has {', '.join(WEIGHTS)}")

        def head(bottleneck):
            return losses.DINOHead(backbone.dim, n_prototypes, hidden_dim, bottleneck)
        student = {"backbone": backbone, "dino_head": head(bottleneck_dim)}
        if separate_ibot_head:
            student["ibot_head"] = head(ibot_bottleneck_dim)
        self.student = nn.ModuleDict(student)
        # The teacher starts as a copy, heads included. It never drops a branch: its targets
        # should be its best guess.
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        self.teacher["backbone"].drop_path = 0.0
        self.register_buffer("dino_center", torch.zeros(n_prototypes))
        self.register_buffer("ibot_center", torch.zeros(n_prototypes))
        self.next_centers = ()      # with centering: what they become if this step is taken
        self.teacher_logits = None  # (2B, K) class logits of the last batch: is it collapsing?

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()  # always
        return self

    def forward(self, batch, teacher_temp):
        """batch: {"global_crops" (2B,3,S,S), "local_crops" (L*B,3,s,s), "masks" (2B,N) bool},
        crop-major, normalised. And optionally "masked" (M,), the hidden rows among the 2B*N
        patches, and "kept", the samples that stochastic depth keeps (VisionTransformer.draw_kept
        of [2B, L*B]).

        Returns {"loss", "dino_global", "dino_local", "ibot", "koleo"}: each term as it enters
        the loss, their sum."""
        images, masks = batch["global_crops"], batch["masks"]
        B = len(images) // 2
        # The loader has counted the hidden patches already. Counted here, a GPU would have to
        # finish all that it was given before the answer is known, and could not be kept busy
        # meanwhile.
        masked = batch["masked"] if "masked" in batch else masks.flatten().nonzero().squeeze(1)
        teacher_cls, teacher_patch = self.teacher_targets(images, masked, teacher_temp)

        # The student sees the global crops with patches hidden and the local crops whole, all in
        # one packed pass.
        crops, hidden = [images, batch["local_crops"]], [masks, None]
        glob, loc = self.student["backbone"].forward_packed(crops, hidden, batch.get("kept"))
        patches = glob["patches"].flatten(0, 1).index_select(0, masked)              # (M, D)
        loc_cls, glob_cls, patch = project(self.student, [loc["cls"], glob["cls"]], patches)
        loc_cls = loc_cls.unflatten(0, (-1, B))                                      # (L, B, K)
        glob_cls = glob_cls.unflatten(0, (2, B))                                     # (2, B, K)

        dino_global, dino_local = losses.dino_loss(glob_cls, loc_cls, teacher_cls)
        terms = {
            "dino_global": dino_global,
            "dino_local": dino_local,
            "ibot": losses.ibot_loss(patch, teacher_patch, masks),
            # on the backbone's tokens, before the head; among the B images of one crop: an
            # image's own other crop would be its nearest neighbour, and pushing that away is the
            # opposite of what DINO asks for
            "koleo": sum(losses.koleo_loss(cls) for cls in glob["cls"].split(B)),
        }
        terms = {name: self.weights[name] * term for name, term in terms.items()}
        return {"loss": sum(terms.values()), **terms}

    @torch.no_grad()
    def teacher_targets(self, images, masked, temp):
        """The teacher sees whole images: target distributions for class tokens (2, B, K) and
        hidden patches (M, K)."""
        out = self.teacher["backbone"](images)
        patches = out["patches"].flatten(0, 1).index_select(0, masked)               # (M, D)
        cls, patch = project(self.teacher, [out["cls"]], patches)             # (2B, K), (M, K)
        self.teacher_logits = cls
        centers = None, None
        if self.centering == "centering":
            # Targets take the centres of the steps before this one (DINO, eq. 4). The new ones
            # wait in next_centers: a step that turns out not to be finite must leave no trace.
            centers = self.dino_center, self.ibot_center
            self.next_centers = (losses.update_center(self.dino_center, cls),
                                 losses.update_center(self.ibot_center, patch))
        return (losses.teacher_targets(cls.unflatten(0, (2, -1)), temp, centers[0]),
                losses.teacher_targets(patch, temp, centers[1]))

    @torch.no_grad()
    def update_teacher(self, momentum, finite=None):
        """teacher <- momentum * teacher + (1 - momentum) * student, over backbone and heads, in
        float32. The centres of this batch come into force as well: they serve the next one.

        finite: a 0-dim bool tensor; where it is False nothing changes. Nobody waits for its
        value: the weight of the student becomes 0, and the student itself is finite, because a
        bad step never reached it (0 * NaN would be NaN)."""
        teacher = [shard(p) for p in self.teacher.parameters()]
        student = [shard(p) for p in self.student.parameters()]
        weight = torch.full((), 1 - momentum, device=teacher[0].device)
        if finite is not None:
            weight = torch.where(finite, weight, 0.0)
        torch._foreach_lerp_(teacher, student, [weight] * len(teacher))
        for center, new in zip((self.dino_center, self.ibot_center), self.next_centers):
            center.copy_(new if finite is None else torch.where(finite, new, center))


def project(heads, groups, patches):
    """Groups of class tokens, each (n, D), and patches (M, D) through their heads: logits of
    each group, then of the patches. A shared head runs once, on all; so does its weight norm."""
    sizes = [len(group) for group in groups]
    if "ibot_head" in heads:
        return *heads["dino_head"](torch.cat(groups), sizes), heads["ibot_head"](patches)
    return heads["dino_head"](torch.cat([*groups, patches]), [*sizes, len(patches)])


def shard(tensor):
    """This process's part of a tensor that FSDP2 has split among all; any other tensor as it
    is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# --- what learns how fast ----------------------------------------------------------------------


BLOCK = re.compile(r"blocks\.(\d+)\.")  # the number of a parameter's block, from 0


def param_groups(student, layerwise_decay, patch_embed_lr_mult):
    """Optimiser groups: {"params", "names", "lr_multiplier", "wd_multiplier", "is_last_layer",
    "is_backbone", "schedule"}.

    schedule names the learning rate of make_schedules that a group follows, lr_multiplier scales
    it. Biases, norms and LayerScale alone are spared weight decay: DINOv2 decays the tokens, the
    position embedding and both halves of the weight-normalised last layer."""
    names = [name for name, _ in student.named_parameters()]
    depth = len({block[1] for block in map(BLOCK.search, names) if block})
    groups = {}
    for name, parameter in student.named_parameters():
        last_layer, backbone = "last_layer" in name, name.startswith("backbone.")
        spared = name.endswith("bias") or "norm" in name or "gamma" in name
        kind = {
            "lr_multiplier": lr_multiplier(name, depth, layerwise_decay, patch_embed_lr_mult),
            "wd_multiplier": 0.0 if spared else 1.0,
            "is_last_layer": last_layer,
            "is_backbone": backbone,
            "schedule": "last_layer_lr" if last_layer else "backbone_lr" if backbone else "lr",
        }
        group = groups.setdefault(tuple(kind.values()), {"params": [], "names": [], **kind})
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def lr_multiplier(name, depth, decay, patch_embed):
    """Of `depth` blocks, block i (from 0) learns at decay^(depth - i): the lower, the more
    general, the slower. What comes before the blocks learns at decay^(depth + 1), the patch
    embedding times `patch_embed`; final norm and heads at 1."""
    if block := BLOCK.search(name):
        return decay ** (depth - int(block[1]))
    if "patch_embed" in name:
        return decay ** (depth + 1) * patch_embed
    tokens = "cls_token", "pos_embed", "register_tokens", "mask_token"
    return decay ** (depth + 1) if any(token in name for token in tokens) else 1.0


def constant_schedule(base, total, warmup=0, warmup_start=0.0):
    """(total,) float64: `warmup` steps from warmup_start up to and including base, then base."""
    rest = np.full(total - warmup, float(base))
    return np.concatenate([np.linspace(warmup_start, base, warmup), rest])


def cosine_schedule(base, final, total, warmup=0, warmup_start=0.0):
    """(total,) float64: `warmup` steps from warmup_start up to and including base, then half a
    cosine towards final."""
    i = np.arange(total - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / len(i)))
    return np.concatenate([np.linspace(warmup_start, base, warmup), cosine])


def make_schedules(args, global_batch):
    """{name: (steps,) array} of everything that changes with the step; args as pretrain.parse
    returns them. The learning rate follows the square-root rule: Adam's steps have about one
    length, so twice the batch is worth sqrt(2) of them."""
    n = args.steps
    warmup, temp_warmup = round(args.warmup * n), round(args.temp_warmup * n)
    frozen, ramp = round(args.freeze_backbone * n), round(args.backbone_ramp * n)
    lr = args.lr * math.sqrt(global_batch / 1024)
    if args.min_lr < 0:
        rates = constant_schedule(lr, n, warmup)
    else:
        rates = cosine_schedule(lr, args.min_lr, n, warmup)
    # a warm start lets new heads settle on a backbone that stays; then the backbone follows
    thaw = np.clip((np.arange(n) - frozen + 1) / (ramp + 1), 0, 1)
    return {
        "lr": rates,
        "backbone_lr": args.backbone_lr * rates * thaw,
        # prototypes that move in the first steps chase a teacher that knows nothing yet
        "last_layer_lr": rates * (np.arange(n) >= round(args.freeze_last_layer * n)),
        "weight_decay": cosine_schedule(args.weight_decay, args.weight_decay_end, n),
        "momentum": cosine_schedule(args.momentum, 1.0, n),  # the teacher slows down to a stop
        "temp": constant_schedule(args.teacher_temp, n, temp_warmup, args.teacher_temp_start),
    }


# --- one step ----------------------------------------------------------------------------------


def train_step(model, optimizer, batch, now, clip, autocast=contextlib.nullcontext(),
               wrapped=None, scaler=None, before_update=lambda: None):
    """One step of the method. now: this step's value of each schedule; wrapped: the model as DDP
    sees it; scaler: a torch.amp.GradScaler for float16; before_update: called when the device has
    been given all that leads to the gradients, and nothing that changes the state; it may raise.

    Returns the loss terms, the gradient norms, and whether all was finite in every process, a
    0-dim bool tensor: if not, nothing was changed. The step asks the device for no value, so
    that a GPU can be given the next work meanwhile; see `answer`."""
    scaler = scaler or torch.amp.GradScaler(enabled=False)  # which passes everything through
    # -------------------------------------------------------------------------------------------
    for group in optimizer.param_groups:  # 1. schedules
        group["lr"] = float(now[group["schedule"]] * group["lr_multiplier"])
        group["weight_decay"] = float(now["weight_decay"] * group["wd_multiplier"])
    with autocast:  # 2. targets of the teacher, losses of the student
        terms = (wrapped or model)(batch, float(now["temp"]))
    scaler.scale(terms["loss"]).backward()  # 3. gradients, averaged over processes
    scaler.unscale_(optimizer)
    norms = clip_gradients(model.student, clip)  # 4. each submodule on its own
    finite = finite_everywhere([terms["loss"].detach(), *norms.values()])
    before_update()
    step_where(finite, optimizer, scaler)  # 5. the student follows the gradient
    model.update_teacher(float(now["momentum"]), finite)  # 6. the teacher follows the student
    optimizer.zero_grad(set_to_none=True)
    # -------------------------------------------------------------------------------------------
    return {name: term.detach() for name, term in terms.items()}, norms, finite


def clip_gradients(student, max_norm):
    """Scale the gradients of each submodule (backbone, dino_head, ibot_head) to a norm of at
    most max_norm, each on its own and over the shards of all processes. Returns {submodule: norm
    before clipping}."""
    norms = {}
    for name, module in student.named_children():
        norm = nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        norms[name] = norm.full_tensor() if isinstance(norm, DTensor) else norm
    return norms


def finite_everywhere(values):
    """Whether these 0-dim tensors are finite in every process: a 0-dim bool tensor, equal in all
    of them. A gradient that is not finite makes its norm so, and a loss that is not finite must
    not hide behind a gradient of 0."""
    bad = (~torch.stack(values).isfinite().all()).float()
    return losses.all_reduce(bad, "MAX") == 0


def everywhere(flag):
    """Whether a boolean tensor holds in every process; the host waits for the answer."""
    return bool(losses.all_reduce(flag.float(), "MIN"))


def answer(flag):
    """The value of a 0-dim bool tensor, as a function to be called later: it waits for what the
    device was given before `answer`, and not for what it was given since. bool(flag) would wait
    for all of it."""
    value = flag.to("cpu", non_blocking=True)
    if not flag.is_cuda:
        return lambda: bool(value)
    copied = torch.cuda.Event()
    copied.record()

    def wait():
        copied.synchronize()
        return bool(value)
    return wait


def step_where(finite, optimizer, scaler):
    """optimizer.step() where finite holds; otherwise weights, moments and step counters stay. A
    fused optimiser takes the answer on the device, as exactly 0.0 or 1.0; any other has to be
    told, so the host waits."""
    bad = (~finite).float()
    if scaler.is_enabled():
        for found in scaler._found_inf_per_device(optimizer).values():
            found.copy_(bad)  # the scaler saw this process's gradients alone, and not the loss
        scaler.step(optimizer)
        scaler.update()  # halves the scale after an overflow, doubles it after 2,000 good steps
    elif optimizer.defaults.get("fused"):
        optimizer.grad_scale, optimizer.found_inf = None, bad
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif finite:
        optimizer.step()
