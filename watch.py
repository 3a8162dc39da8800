"""Watching a run: its log and progress bar, warnings when it looks unwell, and the online probe.

    log = Log(out, args, progress, world, rank, trouble)
    log.step(step, terms, norms, now, model)     # a line of log.jsonl, where one is due
    metrics = probe(model, args, labelled, progress, device, trouble)      # best.pt

All processes call the same; process 0 writes. What goes wrong is told to `trouble`, the run's
list of sentences.
"""
import contextlib
import json
import math
import pathlib
import signal
import time

import torch
from tqdm import tqdm

import data
import dino_loss as losses
import synthetic
import vit
from checkpoint import cut_log, digest, on_rank_0, plain, plain_teacher, writing

OVERFLOWS = 10  # steps in a row, each at half the scale of the one before, after which a run ends

# --- is it well? -------------------------------------------------------------------------------


def healthy_cross_entropies(n_prototypes, bottleneck, temp, student_temp=0.1, draws=32):
    """Between which values a new network's cross-entropy lies, in nats per pair: (low, high),
    each with four deviations over the draw of the prototypes. low: the student says what the
    teacher says; high: they have nothing in common.

    Logits are cosines in `bottleneck` dimensions, so z is nearly normal with deviation
    bottleneck^-1/2. On average over z the cross-entropy is a little over ln K. A teacher that is
    not centred yet puts its weight softmax(z / temp) on the largest z; crops of one image are
    alike to a new network, so there the student's z is large as well."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(draws, n_prototypes, generator=generator) / math.sqrt(bottleneck)
    surprise = -(z / student_temp).log_softmax(1)                              # (draws, K)
    alike = ((z / temp).softmax(1) * surprise).sum(1)                          # (draws,)
    unrelated = surprise.mean(1)                                               # (draws,)
    return (float(alike.mean() - 4 * alike.std()),
            float(unrelated.mean() + 4 * unrelated.std()))


def initial_loss_report(terms, args, temp):
    """At the start student and teacher know nothing: every cross-entropy is near ln K, and how
    near can be computed."""
    pairs = 2 + 2 * args.local_crops
    share = {"dino_local": 2 * args.local_crops / pairs, "dino_global": 2 / pairs,
             "ibot": 0.5}  # half of the images hide something
    text, well = "first step:", True
    for name, part in share.items():
        bottleneck = 256 if name == "ibot" and args.separate_heads else args.bottleneck
        low, high = healthy_cross_entropies(args.prototypes, bottleneck, temp)
        text += f" {name} {terms[name]:.3f} (healthy {part * low:.3f} to {part * high:.3f}),"
        well &= 0.95 * low < terms[name] / part < 1.05 * high
    text += f" koleo {terms['koleo']:.3f}"
    if not well:
        text += ("\nWARNING: a loss is more than 5 % outside; expected only when --init brings "
                 "trained heads")
    return text


def collapse_warnings(stats, n_prototypes, rows):
    """Sentences about the teacher's plain softmax (losses.collapse_stats) that call for a look;
    empty when all is well."""
    warnings = []
    if stats["kl_to_uniform"] < 0.01 * math.log(n_prototypes):
        warnings.append("the teacher's output is uniform over the prototypes: lower "
                        "--teacher-temp or raise --lr (more in docs/help.md)")
    if rows >= 8 and stats["entropy_of_mean"] < 0.1 * math.log(min(rows, n_prototypes)):
        warnings.append("every frame falls on the same prototypes: use --centering sinkhorn, a "
                        "larger --batch or a lower --lr")
    if rows >= 8 and stats["prototypes_used"] <= max(1, rows // 32):
        warnings.append(f"{stats['prototypes_used']} prototypes serve all {rows} crops: use a "
                        "larger --batch or a lower --lr")
    return warnings


# --- the log -----------------------------------------------------------------------------------


class Log:
    """log.jsonl and the progress bar, on rank 0; warns of a run that looks unwell. On resuming,
    what will be made again is cut."""

    def __init__(self, out, args, progress, world, rank, trouble):
        self.args, self.world, self.rank, self.trouble = args, world, rank, trouble
        self.warned, self.greeted, self.losses = set(), progress["step"] > 0, []
        self.images = self.wait = 0.0
        self.clock = time.perf_counter()
        on_rank_0(lambda: self.open(out, progress["step"]))
        seen, left = progress["seen"], (args.steps - progress["step"]) * args.batch * world
        self.bar = tqdm(total=seen + left, initial=seen, unit="img", disable=rank != 0)

    def open(self, out, start):
        with writing(out / "log.jsonl"):
            cut_log(out / "log.jsonl", start)
            (out / "args.json").write_text(json.dumps(plain(self.args), indent=1) + "\n")
            self.file = open(out / "log.jsonl", "a", buffering=1)

    @contextlib.contextmanager
    def waiting(self):
        """What is done in it counts as waiting for frames."""
        began = time.perf_counter()
        yield
        self.wait += time.perf_counter() - began

    def due(self, step):
        """Whether this step gets a line; until one was finite, any may be the first."""
        return step % self.args.log_every == 0 or not self.greeted

    def step(self, step, terms, norms, now, model, scaler=None):
        """A step that counts. Its line, where one is due, has the means over all processes."""
        args, n = self.args, self.args.batch * self.world
        self.images += n
        self.bar.update(n)
        if not self.due(step):
            return
        means = losses.all_reduce(torch.stack(list(terms.values()))) / self.world
        terms = dict(zip(terms, means.tolist()))
        stats = losses.collapse_stats(model.teacher_logits, float(now["temp"]))
        seconds = time.perf_counter() - self.clock
        line = {"step": step, **terms, **{k: float(v) for k, v in now.items()}}
        line |= {f"grad_norm_{k}": float(v) for k, v in norms.items()} | stats
        if scaler and scaler.is_enabled():
            line["loss_scale"] = scaler.get_scale()
        rates = {"images_per_s": self.images / seconds, "input_wait": self.wait / seconds}
        self.write(line | rates)
        self.images, self.wait, self.clock = 0, 0.0, time.perf_counter()
        self.losses.append(terms["loss"])
        self.bar.set_postfix_str(f"step {step} loss {terms['loss']:.3f}")
        if not self.greeted:  # the first step that counts: in float16 the very first may overflow
            self.say(initial_loss_report(terms, args, float(now["temp"])))
            self.greeted = True
        if step >= max(100, args.warmup * args.steps):  # every run starts uniform
            for sentence in collapse_warnings(stats, args.prototypes, len(model.teacher_logits)):
                if sentence not in self.warned:
                    self.say(f"WARNING, step {step}: {sentence}")
                    self.warned.add(sentence)

    def overflow(self, step, in_a_row, scaler):
        """A step whose gradients were too large for float16 at this scale; the next is smaller."""
        self.images += self.args.batch * self.world
        self.bar.update(self.args.batch * self.world)
        self.write({"step": step, "overflows": in_a_row, "loss_scale": scaler.get_scale()})
        if in_a_row == OVERFLOWS:
            self.trouble.append(f"step {step}: gradients were not finite for ten steps in a row, "
                                f"down to a loss scale of {scaler.get_scale():g}: lower --lr, or use "
                                "--precision bf16 or fp32")

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def write(self, line):
        if self.rank == 0:
            try:
                with writing(self.file.name):
                    self.file.write(json.dumps(line) + "\n")
            except SystemExit as end:
                self.trouble.append(end.code)

    def close(self):
        self.bar.close()
        if self.rank == 0:
            with contextlib.suppress(OSError):  # a line that could not be written
                self.file.close()


# --- the online probe --------------------------------------------------------------------------


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


def measured_on(args, labelled):
    """What the probe's scores belong to: its task and the names of its frames."""
    return labelled and [args.probe_task, digest("\n".join(labelled.paths).encode())]


def probe(model, args, labelled, progress, device, trouble):
    """Score the teacher on labelled frames, keep the best one and its score in `progress`; returns
    the metrics. Process 0 works, the others wait; what goes wrong is told to `trouble`."""
    import probe_mes  # lazily: training without a probe does not need it
    backbone, path = plain_teacher(model, args), pathlib.Path(args.out) / "best.pt"
    step, best = progress["step"], progress["best"]

    def score():
        name = "kappa" if args.probe_task == "mes" else "macro_f1"
        try:
            dtype = vit.PRECISIONS[args.number_type]
            metrics = probe_mes.online_score(backbone.to(device), labelled, device, dtype=dtype)
            numbers = ", ".join(f"{k} {v:.3f}" for k, v in metrics.items())
            before = f"best {name} so far {best:.3f}" if best > -math.inf else f"the first {name}"
            tqdm.write(f"step {step}: {numbers} ({before})")
            if metrics[name] > best:
                with writing(path):
                    vit.save_backbone(path, backbone, args.arch, step, plain(args), metrics)
            return metrics, max(best, metrics[name])
        except (OSError, ValueError) as error:
            trouble.append(f"the probe after step {step}: {error}")
        except SystemExit as end:
            trouble.append(end.code)
        return None, best
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # the workers of the probe inherit this
    try:
        metrics, progress["best"] = on_rank_0(score)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    return metrics
