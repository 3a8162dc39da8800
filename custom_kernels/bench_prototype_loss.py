"""Sinkhorn-Knopp and the prototype losses: compared with DINOv2's own form, then timed.

`python bench.py loss` and `python bench.py sinkhorn` run it.
"""
import argparse
import os

import torch
import torch.nn.functional as F

import dino_loss
from custom_kernels import prototype_loss
from custom_kernels.timing import peak_bytes, seconds, table


def parser(what):
    return argparse.ArgumentParser(prog=f"bench.py {what}",
                                   formatter_class=argparse.ArgumentDefaultsHelpFormatter)


def unit_rows(*shape, generator):
    """(*shape, 256): products of two of them are cosines, as the head's logits."""
    rows = torch.randn(*shape, 256, device=generator.device, generator=generator)
    return F.normalize(rows, dim=-1)


def difference(a, b):
    return ((a - b).float().norm() / b.float().norm()).item()


# --- as DINOv2 writes it ----------------------------------------------------------------------


def textbook_sinkhorn(logits, temp):
    """DINOv2's loop, its divisions in place: two sums over the matrix and two divisions of it
    per iteration."""
    q = torch.exp(logits.float() / temp).t()
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= q.shape[0]
        q /= q.sum(0, keepdim=True)
        q /= q.shape[1]
    q *= q.shape[1]
    return q.t()


def textbook_losses(student, teacher, masks, temp):
    """DINOv2's form of the three cross-entropies: targets stored, one product and sum per pair
    of crops. student: logits of global and local crops and of patches; teacher: of global and
    patches."""
    def entropy(target, s):
        return -(target * s).sum(-1)

    across, local, patches = (torch.log_softmax(x.float() / 0.1, dim=-1) for x in student)
    targets = textbook_sinkhorn(teacher[0].flatten(0, 1), temp).view(teacher[0].shape)
    crops = [entropy(target, s).mean() for s in local for target in targets]
    crops += [entropy(target, s).mean() for target, s in zip(targets.flip(0), across)]
    weight = (1 / masks.sum(1).clamp(min=1)).unsqueeze(1).expand_as(masks)[masks]        # (M,)
    patch = (entropy(textbook_sinkhorn(teacher[1], temp), patches) * weight).sum() / len(masks)
    return sum(crops) / len(crops) + patch


def our_losses(student, teacher, masks, temp, kernels):
    os.environ["ENDODINO_PROTOTYPE_LOSS"] = "triton" if kernels else "torch"
    targets, patch_targets = (dino_loss.teacher_targets(x, temp) for x in teacher)
    crops = dino_loss.dino_loss(*student[:2], targets)
    return sum(crops) + dino_loss.ibot_loss(student[2], patch_targets, masks)


# --- the loss head ----------------------------------------------------------------------------


def loss(argv):
    cuda = torch.cuda.is_available()
    flags = parser("loss")
    flags.add_argument("--batch", type=int, default=64 if cuda else 4,
                       help="frames; the rows of logits follow, for ViT-S, B and L alike")
    flags.add_argument("--prototypes", type=int, nargs="+", default=[65536, 131072],
                       help="K of the shared and of separate heads")
    flags.add_argument("--dtype", choices=["float32", "float16"], default="float32", help="logits'")
    flags.add_argument("--runs", type=int, default=20 if cuda else 3, help="timed calls")
    args = flags.parse_args(argv)
    B, rows, device = args.batch, [], "cuda" if cuda else "cpu"
    for K in args.prototypes:
        found, rate = loss_rows(B, K, getattr(torch, args.dtype), device, args.runs)
        rows += found
    table(f"Loss head, batch {B}: {10 * B} student and {2 * B} teacher class tokens, {77 * B} "
          f"patches, {args.dtype} logits; a copy moves {rate / 1e9:.1f} GB/s",
          ["K", "form", "ms", "times faster", "useful GB/s", "of the copy rate", "peak MiB",
           "of the textbook's", "difference"], rows)
    print("\nUseful bytes: 7 reads of the teacher's logits, 2 reads of the student's and one write "
          "of their gradient, whatever a form moves. The rows are those of ViT-S, B and L alike: "
          "heads see tokens, not widths.")
    if not cuda:
        print("On a CPU pretrain.py runs (b); the kernels (c) need a GPU, and the batch is small so "
              "that this ends soon.")


def loss_rows(B, K, dtype, device, n_runs):
    """Lines of the table for one K, and the bytes per second of a copy."""
    generator = torch.Generator(device).manual_seed(0)
    masks = torch.zeros(2 * B, 256, dtype=torch.bool, device=device)
    masks[:B, :77] = True  # DINOv2 hides 30 % of the patches of half the crops
    prototypes = unit_rows(K, generator=generator)

    def logits(*shape):
        return (unit_rows(*shape, generator=generator) @ prototypes.T).to(dtype)

    # global crops, local crops, masked patches
    student = [logits(*shape).requires_grad_() for shape in ((2, B), (8, B), (77 * B,))]
    teacher = logits(2, B), logits(77 * B)
    del prototypes

    def gradients(losses, **kwargs):
        value = losses(student, teacher, masks, 0.05, **kwargs)
        return value.detach(), *torch.autograd.grad(value, student)

    first = "(a) textbook, as DINOv2 writes it"
    forms = {first: lambda: gradients(textbook_losses),
             "(b) scaling vectors, plain PyTorch": lambda: gradients(our_losses, kernels=False)}
    if device == "cuda":
        fused = "(c) Triton kernels, targets never stored"
        forms[fused] = lambda: gradients(our_losses, kernels=True)
    worst = {name: max(map(difference, form(), forms[first]())) for name, form in forms.items()}
    source, copy = student[2].detach(), torch.empty_like(student[2])
    times = seconds(forms | {"copy": lambda: copy.copy_(source)}, n_runs)
    rate = 2 * copy.nbytes / times.pop("copy")
    del copy
    peaks = {name: peak_bytes(form) for name, form in forms.items()}
    # teacher: 5 passes of Sinkhorn, forward, backward; student: forward, backward, gradient
    # written
    moved = 7 * sum(x.nbytes for x in teacher) + 3 * sum(x.nbytes for x in student)
    rows = []
    for name, t in times.items():
        speed = f"{times[first] / t:.2f}", f"{moved / t / 1e9:.1f}", f"{moved / t / rate:.0%}"
        memory = f"{peaks[name] / 2**20:.0f}", f"{peaks[name] / peaks[first]:.0%}"
        rows.append([f"{K:,}", name, f"{t * 1e3:.1f}", *speed, *memory, f"{worst[name]:.0e}"])
    return rows, rate


# --- Sinkhorn-Knopp alone ---------------------------------------------------------------------


def sinkhorn(argv):
    flags = parser("sinkhorn")
    flags.add_argument("--rows", type=int, default=640, help="teacher rows")
    flags.add_argument("--prototypes", type=int, default=65536, help="K")
    flags.add_argument("--runs", type=int, default=7, help="timed calls of each candidate")
    args = flags.parse_args(argv)
    generator = torch.Generator("cuda" if torch.cuda.is_available() else "cpu").manual_seed(0)
    x, prototypes = (unit_rows(n, generator=generator) for n in (args.rows, args.prototypes))
    logits, temp, first = x @ prototypes.T, 0.05, "textbook loop, in place"

    def by_logarithms():
        return torch.softmax(logits / temp + prototype_loss.sinkhorn_bias(logits, temp), 1)

    forms = {first: lambda: textbook_sinkhorn(logits, temp),
             "scaling vectors": lambda: dino_loss.sinkhorn(logits, temp),
             "bias: logarithms, for ranges too wide for exp": by_logarithms}
    exact = forms[first]()
    differences = {name: difference(form(), exact) for name, form in forms.items()}
    times = seconds(forms, args.runs)
    peaks = {name: f"{peak_bytes(form) / 2**20:.0f}" for name, form in forms.items()}
    rows = [[name, f"{t * 1e3:.1f}", f"{times[first] / t:.2f}", peaks[name], f"{differences[name]:.1e}"]
            for name, t in times.items()]
    table(f"Sinkhorn-Knopp, {args.rows} x {args.prototypes}, 3 iterations, temperature {temp}",
          ["form", "ms", "times faster", "peak MiB", "relative difference"], rows)
