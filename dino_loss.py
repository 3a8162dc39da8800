"""The losses of DINOv2: projection head, teacher targets (Sinkhorn-Knopp or centring), DINO,
iBOT and KoLeo.

    targets = teacher_targets(teacher_global, temp)                # of (2, B, K) logits
    dino_global, dino_local = dino_loss(student_global, student_local, targets)
    patch_loss = ibot_loss(student_patches, teacher_targets(teacher_patches, temp), masks)

Logits are the head's output, (n, K) for K prototypes: how much a token looks like each of K
learnt directions. The student is taught to answer as the teacher does, from another crop of the
same frame (DINO) or from a frame with holes (iBOT). All is computed in float32, also under
autocast.

B images, L local crops, M masked patches. A process group, where there is one, widens the batch
that the teacher's normalisation sees; without one nothing changes.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from custom_kernels import all_reduce, prototype_loss


class DINOHead(nn.Module):
    """Three-layer MLP to a bottleneck on the unit sphere, then one weight-normalised linear map
    to the prototypes.

    (..., in_dim) -> (..., K) float32 logits. With sizes, the rows of consecutive groups in x
    (n, in_dim), a tuple of each group's logits: their gradients, the largest tensors of a step,
    are then never copied together. Both factors of weight norm are trained and decayed, as
    DINOv2 does (DINO froze the magnitude); the directions keep PyTorch's default
    initialisation."""

    def __init__(self, in_dim, n_prototypes, hidden_dim=2048, bottleneck_dim=256, n_layers=3):
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (n_layers - 1) + [bottleneck_dim]
        layers = [nn.Linear(widths[0], widths[1])]
        for n_in, n_out in zip(widths[1:], widths[2:]):
            layers += [nn.GELU(), nn.Linear(n_in, n_out)]
        self.mlp = nn.Sequential(*layers)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck_dim, n_prototypes)

    def forward(self, x, sizes=None):
        x = self.mlp(x)                                          # (..., bottleneck)
        # Not in 16 bits: the teacher divides by 0.04, and bfloat16's rounding of a logit near 1
        # would move its probability by 5 %.
        with torch.autocast(x.device.type, enabled=False):
            # On the unit sphere a logit is a cosine: a long feature is no surer than a short
            # one.
            x = F.normalize(x.float(), dim=-1, eps=1e-12)
            weight = self.last_layer.weight()                    # (K, bottleneck)
            if sizes is None:
                return F.linear(x, weight)                       # (..., K)
            return tuple(F.linear(part, weight) for part in x.split(sizes))


class Prototypes(nn.Module):
    """y_k = g_k <v_k / |v_k|, x>: weight normalisation (Salimans, Kingma 2016), g starts at 1."""

    def __init__(self, dim, n_prototypes):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(n_prototypes, 1))
        self.weight_v = nn.Parameter(nn.Linear(dim, n_prototypes, bias=False).weight.detach())

    def weight(self):
        return torch._weight_norm(self.weight_v, self.weight_g, 0)  # (K, dim)


# --- the teacher's targets --------------------------------------------------------------------
#
# The teacher learns nothing: it is an average of past students. Left to itself the pair soon
# agrees on one answer for every image, at a loss of zero: the collapse. So the answers are
# normalised over the batch before they are taught. Sinkhorn-Knopp gives every prototype the
# same share of the batch; centring takes off what all images have in common. The low
# temperature (0.04 to 0.07, where the student has 0.1) works against the other collapse, an
# answer that is the same for all prototypes.


@torch.no_grad()
def teacher_targets(logits, temp, center=None):
    """What the losses below take as `teacher`, from its logits (..., K): Sinkhorn-Knopp over all
    rows, or centring with center (K,).

    Probabilities of the logits' shape; on a GPU instead prototype_loss.Targets, from which the
    kernels rebuild them as they read: for K = 65,536 those of a batch would be a gigabyte."""
    rows = logits.flatten(0, -2)                                 # (n, K)
    if prototype_loss.use_triton(rows):
        bias = prototype_loss.sinkhorn_bias(rows, temp) if center is None else -center / temp
        return prototype_loss.Targets(logits, bias, temp)
    targets = sinkhorn(rows, temp) if center is None else centered_softmax(rows, center, temp)
    return targets.view(logits.shape)


@torch.no_grad()
def sinkhorn(logits, temp, n_iters=3):
    """Sinkhorn-Knopp targets (Caron et al. 2020, SwAV): (n, K) logits -> (n, K) float32, rows
    sum to 1.

    Alternately every prototype (column) is scaled to the same total over the rows of all
    processes, and every row to 1: Q = diag(v) M diag(u) with M = exp(logits / temp). M is only
    ever read; the loop works on the two vectors (K,) and (n,). The number of rows may differ
    between processes, and may be 0."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    low, high = logits.aminmax() if len(logits) else logits.new_tensor([math.inf, -math.inf])
    # Of all processes: they must take the same branch, or they would wait for each other's sums.
    high, minus_low = all_reduce(torch.stack([high, -low]), "MAX")
    if (high + minus_low) / temp > 80:
        # exp(-80) is a normal float32; much below it rows or columns of M would vanish. The same
        # iteration in logarithms takes any range, and several times as long.
        lse = prototype_loss.definition_of_log_sum_exp
        bias = prototype_loss.sinkhorn_bias(logits, temp, n_iters, lse)     # (K,) log u
        return torch.softmax(logits / temp + bias, dim=1)
    m = torch.add(-high / temp, logits, alpha=1 / temp).exp_()   # (n, K), at most 1
    v = m.new_ones(len(m))                                       # (n,) row factors
    # Autocast would take the products in 16 bits: sums of 65,536 terms, wrong in the third digit.
    with torch.autocast(m.device.type, enabled=False):
        for _ in range(n_iters):
            u = 1 / all_reduce(v @ m)            # (K,) each column of diag(v) M diag(u): total 1
            v = 1 / (m @ u)                      # (n,) each row: total 1
    return m.mul_(u).mul_(v[:, None])


@torch.no_grad()
def centered_softmax(logits, center, temp):
    """DINO's targets: (n, K) logits, (K,) centre -> (n, K) float32. The centre is that of the
    steps before this one."""
    return torch.softmax((logits.float() - center) / temp, dim=-1)


@torch.no_grad()
def update_center(center, logits, momentum=0.9):
    """The running mean of the teacher's logits (n, K), over all rows of all processes: (K,) ->
    new (K,) centre.

    DINOv2 averages the processes' means for iBOT, where row counts differ; this is the mean over
    the rows themselves."""
    # (K + 1,) the sum and the number of rows together: one message, and no mean of means
    total = all_reduce(torch.cat([logits.float().sum(0), center.new_tensor([len(logits)])]))
    moved = center * momentum + total[:-1] / total[-1] * (1 - momentum)
    return torch.where(total[-1] > 0, moved, center)  # no rows anywhere: it stays; no GPU is asked


# --- the losses -------------------------------------------------------------------------------


def cross_entropy(student, teacher, temp, crops="same"):
    """-sum_k teacher_k log softmax(student / temp)_k (DINO eq. 1, 2), rows kept: (..., K) ->
    (...).

    teacher: targets as from teacher_targets. crops says which of them a student row meets: the
    "same" row; or, where the teacher saw two crops, (2, B, K), that of the "other" crop; or
    those of "both", summed."""
    if isinstance(teacher, prototype_loss.Targets):
        B = student.shape[-2]                                    # rows of each teacher crop
        shift, n_targets = {"same": (0, 1), "other": (B, 1), "both": (B, 2)}[crops]
        return prototype_loss.cross_entropy(student, teacher, temp, shift, n_targets)
    if crops == "other":
        teacher = teacher.flip(0)                                # 1 meets 2, and 2 meets 1
    elif crops == "both":
        teacher = teacher.sum(0)                                 # (B, K): linear in the target
    return -(teacher * F.log_softmax(student.float() / temp, dim=-1)).sum(-1)


def dino_loss(student_global, student_local, teacher, temp=0.1):
    """Cross-entropy between crops of one image (DINO eq. 3, scaled as DINOv2 does).

    student_global (2, B, K) and student_local (L, B, K) logits, teacher (2, B, K) targets, in
    the crops' natural order. Every student crop is compared with every teacher crop but itself:
    2 global pairs and 2L local ones. Returns the two shares of the mean over the 2 + 2L pairs,
    (global, local); their sum is the loss."""
    pairs = 2 + 2 * len(student_local)
    # A crop against itself would teach what the student, whose average the teacher is, knows
    # already.
    between = cross_entropy(student_global, teacher, temp, crops="other")   # (2, B)
    # The teacher sees no local crop: from a part of the frame the student tells what the whole
    # is.
    from_part = cross_entropy(student_local, teacher, temp, crops="both")   # (L, B), of two each
    return between.mean(1).sum() / pairs, from_part.mean(1).sum() / pairs


def ibot_loss(student, teacher, masks, temp=0.1):
    """Masked-patch prediction (iBOT eq. 2): student (M, K) logits and teacher (M, K) targets of
    the masked patches in the order of masks.nonzero(); masks (2B, N) bool. The mean over an
    image's masked patches, summed, and divided by all 2B images: as in DINOv2 the unmasked half
    counts in the denominator."""
    n = masks.sum(1)                                             # (2B,) masked patches per image
    # Each image counts once, however much of it is hidden. Without output_size a GPU would be
    # asked for the number of rows, and waited for.
    weight = (1 / n).repeat_interleave(n, output_size=len(student))         # (M,)
    loss = cross_entropy(student, teacher, temp)                 # (M,)
    return (loss * weight).sum() / len(masks)


def koleo_loss(x, eps=1e-8):
    """Kozachenko-Leonenko entropy regulariser (Sablayrolles et al. 2019): spreads the batch
    over the sphere.

    -mean_i log |x_i - x_nn(i)| of the normalised rows, x (B, D) of any float type -> scalar. In
    float32, where eps does not vanish; rows that coincide give a large finite value and a finite
    gradient. A batch of one has no neighbour: 0."""
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1, eps=eps)                               # (B, D)
        if len(x) < 2:
            return x.sum() * 0.0                                 # 0 that has a gradient
        with torch.no_grad():                                    # who is nearest: no derivative
            nearest = (x @ x.T).fill_diagonal_(-1).argmax(1)     # (B,) largest cosine, so nearest
        distance = F.pairwise_distance(x, x[nearest], eps=eps)   # (B,)
        return -(distance + eps).log().mean()


# --- is the run healthy? ----------------------------------------------------------------------


@torch.no_grad()
def collapse_stats(teacher_logits, temp):
    """Signs of collapse in the teacher's plain softmax, which Sinkhorn-Knopp would hide; (n, K)
    logits of this process.

    mean_entropy: of one row's distribution, in nats (ln K: uniform, the teacher says nothing).
    entropy_of_mean: of the batch's mean distribution (near 0: every frame falls on the same
    prototypes). kl_to_uniform: ln K - mean_entropy (0: the teacher says nothing).
    prototypes_used: how many prototypes are some row's largest."""
    log_p = F.log_softmax(teacher_logits.float() / temp, dim=-1)  # (n, K)
    p = log_p.exp()
    mean_entropy = -(p * log_p).sum(-1).mean().item()
    mean_p = p.mean(0)                                           # (K,)
    return {"mean_entropy": mean_entropy,
            "entropy_of_mean": -torch.xlogy(mean_p, mean_p).sum().item(),   # 0 log 0 = 0
            "kl_to_uniform": math.log(p.shape[-1]) - mean_entropy,
            "prototypes_used": teacher_logits.argmax(-1).unique().numel()}
