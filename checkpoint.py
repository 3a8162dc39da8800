"""Stop and go on: the run folder and its lock, the checkpoint of a run (last.pt), what may
change between it and the run that goes on, and the exports.

One file whatever the number of processes and shards, written whole or not at all beside the
training, and read as tensors and plain values. Process 0 alone decides, reads and writes; the
others need not see its disk.
"""
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import pathlib
import shutil
import threading
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm import tqdm

import vit
from dino import make_schedules

MAY_CHANGE = {  # arguments that may differ between a checkpoint and the run that goes on from it
    "steps", "batch", "data", "frames", "out", "resume", "init", "workers", "threads", "device",
    "compile", "shard", "checkpoint_activations", "save_every", "export_every", "log_every",
    "max_skips", "probe_every", "probe_data", "probe_task", "verbose"}
ANY_MACHINE = {"data", "frames", "out", "init", "workers", "threads"}  # between processes
OF_A_RUN = ("args.json", "log.jsonl", "last.pt", "best.pt", "teacher_*.pt", "nonfinite_*.pt")


# --- all processes, one verdict ----------------------------------------------------------------


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def gather(value):
    """[value of process 0, value of process 1, ...] in every process."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


def together(work):
    """work()'s result, in each process its own; where one ends with a sentence all do, and
    process 0 prints it."""
    result = sentence = None
    try:
        result = work()
    except SystemExit as end:
        sentence = end.code
    ends = [end for end in gather(sentence) if end is not None]
    if ends:
        raise SystemExit(ends[0] if rank() == 0 else 1)
    return result


def on_rank_0(work):
    """The result of work() in process 0, for all; where it ends with a sentence, all end."""
    shared = [together(lambda: work() if rank() == 0 else None)]
    if dist.is_initialized():
        dist.broadcast_object_list(shared, src=0)
    return shared[0]


def anywhere(*flags):
    """For each flag whether it holds in any process. The processors agree among themselves: a
    GPU would answer after all that it has still to do."""
    flags = torch.tensor([float(bool(flag)) for flag in flags])
    if dist.is_initialized():
        dist.all_reduce(flags)
    return (flags > 0).tolist()


def check_agreement(args, model):
    """End with one sentence where processes have different frames, arguments or first weights:
    they would hang, or learn nonsense together."""
    small = [t.float().flatten() for t in model.state_dict().values() if t.numel() <= 65536]
    mine = {f"--{k.replace('_', '-')}": v for k, v in plain(args).items() if k not in ANY_MACHINE}
    mine |= {"--data": f"{mine.pop('--n-frames')} frames, names {mine.pop('--frame-names')}",
             "first weights (--init)": digest(torch.cat(small).cpu().numpy())}
    everyone = gather(mine)
    for number, other in enumerate(everyone):
        for what, first in everyone[0].items():
            if other[what] != first:
                sentence = (f"process {number} differs from process 0 in its {what}: "
                            f"{other[what]} instead of {first}; give all processes the same")
                raise SystemExit(sentence if rank() == 0 else 1)


def digest(*arrays):
    """A short name for the contents of arrays or bytes."""
    found = hashlib.blake2b(digest_size=8)
    for array in arrays:
        found.update(array)
    return found.hexdigest()


# --- the run folder ----------------------------------------------------------------------------


@contextlib.contextmanager
def run_folder(args):
    """--out, to which no other process writes meanwhile; leavings of killed runs are gone. With
    --resume no an older run in it is moved aside."""
    out = pathlib.Path(args.out)
    with contextlib.ExitStack() as held:
        on_rank_0(lambda: take_folder(out, args, held))
        yield out


def take_folder(out, args, held):
    import fcntl  # here, as Windows has none and should still read --help
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context(open(out / ".lock", "w"))
    except OSError as error:
        raise SystemExit(f"--out {out} cannot be written: {error.strerror}; choose another folder"
                         ) from error
    try:  # unlike flock's, this lock is not inherited by workers, who may outlive their trainer
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise SystemExit(f"another process is writing to {out}: wait for it, end it, or give "
                         "another --out") from error
    except OSError as error:
        print(f"{out} cannot be locked ({error.strerror}): see to it that no other run writes there")
    for leaving in out.glob(".*.tmp*"):
        leaving.unlink()
    if args.resume == "no":
        move_aside(out)


def move_aside(out):
    """Put the files of an older run into a folder of their own."""
    old = [file for pattern in OF_A_RUN for file in out.glob(pattern)]
    if old:
        names = (out / f"old-{n}" for n in itertools.count(1))
        aside = next(folder for folder in names if not folder.exists())
        aside.mkdir()
        for file in old:
            file.rename(aside / file.name)
        print(f"--resume no: the run that was in {out} is in {aside} now")


def check_room(args, model):
    """Fail before the first step, not at a later save, when the run folder cannot take what the
    run will write. Counted, and not tried: a trial of that size would itself take minutes."""
    out = pathlib.Path(args.out)
    state = 16 * sum(p.numel() for p in model.student.parameters())  # with teacher, two moments
    export = 4 * sum(p.numel() for p in model.student["backbone"].parameters())
    files = math.ceil(args.steps / (args.export_every or args.steps)) + bool(args.probe_every)
    there = [p for p in out.glob("teacher_*.pt") if p.stem.removeprefix("teacher_").isdigit()]
    files -= len(there) + (out / "best.pt").exists()  # a teacher's heads lie beside it
    twice = not (out / "last.pt").exists()  # the old one stays until the new one is whole
    need = max(0, files) * export + (1 + twice) * state
    trial = out / f".trial.tmp{os.getpid()}"
    try:
        trial.write_bytes(bytes(4096))
        free = shutil.disk_usage(out).free
    except OSError as error:
        raise SystemExit(f"--out {out} cannot be written: {error.strerror}; choose another folder"
                         ) from error
    finally:
        trial.unlink(missing_ok=True)
    if free < need:
        raise SystemExit(
            f"--out {out} lacks {readable(need - free)}: {readable(free)} are free and the run will "
            f"write {readable(need)}, last.pt of {readable(state)}, twice while it is replaced, "
            "and backbones of "
            f"{readable(export)}; make room, raise --export-every or choose another folder")


def readable(size):
    """A number of bytes in words."""
    unit = min(4, int(math.log(max(size, 1), 1024)))
    name = ("bytes", "KiB", "MiB", "GiB", "TiB")[unit]
    return f"{size / 1024**unit:.{1 if unit else 0}f} {name}"


# --- saving ------------------------------------------------------------------------------------


def whole(state):
    """Copies on the CPU of a state dict's tensors, every shard gathered, in process 0. The
    others, who must call it too, help to gather and keep nothing: eight on a machine would hold it
    eight times."""
    copies = {}
    for name, tensor in state.items():
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
        if rank() == 0:
            copies[name] = tensor.to("cpu", copy=True)
    return copies


def snapshot(model, optimizer, progress, args):
    """Everything needed to go on, in process 0: {"format", "student", "teacher", "centers",
    "optimizer": {parameter: {"step", "exp_avg", "exp_avg_sq"}}, "args", **progress}. All must
    call it. The teacher stands in it as in a DINOv2 training checkpoint: load_backbone reads it."""
    moments = {name: optimizer.state[p] for name, p in model.student.named_parameters()
               if p in optimizer.state}
    return {"format": "endodino-run-1", "args": plain(args), **progress,
            "student": whole(model.student.state_dict()),
            "teacher": whole(model.teacher.state_dict()),
            "centers": whole({"dino": model.dino_center, "ibot": model.ibot_center}),
            "optimizer": {name: whole(state) for name, state in moments.items()}}


def plain_teacher(model, args):
    """The teacher's backbone, whole and on the CPU, in process 0; all must call it."""
    state = whole(model.teacher["backbone"].state_dict())
    if rank():
        return None
    side = math.isqrt(state["pos_embed"].shape[1] - 1)  # patches, as at the beginning
    with torch.device("meta"):
        backbone = vit.build_vit(args.arch, image_size=14 * side)
    backbone.load_state_dict(state, assign=True)
    return backbone.eval()


@contextlib.contextmanager
def writing(path):
    try:
        yield
    except OSError as error:
        raise SystemExit(f"cannot write {path}: {error.strerror or error}; what lay there before "
                         "is untouched") from error


class Saver:
    """Writes last.pt and the exports beside the training, from copies in memory, one file at a
    time. All processes call the same methods; process 0 writes. What goes wrong is told to
    `trouble`, the run's list of sentences."""

    def __init__(self, args, step, trouble):
        self.args, self.out, self.trouble = args, pathlib.Path(args.out), trouble
        self.saved, self.clock = step, time.monotonic()  # of the newest last.pt
        self.thread, self.failed = None, False

    def due(self, step):
        """Whether to write last.pt after `step` steps; process 0, whose clock counts, knows."""
        every = self.args.save_every
        if rank() or step == self.saved:
            return False
        if isinstance(every, int):
            return step % every == 0
        busy = self.thread is not None and self.thread.is_alive()
        return not busy and time.monotonic() - self.clock >= 60 * float(every[:-1])

    def save(self, model, optimizer, progress):
        if progress["step"] == self.saved:
            return
        self.wait()  # before there is another copy
        self.saved, self.clock, path = progress["step"], time.monotonic(), self.out / "last.pt"
        state = snapshot(model, optimizer, progress, self.args)
        self.write(path, lambda: vit.atomic_save(state, path))

    def export(self, model, step):
        """The teacher's backbone in our format, as teacher_<step>.pt."""
        args, path = self.args, self.out / f"teacher_{step}.pt"
        backbone = plain_teacher(model, args)
        self.write(path, lambda: vit.save_backbone(path, backbone, args.arch, step, plain(args)))

    def write(self, path, save):
        """save() in a thread of process 0, once the file before is written. After a failure
        nothing more is written."""
        if rank():
            return
        self.wait()
        if not self.failed:
            self.thread = threading.Thread(target=self.attempt, args=(path, save))
            self.thread.start()

    def attempt(self, path, save):
        try:
            with writing(path):
                save()
        except BaseException as error:  # in a thread it would go unnoticed
            self.failed = True
            self.trouble.append(str(error))

    def wait(self):
        if self.thread:
            self.thread.join()


def keep_nonfinite(model, optimizer, progress, args, terms, norms, paths, trouble):
    """Keep what is needed to look at a step that was not finite and not applied, of the last such
    step alone. Counts the step in progress; returns whether there were too many (and tells
    `trouble`), in all processes alike."""
    step, path = progress["step"], pathlib.Path(args.out) / f"nonfinite_{progress['step']}.pt"
    found = {**terms, **{f"grad_norm_{name}": norm for name, norm in norms.items()}}
    found = {name: float(value) for name, value in found.items()}
    more = {"frames": gather(paths), "found": found}
    state = snapshot(model, optimizer, progress | more, args)

    def write():
        with writing(path):
            vit.atomic_save(state, path)
            for older in set(path.parent.glob("nonfinite_*.pt")) - {path}:
                older.unlink()
    on_rank_0(write)
    bad = ", ".join(f"{name} {x:g}" for name, x in found.items() if not math.isfinite(x))
    message = (f"step {step}: not finite ({bad}); the step was not applied; its frames and the "
               f"state before it are in {path}")
    if progress["skips"] >= args.max_skips:
        trouble.append(message + "; look at the frames, lower --lr, or raise --max-skips")
        return True
    progress["skips"] += 1
    if rank() == 0:
        tqdm.write(message + f"; skipped ({progress['skips']} of at most {args.max_skips})")
    return False


# --- going on ----------------------------------------------------------------------------------


def resume(model, optimizer, args, global_batch, say, defaults=None):
    """Where the run stands: {"step": steps done, "seen": frames seen, "skips", "overflows": in a
    row, "scaler": its state, "best", "probe": what `best` was measured on, "global_batch"}; model
    and optimiser are filled if it goes on. Process 0 decides and reads. defaults: of flags that
    the file may be too old to have."""
    begin = {"step": 0, "seen": 0, "skips": 0, "overflows": 0, "scaler": {}, "best": -math.inf,
             "probe": None}
    state = {}  # the file's contents, in process 0

    def read():
        path = run_file(args)
        if path is None:
            return begin, None
        state.update(read_run(path))
        state["args"] = json.loads(json.dumps(defaults or {})) | state["args"]
        say(*check_same_run(state["args"], args, path), sep="\n", end="")
        for part in ("student", "teacher"):
            vit.check_same_tensors(getattr(model, part).state_dict(), state[part], path)
        if state["step"] > args.steps:
            raise SystemExit(f"{path} has already done {state['step']} steps, more than --steps "
                             f"{args.steps}")
        say(f"going on from {path} after step {state['step']} of {args.steps}")
        before = make_schedules(argparse.Namespace(**state["args"]), state["global_batch"])
        now = make_schedules(args, global_batch)
        say(*schedule_changes(before, now, state["step"]), sep="\n", end="")
        state.setdefault("seen", state["step"] * state["global_batch"])  # files of older versions
        return ({key: state.get(key, value) for key, value in begin.items()},
                {name: list(moments) for name, moments in state["optimizer"].items()})
    progress, moments = on_rank_0(read)
    if moments is not None:
        load_checkpoint(model, optimizer, state, moments)
    return {**progress, "global_batch": global_batch}


def run_file(args):
    """The file from which this run goes on, or None if it begins anew."""
    last = pathlib.Path(args.out) / "last.pt"
    if args.resume == "no" or args.resume == "auto" and not last.exists():
        return None
    path = last if args.resume == "auto" else pathlib.Path(args.resume)
    if last.exists() and path.parent.resolve() != last.parent.resolve():
        raise SystemExit(f"--resume {path}: another run is in {last.parent}, whose last.pt would "
                         "be lost; give another --out, or --resume auto to go on with that one")
    return path


def stored_size(args):
    """Side in pixels of the position embedding of the run that goes on, None for a new one."""
    def read():
        path = run_file(args)
        if path is None:
            return None
        return 14 * math.isqrt(read_run(path)["student"]["backbone.pos_embed"].shape[1] - 1)
    return on_rank_0(read)


def read_run(path):
    try:
        state = vit.read_checkpoint(path, mmap=True)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--resume: {error}") from error
    if not isinstance(state, dict) or state.get("format") != "endodino-run-1":
        raise SystemExit(f"--resume: {path} is not a last.pt of pretrain.py; backbones are for --init")
    return state


@torch.no_grad()
def load_checkpoint(model, optimizer, state, moments):
    """Fill model and optimiser in every process from a checkpoint's contents, which process 0
    has; the others' are {}. moments: {parameter: names of its tensors in the optimiser}."""
    def at(*keys):
        return functools.reduce(operator.getitem, keys, state) if state else None
    for part in ("student", "teacher"):
        for name, tensor in getattr(model, part).state_dict().items():
            fill(tensor, at(part, name))
    fill(model.dino_center, at("centers", "dino"))
    fill(model.ibot_center, at("centers", "ibot"))
    for name, p in model.student.named_parameters():
        for key in moments.get(name, ()):
            tensor = torch.zeros((), device=p.device) if key == "step" else torch.zeros_like(p)
            fill(tensor, at("optimizer", name, key))
            optimizer.state[p][key] = tensor


def fill(tensor, value):
    """Give a tensor, or the shards of one, the whole CPU tensor `value` of process 0."""
    if isinstance(tensor, DTensor):
        like = dict(device=tensor.device, dtype=tensor.dtype)
        value = torch.empty(tensor.shape, **like) if value is None else value.to(**like)
        tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements))
        return  # of the values that were distributed process 0's count
    if value is not None:
        tensor.copy_(value)
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)


def plain(args):
    """Arguments as JSON reads them back: tuples become lists."""
    return json.loads(json.dumps(vars(args)))


def check_same_run(saved, args, path):
    """Refuse to go on with arguments that contradict the checkpoint's; lines to print about a
    difference that is allowed.

    The number type is what the matrix products were computed in; with the same --precision auto
    it may be another one on another machine."""
    now = plain(args)
    known = saved.get("frame_names")  # not in files of older versions
    if known and known != now["frame_names"] and saved["n_frames"] == now["n_frames"]:
        raise SystemExit(
            f"{path} was trained on {now['n_frames']} frames and so many are here, but of other "
            "names; give the same --data and --frames, or another --out and its weights as --init")
    same_type = saved.get("number_type") == now["number_type"]
    may_change = MAY_CHANGE | {"frame_names", "number_type"}
    may_change |= {"precision"} if same_type else set()
    differ = [f"  {name}: {saved.get(name)} in the checkpoint, {now.get(name)} asked for"
              for name in sorted(saved.keys() | now.keys())
              if name not in may_change and saved.get(name) != now.get(name)]
    if differ:
        raise SystemExit(f"{path} was made with other arguments; give the same ones, another "
                         "--out, or --resume no:\n" + "\n".join(differ))
    if same_type or "number_type" not in saved:
        return []
    return [f"matrix products were in {saved['number_type']} until now; --precision auto "
            f"chooses {now['number_type']} here\n"]


def schedule_changes(old, new, step):
    """How a resumed run's schedules move with --steps or the global batch: lines to print."""
    if len(old["lr"]) == len(new["lr"]) and np.array_equal(old["lr"], new["lr"]):
        return []
    at = [min(step, len(s["lr"]) - 1) for s in (old, new)]
    return [f"schedules stretched from {len(old['lr'])} to {len(new['lr'])} steps; at step {step}:",
            *(f"  {name}: {old[name][at[0]]:.4g} -> {new[name][at[1]]:.4g}" for name in new)]


def reset_best(progress, measured, say):
    """Forget the best score where it was measured on another task or on other frames."""
    if measured and progress["probe"] != measured:
        if progress["best"] > -math.inf:
            say("the probe's task or frames are others than before: best.pt begins anew")
        progress |= {"best": -math.inf, "probe": measured}


def cut_log(path, step):
    """Drop the lines of steps that will be made again, a last line that a kill tore, and lines
    that are no records."""
    if not path.exists():
        return
    lines, garbage = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            keep = line.endswith(b"\n") and json.loads(line)["step"] < step
        except (ValueError, TypeError, KeyError):
            keep, garbage = False, garbage + 1
        lines += [line] if keep else []
    if garbage:
        print(f"{path}: {garbage} lines are no records of a step and are left out")
    with vit.replacing(path) as temporary:
        temporary.write_bytes(b"".join(lines))
