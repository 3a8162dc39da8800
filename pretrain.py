"""Pre-training: DINOv2 self-supervision on unlabelled endoscopy frames, from a folder of images to a teacher.

    python pretrain.py --arch vitt14 --recipe demo            # minutes on a laptop's CPU, on synthetic frames made on first use
    torchrun --nproc-per-node gpu pretrain.py --arch vitb14 --data FRAMES                     # one process per GPU, DDP
    torchrun --nproc-per-node gpu pretrain.py --arch vitb14 --data FRAMES --recipe adapt --init dinov2_vitb14_pretrain.pth
    torchrun --nproc-per-node gpu pretrain.py --arch vitg14 --data FRAMES --recipe scratch-long --shard            # FSDP2

A killed run goes on where it stopped when the same command is given again. The run folder (runs/<arch>-<recipe>) holds
args.json, log.jsonl, last.pt (everything needed to go on), teacher_<step>.pt and best.pt (for the probes).
Every random draw is a function of (seed, step, process or frame), so the state of the random numbers is the step.
"""
import argparse
import contextlib
import copy
import datetime
import json
import math
import os
import pathlib
import re
import signal
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import data
import dino_loss as losses
import synthetic
import vit

# One row per recipe; every entry is the default of the flag of that name. Warm-ups and freezes are fractions of --steps.
# scratch and scratch-long are DINOv2's vitl16_short and vitl14/vitg14 configurations, except that local crops are 98 px
# (96 is no multiple of 14) and ViT-L keeps its MLP (the SwiGLU L of the long configuration was never released).
# adapt follows Meta's two-stage warm start (arXiv 2606.05107, FINO): new heads settle on a frozen backbone, then a ramp.
# demo is ours, for hundreds of frames and steps. With DINOv2's values so short a run never leaves the plateau where teacher and
# student are uniform: Sinkhorn spreads each of 2B rows over K / 2B prototypes, so K is small; the teacher is sharp and follows fast;
# the crops are large and keep their colour, so that two crops of one frame have something in common to be found.
RECIPES = {
    "scratch": dict(
        steps=125_000, batch=64, lr=4e-3, min_lr=1e-6, warmup=0.1, layerwise_decay=0.9, weight_decay=0.04, weight_decay_end=0.4,
        momentum=0.992, teacher_temp_start=0.04, teacher_temp=0.07, temp_warmup=0.3, freeze_last_layer=0.01, freeze_backbone=0.0,
        backbone_ramp=0.0, drop_path=0.3, prototypes=65536, bottleneck=256, separate_heads=False, centering="centering", koleo=0.1,
        global_size=224, local_size=98, local_crops=8, global_scale=(0.32, 1.0), local_scale=(0.05, 0.32), hue=True, grayscale=True,
        solarize=True),
    "scratch-long": dict(
        steps=625_000, batch=32, lr=2e-4, min_lr=1e-6, warmup=0.16, layerwise_decay=1.0, weight_decay=0.04, weight_decay_end=0.2,
        momentum=0.994, teacher_temp_start=0.04, teacher_temp=0.07, temp_warmup=0.06, freeze_last_layer=0.002, freeze_backbone=0.0,
        backbone_ramp=0.0, drop_path=0.4, prototypes=131072, bottleneck=384, separate_heads=True, centering="sinkhorn", koleo=0.1,
        global_size=224, local_size=98, local_crops=8, global_scale=(0.32, 1.0), local_scale=(0.05, 0.32), hue=True, grayscale=True,
        solarize=True),
    "adapt": dict(
        steps=25_000, batch=64, lr=2e-4, min_lr=-1.0, warmup=0.12, layerwise_decay=0.9, weight_decay=0.04, weight_decay_end=0.04,
        momentum=0.994, teacher_temp_start=0.04, teacher_temp=0.07, temp_warmup=0.3, freeze_last_layer=0.018, freeze_backbone=0.4,
        backbone_ramp=0.04, drop_path=0.1, prototypes=65536, bottleneck=256, separate_heads=True, centering="sinkhorn", koleo=0.1,
        global_size=224, local_size=98, local_crops=8, global_scale=(0.4, 1.0), local_scale=(0.05, 0.4), hue=True, grayscale=True,
        solarize=True),
    "demo": dict(
        steps=200, batch=32, lr=1.2e-2, min_lr=1e-6, warmup=0.1, layerwise_decay=1.0, weight_decay=0.04, weight_decay_end=0.4,
        momentum=0.9, teacher_temp_start=0.02, teacher_temp=0.03, temp_warmup=0.3, freeze_last_layer=0.01, freeze_backbone=0.0,
        backbone_ramp=0.0, drop_path=0.0, prototypes=128, bottleneck=256, separate_heads=True, centering="sinkhorn", koleo=0.02,
        global_size=98, local_size=42, local_crops=4, global_scale=(0.5, 1.0), local_scale=(0.2, 0.6), hue=False, grayscale=False,
        solarize=False),
}
SHRINK_ON_CPU = ("steps", "batch", "prototypes", "global_size", "local_size")  # taken from demo where there is no GPU
MAY_CHANGE = {  # arguments that may differ between a checkpoint and the run that goes on from it; the others may not
    "steps", "batch", "data", "frames", "out", "resume", "init", "workers", "device", "compile", "shard", "checkpoint_activations",
    "save_every", "export_every", "log_every", "max_skips", "probe_every", "probe_data", "probe_task"}


# --- the method -------------------------------------------------------------------------------------------------------


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


# --- stop and go on ---------------------------------------------------------------------------------------------------


def whole(state):
    """A state dict on the CPU with every shard gathered; all processes must call it."""
    return {k: (v.detach().full_tensor() if isinstance(v, DTensor) else v.detach()).cpu() for k, v in state.items()}


def fill(tensor, value):
    """Copy a whole CPU tensor into a tensor or into the shards of one."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


def save_checkpoint(path, model, optimizer, progress, args, rank=0):
    """Everything needed to go on, in one file whatever the number of processes: {"format", "student", "teacher", "centers",
    "optimizer": {parameter: {"step", "exp_avg", "exp_avg_sq"}}, "args", **progress}. The teacher stands in it as in a DINOv2
    training checkpoint, so load_backbone reads it. The old file stays until the new one is complete."""
    state = {"format": "endodino-run-1", "args": plain(args), **progress,
             "student": whole(model.student.state_dict()), "teacher": whole(model.teacher.state_dict()),
             "centers": {"dino": model.dino_center.cpu(), "ibot": model.ibot_center.cpu()},
             "optimizer": {name: whole(optimizer.state[p]) for name, p in model.student.named_parameters() if p in optimizer.state}}
    if rank == 0:
        with writing(path):
            vit.atomic_save(state, path)


@contextlib.contextmanager
def writing(path):
    try:
        yield
    except OSError as error:
        raise SystemExit(f"cannot write {path}: {error.strerror or error}; what lay there before is untouched") from error


@torch.no_grad()
def load_checkpoint(path, model, optimizer, state=None):
    """Fill model and optimiser from save_checkpoint's file, every name and shape of which must fit; returns its contents."""
    state = state or read_run(path)
    for module, saved in ((model.student, state["student"]), (model.teacher, state["teacher"])):
        current = module.state_dict()
        vit.check_same_tensors(current, saved, path)
        for name, tensor in current.items():
            fill(tensor, saved[name])
    model.dino_center.copy_(state["centers"]["dino"])
    model.ibot_center.copy_(state["centers"]["ibot"])
    for name, p in model.student.named_parameters():
        if name in state["optimizer"]:
            moments = state["optimizer"][name]
            optimizer.state[p] = {k: torch.zeros_like(p) if k != "step" else torch.zeros((), device=p.device) for k in moments}
            for k, value in moments.items():
                fill(optimizer.state[p][k], value)
    return state


def read_run(path):
    try:
        state = vit.read_checkpoint(path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--resume: {error}") from error
    if not isinstance(state, dict) or state.get("format") != "endodino-run-1":
        raise SystemExit(f"--resume: {path} is not a last.pt of pretrain.py; --init takes backbones")
    return state


def plain(args):
    """Arguments as JSON reads them back: tuples become lists."""
    return json.loads(json.dumps(vars(args)))


def check_same_run(saved, args, path):
    """Refuse to go on with arguments that contradict the checkpoint's."""
    now = plain(args)
    differ = [f"  {k}: {saved.get(k)} in the checkpoint, {now.get(k)} asked for" for k in sorted(saved.keys() | now.keys())
              if k not in MAY_CHANGE and saved.get(k) != now.get(k)]
    if differ:
        raise SystemExit(f"{path} was made with other arguments; give the same ones, another --out, or --resume no:\n" + "\n".join(differ))


def schedule_changes(old, new, step):
    """How a resumed run's schedules move when --steps or the global batch changed: lines to print."""
    if len(old["lr"]) == len(new["lr"]) and np.array_equal(old["lr"], new["lr"]):
        return []
    at = [min(step, len(s["lr"]) - 1) for s in (old, new)]
    return [f"schedules stretched from {len(old['lr'])} to {len(new['lr'])} steps; at step {step}:"] + [
        f"  {name}: {old[name][at[0]]:.4g} -> {new[name][at[1]]:.4g}" for name in new]


def cut_log(path, step):
    """Drop the lines of steps that will be made again, and a last line that a kill tore."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] < step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(lines))
        os.replace(temporary, path)


def check_room(args, model):
    """Fail before the first step, not at the first save, when the run folder cannot take the checkpoints."""
    out = pathlib.Path(args.out)
    need = 4 * 4 * sum(p.numel() for p in model.student.parameters())  # student, teacher, two moments
    need *= 1 if (out / "last.pt").exists() else 2  # the old file stays until the new one is complete
    trial = out / f".room{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(trial, "wb") as f:
            os.posix_fallocate(f.fileno(), 0, need)
    except OSError as error:
        raise SystemExit(f"--out {out} cannot take a checkpoint of {need / 2**20:.0f} MiB: {error.strerror}; "
                         "make room or choose another folder") from error
    finally:
        trial.unlink(missing_ok=True) if out.is_dir() else None


# --- watching ---------------------------------------------------------------------------------------------------------


def save_teacher(path, model, args, step, rank):
    """Write the teacher's backbone in our format and, as a bare state dict like DINOv2's files."""
    backbone = plain_teacher(model, args)
    if rank == 0:
        with writing(path):
            vit.save_backbone(path, backbone, args.arch, step, plain(args))
            vit.atomic_save(backbone.state_dict(), path.with_name(path.stem + "_dinov2.pth"))


def plain_teacher(model, args):
    """The teacher's backbone, whole and on the CPU, in every process; all must call it."""
    state = whole(model.teacher["backbone"].state_dict())
    with torch.device("meta"):
        backbone = vit.build_vit(args.arch, image_size=args.global_size)
    backbone.load_state_dict(state, assign=True)
    return backbone.eval()


def initial_loss_report(terms, args):
    """At the start student and teacher know nothing of each other: every cross-entropy is near ln K."""
    pairs, log_k = 2 + 2 * args.local_crops, math.log(args.prototypes)
    healthy = {"dino_local": 2 * args.local_crops / pairs * log_k, "dino_global": 2 / pairs * log_k, "ibot": 0.5 * log_k}
    text = "first step: " + ", ".join(f"{k} {terms[k]:.3f} (healthy {v:.3f})" for k, v in healthy.items()) + f", koleo {terms['koleo']:.3f}"
    if any(abs(terms[k] / v - 1) > 0.1 for k, v in healthy.items()):
        text += "\nWARNING: the initial loss is more than 10 % off; expected only when --init brings trained heads"
    return text


def collapse_warnings(stats, n_prototypes, rows):
    """Sentences about the teacher's plain softmax (losses.collapse_stats) that call for a look; empty when all is well."""
    warnings = []
    if stats["kl_to_uniform"] < 0.01 * math.log(n_prototypes):
        warnings.append("the teacher's output is uniform over the prototypes: lower --teacher-temp or raise --lr")
    if rows >= 8 and stats["entropy_of_mean"] < 0.1 * math.log(min(rows, n_prototypes)):
        warnings.append("every frame falls on the same prototypes: use --centering sinkhorn, a larger --batch or a lower --lr")
    if rows >= 8 and stats["prototypes_used"] <= max(1, rows // 32):
        warnings.append(f"{stats['prototypes_used']} prototypes serve all {rows} crops: use a larger --batch or a lower --lr")
    return warnings


def probe(model, args, labelled, step, best, device, rank):
    """Score the teacher on labelled frames and keep the best one: (metrics, best score so far). Rank 0 works, others wait."""
    import probe_mes  # lazily: training without a probe does not need it
    backbone, metrics = plain_teacher(model, args), {}
    if rank == 0:
        metrics = probe_mes.online_score(backbone.to(device), labelled, device)
        name = "kappa" if args.probe_task == "mes" else "macro_f1"
        tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in metrics.items()) + f" (best {name} so far {best:.3f})")
        if metrics[name] > best:
            best = metrics[name]
            vit.save_backbone(pathlib.Path(args.out) / "best.pt", backbone, args.arch, step, plain(args), metrics)
    shared = [metrics, best]
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0)
    return shared


def keep_nonfinite(model, optimizer, progress, args, terms, norms, paths, rank):
    """Keep what is needed to look at a step that was not finite and not applied; stop when there were too many."""
    frames = [paths]
    if dist.is_initialized():
        frames = [None] * dist.get_world_size()
        dist.all_gather_object(frames, paths)
    path = pathlib.Path(args.out) / f"nonfinite_{progress['step']}.pt"
    found = {k: float(v) for k, v in {**terms, **{f"grad_norm_{k}": v for k, v in norms.items()}}.items()}
    save_checkpoint(path, model, optimizer, {**progress, "frames": frames, "found": found}, args, rank)
    message = (f"step {progress['step']}: not finite ({', '.join(f'{k} {v:g}' for k, v in found.items() if not math.isfinite(v))}); "
               f"the step was not applied; its frames and the state before it are in {path}")
    if progress["skips"] > args.max_skips:
        raise SystemExit(message + "; look at the frames, lower --lr, or raise --max-skips" if rank == 0 else 1)
    if rank == 0:
        tqdm.write(message + f"; skipped ({progress['skips']} of at most {args.max_skips})")


# --- set-up -----------------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Formatter, epilog=recipe_table())
    box = parser.add_argument_group("what to train").add_argument
    box("--arch", default="vitb14", choices=vit.ARCHS, help="Vision Transformer; vitt14 is the small one for CPUs")
    box("--recipe", default="scratch", choices=RECIPES, help="row of the table below: the default of every flag without one here")
    box("--init", help="warm start from a backbone: ours, released DINOv2 weights or a DINOv2 training checkpoint (then with its heads, "
        "where they fit); the position embedding is resized. --recipe adapt is made for it")
    box("--seed", type=int, default=0, help="the run is a function of it, bit for bit on CPUs")

    box = parser.add_argument_group("frames").add_argument
    box("--data", help="folder of frames (sub-folder = video) or manifest.csv of curate.py; without it synthetic frames are made and used")
    box("--frames", help="file with the stems or paths to use, one a line: keep the test frames of your probes out")
    box("--workers", type=int, default=min(8, max(1, (os.cpu_count() or 1) // 2)), help="processes per process that decode and crop")
    box("--global-size", type=int, default=argparse.SUPPRESS, help="px of the two global crops, a multiple of 14")
    box("--local-size", type=int, default=argparse.SUPPRESS, help="px of the local crops, a multiple of 14")
    box("--local-crops", type=int, default=argparse.SUPPRESS, help="local crops per frame; they cost most of a step")
    box("--global-scale", type=float, nargs=2, default=argparse.SUPPRESS, metavar=("MIN", "MAX"), help="area of a global crop in the frame")
    box("--local-scale", type=float, nargs=2, default=argparse.SUPPRESS, metavar=("MIN", "MAX"), help="area of a local crop in the frame")
    box("--blur", default="as-executed", choices=data.BLUR, help="DINOv2's released weights were trained with the probabilities of its blur "
        "inverted: as-executed repeats that, as-written is the paper's")
    box("--hue", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help="turn hues at random; colour is diagnostic in endoscopy, so try without")
    box("--grayscale", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help="drop the colour of a fifth of the crops")
    box("--solarize", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help="invert the light part of a fifth of the second global crops")
    box("--exact-decode", action="store_true", help="never let the JPEG decoder shrink a frame that is much larger than its crops")

    box = parser.add_argument_group("optimisation").add_argument
    box("--steps", type=int, default=argparse.SUPPRESS, help="length of the run and of all schedules; warm-ups are fractions of it")
    box("--batch", type=int, default=argparse.SUPPRESS, help="frames per process and step; Sinkhorn and KoLeo want many")
    box("--lr", type=float, default=argparse.SUPPRESS, help="base rate for 1024 frames per step, scaled by sqrt(global batch / 1024)")
    box("--min-lr", type=float, default=argparse.SUPPRESS, help="rate at the end of the cosine; -1 = constant after the warm-up")
    box("--warmup", type=float, default=argparse.SUPPRESS, help="fraction of the steps over which the rate rises from 0")
    box("--layerwise-decay", type=float, default=argparse.SUPPRESS, help="rate of each block relative to the block above; 1 = all alike")
    box("--patch-embed-lr", type=float, default=0.2, help="further factor on the patch embedding's rate")
    box("--weight-decay", type=float, default=argparse.SUPPRESS, help="at the first step")
    box("--weight-decay-end", type=float, default=argparse.SUPPRESS, help="at the last step")
    box("--momentum", type=float, default=argparse.SUPPRESS, help="of the teacher at the first step; 1 at the last. Lower it for short runs")
    box("--clip", type=float, default=3.0, help="largest gradient norm of each submodule")
    box("--drop-path", type=float, default=argparse.SUPPRESS, help="fraction of the frames that each residual branch leaves out")
    box("--freeze-last-layer", type=float, default=argparse.SUPPRESS, help="fraction of the steps in which the prototypes stay")
    box("--freeze-backbone", type=float, default=argparse.SUPPRESS, help="fraction of the steps in which the backbone stays")
    box("--backbone-ramp", type=float, default=argparse.SUPPRESS, help="fraction of the steps over which its rate then rises")

    box = parser.add_argument_group("losses").add_argument
    box("--prototypes", type=int, default=argparse.SUPPRESS, help="K, outputs of each head; fewer for small batches")
    box("--head-hidden", type=int, default=2048, help="width of the heads' hidden layers")
    box("--bottleneck", type=int, default=argparse.SUPPRESS, help="width before the prototypes (DINO head; 256 in a separate iBOT head)")
    box("--separate-heads", action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help="an iBOT head of its own")
    box("--centering", choices=("sinkhorn", "centering"), default=argparse.SUPPRESS, help="how the teacher is kept from collapse")
    box("--teacher-temp", type=float, default=argparse.SUPPRESS, help="after its warm-up; lower is sharper")
    box("--teacher-temp-start", type=float, default=argparse.SUPPRESS, help="at the first step; too high and nothing is learnt, too low and it collapses")
    box("--temp-warmup", type=float, default=argparse.SUPPRESS, help="fraction of the steps over which the temperature rises")
    box("--koleo", type=float, default=argparse.SUPPRESS, help="weight of the term that spreads the class tokens; per process")

    box = parser.add_argument_group("run").add_argument
    box("--out", help="run folder; runs/<arch>-<recipe> if not given")
    box("--resume", default="auto", help="auto = from last.pt in the run folder if there is one; no = begin anew; or a file")
    box("--save-every", type=int, default=argparse.SUPPRESS, help="steps between two last.pt; a tenth of --steps and at most 500 if not given")
    box("--export-every", type=int, default=5000, help="steps between two teacher_<step>.pt; 0 = only at the end")
    box("--log-every", type=int, default=10, help="steps between two lines of log.jsonl")
    box("--max-skips", type=int, default=0, help="steps with a non-finite loss or gradient that are skipped before the run stops")
    box("--probe-every", type=int, default=0, help="steps between two scores of the teacher on labelled frames; 0 = never")
    box("--probe-data", help="labelled frames in a layout that data.py knows; the synthetic Mayo set if not given")
    box("--probe-task", default="mes", choices=("mes", "landmarks"), help="what they show; best.pt has the best quadratic kappa or macro F1")

    box = parser.add_argument_group("machine").add_argument
    box("--device", default="auto", choices=("auto", "cuda", "cpu"), help="auto = a GPU if there is one")
    box("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="auto = bfloat16 autocast on GPUs that have it")
    box("--compile", action="store_true", help="torch.compile each block: minutes of start-up, then faster on GPUs")
    box("--shard", action="store_true", help="FSDP2 instead of DDP, for a model that does not fit one GPU")
    box("--checkpoint-activations", action="store_true", help="recompute blocks in the backward pass: a third slower, far less memory")
    return complete(parser, parser.parse_args(argv))


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults behind each help text, and the module's docstring and the recipes as they stand."""


def recipe_table():
    lines = ["recipes:", "  " + " " * 19 + "".join(f"{name:>14}" for name in RECIPES)]
    for key in RECIPES["scratch"]:
        values = [recipe[key] for recipe in RECIPES.values()]
        lines.append(f"  --{key.replace('_', '-'):<18}" + "".join(f"{' '.join(map(str, v)) if isinstance(v, tuple) else v!s:>14}" for v in values))
    return "\n".join(lines + ["", "ViT-L keeps its MLP in every recipe. Without a GPU " + ", ".join(SHRINK_ON_CPU) + " default to demo's."])


def complete(parser, args):
    """Fill in what was not given: the device, then the recipe's row, shrunk without a GPU."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    row, given = dict(RECIPES[args.recipe]), vars(args)
    if args.device == "cpu":
        row |= {key: RECIPES["demo"][key] for key in SHRINK_ON_CPU}
    args = argparse.Namespace(**{**row, **given})
    args.save_every = given.get("save_every", min(500, max(1, args.steps // 10)))
    args.out = args.out or f"runs/{args.arch}-{args.recipe}"
    for name in ("global_size", "local_size"):
        if getattr(args, name) % 14 or getattr(args, name) < 28:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: crops are squares of 14 px patches, so a multiple of 14 from 28 up")
    for name in ("steps", "batch", "local_crops", "prototypes", "save_every", "log_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return args


def start(args):
    """Join the process group that torchrun announces, if it does: (device, rank, world size)."""
    rank, world, local_rank = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cpu")
    if args.device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise SystemExit(f"--device cuda: process {local_rank} of this machine has no GPU ({torch.cuda.device_count()} found); "
                             "start fewer processes or use --device cpu")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32, as DINOv2
    if world > 1 or args.shard:
        store = None if "RANK" in os.environ else dist.HashStore()
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=world, store=store,
                                timeout=datetime.timedelta(hours=2))  # the others wait while rank 0 probes
    return device, rank, world


def open_frames(args, say):
    """The unlabelled frames; synthetic ones where no --data is given."""
    root = args.data
    if root is None:
        root = synthetic.ensure() / "unlabelled"
        say(f"no --data: training on the synthetic frames in {root}")
    try:
        frames = data.Frames(root, only=args.frames)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--data {root}: {error}") from error
    args.n_frames = len(frames)  # a checkpoint knows how many frames its sampler walked through
    return frames


def build_model(args, say):
    """Student and teacher on the CPU, the same in every process."""
    torch.manual_seed(args.seed)
    backbone = vit.build_vit(args.arch, image_size=args.global_size, drop_path=args.drop_path)
    if args.init:
        try:
            loaded = vit.load_backbone(args.init, image_size=args.global_size)
            vit.check_same_tensors(backbone.state_dict(), loaded.state_dict(), f"--arch {args.arch} --init {args.init}")
        except (OSError, ValueError) as error:
            raise SystemExit(f"--init: {error}") from error
        backbone.load_state_dict(loaded.state_dict())
    backbone.checkpoint_activations = args.checkpoint_activations
    model = DINOv2(backbone, args.prototypes, args.head_hidden, args.bottleneck, args.separate_heads, 256, args.centering, args.koleo)
    if args.init:
        load_heads(model, args.init, say)
    return model


def load_heads(model, path, say):
    """Take the file's heads into student and teacher where it has them and they fit; they stay new otherwise."""
    teacher = vit.read_checkpoint(path).get("teacher", {})
    for name in ("dino_head", "ibot_head"):
        state = {k.removeprefix(name + "."): v for k, v in teacher.items() if k.startswith(name + ".")}
        if not state or name not in model.student:
            continue
        try:
            vit.check_same_tensors(model.student[name].state_dict(), state, path)
        except ValueError as error:
            say(f"--init: a new {name}: {error}")
            continue
        model.student[name].load_state_dict(state)
        model.teacher[name].load_state_dict(state)
        say(f"--init: {name} taken from {path}")


def distribute(model, args, device, world):
    """Move to the device, compile and wrap: returns the callable for the forward pass."""
    model.to(device)
    if args.compile:
        for block in [*model.student["backbone"].blocks, *model.teacher["backbone"].blocks]:
            block.compile()
    if args.shard:
        for part in (model.student, model.teacher):
            for module in [*part["backbone"].blocks, *list(part.values())[1:]]:
                fully_shard(module)
        return fully_shard(model)  # the rest: embeddings and final norms, so that forward_packed needs no hook of its own
    if world > 1:
        return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                                   gradient_as_bucket_view=True)
    return model


def make_optimizer(model, args):
    return torch.optim.AdamW(param_groups(model.student, args.layerwise_decay, args.patch_embed_lr), lr=0.0, betas=(0.9, 0.999), fused=True)


def autocast_for(args, device):
    on = args.precision == "bf16" or args.precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=on)


def make_batches(args, frames, start, rank, world, device):
    """Batches of this process from step `start` on, endless workers behind them."""
    multicrop = data.MultiCrop(frames, args.seed, args.global_size, args.local_size, args.local_crops, tuple(args.global_scale),
                               tuple(args.local_scale), args.blur, args.hue, args.grayscale, args.solarize, args.exact_decode)
    sampler = data.EpochSampler(len(frames), args.batch, args.seed, rank, world, start, args.steps)
    side = args.global_size // 14
    masks = data.BlockMasks((side, side), args.batch * world, args.seed)
    return iter(data.loader(multicrop, sampler, masks, args.workers, pin=device.type == "cuda"))


def next_batch(batches):
    try:
        return next(batches)
    except data.BadImage as error:
        raise SystemExit(str(error)) from error


# --- the run ----------------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse(argv)
    device, rank, world = start(args)
    stop = []  # names of the signals that asked for the end; a second one is obeyed at once
    handlers = {s: signal.signal(s, lambda number, frame: (stop.append(signal.Signals(number).name), signal.signal(number, signal.SIG_DFL)))
                for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        run(args, device, rank, world, stop)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def run(args, device, rank, world, stop):
    """Train from the first step, or from the checkpoint's, to the last one or until a signal has filled `stop`."""
    say = print if rank == 0 else lambda *words, **how: None
    out = pathlib.Path(args.out)
    frames = open_frames(args, say)
    model = build_model(args, say)
    if rank == 0:
        check_room(args, model)
    wrapped = distribute(model, args, device, world)
    optimizer, autocast = make_optimizer(model, args), autocast_for(args, device)
    progress = resume(model, optimizer, args, args.batch * world, say)
    schedules = make_schedules(args, args.batch * world)
    describe(args, model, frames, world, say)
    labelled = open_probe(args, say)
    batches, skipped = make_batches(args, frames, progress["step"], rank, world, device), data.Skipped(frames, world)
    log = Log(out, args, progress["step"], world, rank)
    model.train()

    for step in range(progress["step"], args.steps):
        with log.waiting():
            raw = next_batch(batches)
        if unreadable := skipped.update(raw):
            log.write({"step": step, "unreadable": unreadable})
        batch = data.augment(raw, device)
        batch["kept"] = draw_kept(model, batch, args.seed, step, rank)
        now = {name: values[step] for name, values in schedules.items()}
        terms, norms, finite = train_step(model, optimizer, batch, now, args.clip, autocast, wrapped)

        if finite:
            log.step(step, terms, norms, now, model)
        else:
            progress["skips"] += 1
            keep_nonfinite(model, optimizer, progress, args, terms, norms, [frames.path(i) for i in raw["index"].tolist()], rank)
        progress["step"] = done = step + 1
        ending = done == args.steps or not everywhere(torch.tensor(not stop, device=device))
        if args.probe_every and (done % args.probe_every == 0 or done == args.steps):
            metrics, progress["best"] = probe(model, args, labelled, done, progress["best"], device, rank)
            log.write({"step": step, "probe": metrics})
        if done == args.steps or args.export_every and done % args.export_every == 0:
            save_teacher(out / f"teacher_{done}.pt", model, args, done, rank)
        if ending or done % args.save_every == 0:
            save_checkpoint(out / "last.pt", model, optimizer, progress, args, rank)
        if ending:
            break
    log.close()
    if stop:
        say(f"{stop[0]}: stopped after step {progress['step']} of {args.steps}; the same command goes on from {out / 'last.pt'}")


def resume(model, optimizer, args, global_batch, say):
    """Where the run stands: {"step": steps done, "skips", "best", "global_batch"}; model and optimiser filled if it goes on."""
    progress = {"step": 0, "skips": 0, "best": -math.inf, "global_batch": global_batch}
    path = pathlib.Path(args.out) / "last.pt" if args.resume in ("auto", "no") else pathlib.Path(args.resume)
    if args.resume == "no" or args.resume == "auto" and not path.exists():
        return progress
    state = read_run(path)
    check_same_run(state["args"], args, path)
    load_checkpoint(path, model, optimizer, state)
    progress |= {key: state[key] for key in ("step", "skips", "best")}
    if progress["step"] > args.steps:
        raise SystemExit(f"{path} has already done {progress['step']} steps, more than --steps {args.steps}")
    say(f"going on from {path} after step {progress['step']} of {args.steps}")
    old = make_schedules(argparse.Namespace(**state["args"]), state["global_batch"])
    say(*schedule_changes(old, make_schedules(args, global_batch), progress["step"]), sep="\n", end="")
    return progress


def describe(args, model, frames, world, say):
    """Print what will run, and where the numbers come from."""
    if args.device == "cpu" and args.recipe != "demo":
        say(f"no GPU: {', '.join('--' + k.replace('_', '-') for k in SHRINK_ON_CPU)} default to those of --recipe demo")
    say("\n".join(f"  {k:20} {v}" for k, v in sorted(plain(args).items())))
    n = args.batch * world
    say(f"{sum(p.numel() for p in model.student.parameters()):,} parameters (backbone {sum(p.numel() for p in model.student['backbone'].parameters()):,}), "
        f"{len(frames):,} frames, {n} per step ({world} x {args.batch}), {args.steps} steps = {args.steps * n / len(frames):.1f} epochs\n"
        f"peak learning rate {args.lr * math.sqrt(n / 1024):.3g} = --lr {args.lr:g} * sqrt({n} / 1024)")


def open_probe(args, say):
    """The labelled frames of the online probe, or None."""
    if not args.probe_every:
        return None
    root = args.probe_data
    if root is None:
        root = synthetic.ensure()
        say(f"no --probe-data: probing on the synthetic frames in {root}")
    try:
        return data.open_labelled(root, args.probe_task)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--probe-data {root}: {error}") from error


def draw_kept(model, batch, seed, step, rank):
    """The samples that stochastic depth keeps at this step in this process, drawn on the CPU."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1))
    kept = model.student["backbone"].draw_kept([len(batch["global_crops"]), len(batch["local_crops"])], generator)
    return kept and [k.to(batch["masks"].device, non_blocking=True) for k in kept]


class Log:
    """log.jsonl and the progress bar, on rank 0; warns of a run that looks unwell. On resuming, what will be made again is cut."""

    def __init__(self, out, args, start, world, rank):
        self.args, self.world, self.rank, self.warned = args, world, rank, set()
        self.images = self.wait = 0.0
        self.clock = time.perf_counter()
        self.bar = tqdm(total=args.steps * args.batch * world, initial=start * args.batch * world, unit="img", disable=rank != 0)
        if rank == 0:
            cut_log(out / "log.jsonl", start)
            (out / "args.json").write_text(json.dumps(plain(args), indent=1) + "\n")
            self.file = open(out / "log.jsonl", "a", buffering=1)

    @contextlib.contextmanager
    def waiting(self):
        began = time.perf_counter()
        yield
        self.wait += time.perf_counter() - began

    def step(self, step, terms, norms, now, model):
        args, n = self.args, self.args.batch * self.world
        self.images += n
        self.bar.update(n)
        if step % args.log_every:
            return
        means = losses.all_reduce(torch.stack(list(terms.values()))) / self.world
        terms = dict(zip(terms, means.tolist()))
        stats = losses.collapse_stats(model.teacher_logits, float(now["temp"]))
        seconds = time.perf_counter() - self.clock
        self.write({"step": step, **terms, **{k: float(v) for k, v in now.items()}, **{f"grad_norm_{k}": float(v) for k, v in norms.items()},
                    **stats, "images_per_s": self.images / seconds, "input_wait": self.wait / seconds})
        self.images, self.wait, self.clock = 0, 0.0, time.perf_counter()
        self.bar.set_postfix_str(f"step {step} loss {terms['loss']:.3f}")
        if step == 0:
            self.say(initial_loss_report(terms, args))
        if step >= max(100, args.warmup * args.steps):  # every run starts uniform, on few prototypes
            for sentence in collapse_warnings(stats, args.prototypes, len(model.teacher_logits)):
                if sentence not in self.warned:
                    self.say(f"WARNING, step {step}: {sentence}")
                    self.warned.add(sentence)

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def write(self, line):
        if self.rank == 0:
            self.file.write(json.dumps(line) + "\n")

    def close(self):
        self.bar.close()
        if self.rank == 0:
            self.file.close()


if __name__ == "__main__":
    main()
