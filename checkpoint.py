"""Stop and go on: the checkpoint of a run (last.pt), what may change between it and the run that goes on, and the exports.

One file whatever the number of processes and shards, written whole or not at all, and read as tensors and plain values.
"""
import argparse
import contextlib
import json
import math
import os
import pathlib

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

import vit
from dino import make_schedules

MAY_CHANGE = {  # arguments that may differ between a checkpoint and the run that goes on from it; the others may not
    "steps", "batch", "data", "frames", "out", "resume", "init", "workers", "threads", "device", "compile", "shard", "checkpoint_activations",
    "save_every", "export_every", "log_every", "max_skips", "probe_every", "probe_data", "probe_task"}


# --- saving -----------------------------------------------------------------------------------------------------------


def whole(state):
    """A state dict on the CPU with every shard gathered; all processes must call it."""
    return {k: (v.detach().full_tensor() if isinstance(v, DTensor) else v.detach()).cpu() for k, v in state.items()}


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
        backbone = vit.build_vit(args.arch, image_size=14 * math.isqrt(state["pos_embed"].shape[1] - 1))
    backbone.load_state_dict(state, assign=True)
    return backbone.eval()


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


# --- going on ---------------------------------------------------------------------------------------------------------


def resume(model, optimizer, args, global_batch, say):
    """Where the run stands: {"step": steps done, "skips", "best", "global_batch"}; model and optimiser filled if it goes on."""
    progress = {"step": 0, "skips": 0, "best": -math.inf, "global_batch": global_batch}
    path = run_file(args)
    if path is None:
        return progress
    state = read_run(path)
    say(*check_same_run(state["args"], args, path), sep="\n", end="")
    load_checkpoint(path, model, optimizer, state)
    progress |= {key: state[key] for key in ("step", "skips", "best")}
    if progress["step"] > args.steps:
        raise SystemExit(f"{path} has already done {progress['step']} steps, more than --steps {args.steps}")
    say(f"going on from {path} after step {progress['step']} of {args.steps}")
    old = make_schedules(argparse.Namespace(**state["args"]), state["global_batch"])
    say(*schedule_changes(old, make_schedules(args, global_batch), progress["step"]), sep="\n", end="")
    return progress


def run_file(args):
    """The file from which this run goes on, or None if it begins anew."""
    last = pathlib.Path(args.out) / "last.pt"
    if args.resume == "no" or args.resume == "auto" and not last.exists():
        return None
    return last if args.resume == "auto" else pathlib.Path(args.resume)


def stored_size(args):
    """Side in pixels of the position embedding of the run that goes on; None if it begins anew."""
    path = run_file(args)
    return path and 14 * math.isqrt(read_run(path)["student"]["backbone.pos_embed"].shape[1] - 1)


def read_run(path):
    try:
        state = vit.read_checkpoint(path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--resume: {error}") from error
    if not isinstance(state, dict) or state.get("format") != "endodino-run-1":
        raise SystemExit(f"--resume: {path} is not a last.pt of pretrain.py; --init takes backbones")
    return state


def fill(tensor, value):
    """Copy a whole CPU tensor into a tensor or into the shards of one."""
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
    tensor.copy_(value)


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


def plain(args):
    """Arguments as JSON reads them back: tuples become lists."""
    return json.loads(json.dumps(vars(args)))


def check_same_run(saved, args, path):
    """Refuse to go on with arguments that contradict the checkpoint's; lines to print about a difference that is allowed.

    The number type is what the matrix products were computed in; with the same --precision auto it may be another one on
    another machine."""
    now = plain(args)
    same_type = saved.get("number_type") == now["number_type"]
    may_change = MAY_CHANGE | {"number_type"} | ({"precision"} if same_type else set())
    differ = [f"  {k}: {saved.get(k)} in the checkpoint, {now.get(k)} asked for" for k in sorted(saved.keys() | now.keys())
              if k not in may_change and saved.get(k) != now.get(k)]
    if differ:
        raise SystemExit(f"{path} was made with other arguments; give the same ones, another --out, or --resume no:\n" + "\n".join(differ))
    if same_type or "number_type" not in saved:
        return []
    return [f"matrix products were in {saved['number_type']} until now; --precision auto chooses {now['number_type']} here\n"]


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
