"""The heads on a frozen backbone, as networks: what each computes from the tokens of its blocks.

    probability, label = Softmax(blocks, patch, mean=..., ...)(features)
    polyp = DPTHead(dim=384)(tokens, grid=(16, 16))  # (B, 4, 1 + N, D) -> logits (B, 256, 256)

How they are fitted stands in the probes, how they are kept in files in frozen.py.
B frames, L blocks, h x w patch grid, N = h*w patches, D width, C classes.
"""
import torch
import torch.nn.functional as F
from torch import nn

DPT_BLOCKS = {24: (4, 11, 17, 23)}  # DINOv2's choice for ViT-L; otherwise the last of each quarter


def blocks_of(kind, depth, last=1):
    """(numbers of the blocks that a head of this kind reads, whether through the final norm).

    last: how many of the last blocks a classifier reads; polyp heads have their own."""
    if kind == "dpt":
        quarters = tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
        return DPT_BLOCKS.get(depth, quarters), False
    last = 4 if kind == "boosted" else last
    return tuple(range(max(depth - last, 0), depth)), True


# ---------------------------------------------------------------------------------------------
# Classifiers: head(features, rows) -> class probabilities (n, C), labels (n,), on the CPU.
# features: {"cls" (n, L, D): class tokens of the last L blocks, "patch" (n, D): mean patch token
# of the last}; rows picks frames among them.


def classifier_input(features, rows, blocks, patch):
    """Class tokens of the last `blocks` blocks, and the mean patch token if `patch`: the four
    inputs of DINOv2's linear probe, (n, blocks * D [+ D])."""
    x = features["cls"][rows, -blocks:].flatten(1)
    return torch.cat([x, features["patch"][rows]], 1) if patch else x


class Standardised(nn.Module):
    """A classifier whose input has every dimension's mean and std over the training frames, both
    (d,), taken out."""

    def __init__(self, blocks, patch, **tensors):
        super().__init__()
        self.blocks, self.patch = blocks, patch
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def inputs(self, features, rows=slice(None)):
        x = classifier_input(features, rows, self.blocks, self.patch)        # (n, d)
        return (x - self.mean) / self.std


class Softmax(Standardised):
    """Multinomial logistic regression: mean, std (d,), weight (C, d), bias (C,)."""

    def forward(self, features, rows=slice(None)):
        z = F.linear(self.inputs(features, rows), self.weight, self.bias)    # (n, C)
        p = z.softmax(1).cpu()
        return p, p.argmax(1)


class Ordinal(Standardised):
    """Proportional odds: mean, std, direction w (d,), thresholds theta (C - 1,), increasing.

    P(grade <= c) = sigmoid(theta_c - w.x); the label is the median grade, the first c at which
    that reaches 1/2."""

    def forward(self, features, rows=slice(None)):
        along = self.inputs(features, rows).double() @ self.direction        # (n,)
        below = torch.sigmoid(self.thresholds - along[:, None]).cpu()        # (n, C - 1)
        at_most = F.pad(F.pad(below, (1, 0)), (0, 1), value=1.0)             # (n, C + 1): 0 to 1
        return at_most.diff(dim=1).float(), (below < 0.5).sum(1)


class Neighbours(nn.Module):
    """Votes of the k nearest training frames by the last block's class token: bank (n, D) of
    these tokens, labels (n,)."""

    def __init__(self, n_classes, k, temp, bank, labels):
        super().__init__()
        self.n_classes, self.k, self.temp, self.blocks = n_classes, k, temp, 1
        self.register_buffer("bank", bank)
        self.register_buffer("labels", labels)

    def forward(self, features, rows=slice(None)):
        x = features["cls"][rows, -1]
        p = knn_probabilities(self.bank, self.labels, x, self.k, self.temp, self.n_classes).cpu()
        return p, p.argmax(1)


def knn_probabilities(train_x, train_y, x, k=20, temp=0.07, n_classes=None):
    """(n, n_classes) votes of the k nearest training frames by cosine, each weighing
    softmax(similarity / temp) (DINO, 2021).

    k is cut to the number of training frames. Similarities are made for a slice of x at a time,
    to bound the memory."""
    if not len(train_x):
        raise ValueError("knn needs at least one training frame")
    n_classes = n_classes or int(train_y.max()) + 1
    bank, x, train_y = F.normalize(train_x, dim=1), F.normalize(x, dim=1), train_y.to(x.device)
    votes = x.new_zeros(len(x), n_classes)
    rows = max(1, 2**25 // len(bank))
    for i in range(0, len(x), rows):
        similarity, nearest = (x[i:i + rows] @ bank.T).topk(min(k, len(bank)), dim=1)  # (rows, k)
        weights = (similarity / temp).softmax(1)[..., None]                  # (rows, k, 1)
        voted = F.one_hot(train_y[nearest], n_classes)                       # (rows, k, C)
        votes[i:i + rows] = (voted * weights).sum(1)  # no scatter: the same twice on a GPU too
    return votes


# ---------------------------------------------------------------------------------------------
# Polyp heads: tokens (B, L, 1 + N, D) of L blocks, class token first, and their grid (h, w)
# -> one polyp logit per cell


def resize(x, size, align_corners=False):
    """F.interpolate(x, size, mode="bilinear") of (..., h, w) as two matrix products: their
    backward pass repeats exactly on GPUs."""
    def weights(n_in, n_out):
        one_hot = torch.eye(n_in, device=x.device)[None]
        w = F.interpolate(one_hot, n_out, mode="linear", align_corners=align_corners)
        return w[0].to(x.dtype)                                              # (n_in, n_out)
    return weights(x.shape[-2], size[0]).T @ (x @ weights(x.shape[-1], size[1]))


class LinearHead(nn.Module):
    """Batch norm and a 1x1 convolution (one linear map) on the patch tokens of one or several
    blocks: DINOv2's BNHead."""

    def __init__(self, dim, levels):
        super().__init__()
        self.norm = nn.BatchNorm1d(levels * dim)
        self.classify = nn.Linear(levels * dim, 1)
        nn.init.normal_(self.classify.weight, std=0.01)
        nn.init.zeros_(self.classify.bias)

    def forward(self, tokens, grid):
        x = tokens[:, :, 1:].transpose(1, 2).flatten(2)                      # (B, N, L * D)
        return self.classify(self.norm(x.flatten(0, 1))).view(len(x), *grid)  # (B, h, w)


def conv3(n_in, n_out, **options):
    return nn.Conv2d(n_in, n_out, kernel_size=3, padding=1, **options)


class Reassemble(nn.Module):
    """The tokens of one block as a map of `width` channels, `scale` times as fine as the patch
    grid (DPT section 3.1).

    The class token is read out by projection: joined to every patch token and mapped back to D."""

    def __init__(self, dim, width, scale, channels):
        super().__init__()
        self.readout = nn.Linear(2 * dim, dim)
        self.project = nn.Conv2d(dim, width, kernel_size=1)
        self.rescale = {4: lambda: nn.ConvTranspose2d(width, width, kernel_size=4, stride=4),
                        2: lambda: nn.ConvTranspose2d(width, width, kernel_size=2, stride=2),
                        1: nn.Identity,
                        0.5: lambda: conv3(width, width, stride=2)}[scale]()
        self.reduce = conv3(width, channels, bias=False)

    def forward(self, tokens, grid):
        cls, patches = tokens[:, :1], tokens[:, 1:]
        joined = torch.cat([patches, cls.expand_as(patches)], dim=-1)        # (B, N, 2D)
        x = F.gelu(self.readout(joined))                                     # (B, N, D)
        x = self.project(x.transpose(1, 2).unflatten(2, grid))               # (B, width, h, w)
        return self.reduce(self.rescale(x))                  # (B, channels, scale*h, scale*w)


class ResidualUnit(nn.Module):
    """Two pre-activated convolutions beside the identity."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = conv3(channels, channels, bias=False)
        self.conv2 = conv3(channels, channels, bias=False)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Joins a level with what came from the deeper ones, and doubles the resolution. The deepest
    level has nothing to join."""

    def __init__(self, channels, deepest):
        super().__init__()
        self.unit1 = None if deepest else ResidualUnit(channels)
        self.unit2 = ResidualUnit(channels)
        self.project = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, level, deeper=None):
        if deeper is not None:  # an odd grid, halved and doubled, is one cell larger than the level
            level = deeper + self.unit1(resize(level, deeper.shape[-2:]))
        return self.project(double(self.unit2(level)))


def double(x):
    return resize(x, (2 * x.shape[-2], 2 * x.shape[-1]), align_corners=True)


class DPTHead(nn.Module):
    """Dense prediction transformer (Ranftl et al. 2021) as DINOv2 sets it up for depth, with one
    polyp logit for output.

    Four levels at 4, 2, 1 and 1/2 times the patch grid, fused deepest first; the logits are 16
    times as fine as the grid."""

    def __init__(self, dim, channels=256):
        super().__init__()
        self.levels = nn.ModuleList(Reassemble(dim, dim // part, scale, channels)
                                    for part, scale in ((8, 4), (4, 2), (2, 1), (1, 0.5)))
        self.fusions = nn.ModuleList(Fusion(channels, deepest=i == 3) for i in range(4))
        self.project = conv3(channels, channels)
        self.conv1 = conv3(channels, channels // 2)
        self.conv2 = conv3(channels // 2, 32)
        self.classify = nn.Conv2d(32, 1, kernel_size=1)

    def forward(self, tokens, grid):
        x = None
        for i in (3, 2, 1, 0):
            x = self.fusions[i](self.levels[i](tokens[:, i], grid), x)
        x = double(self.conv1(F.relu(self.project(x))))       # (B, channels / 2, 16h, 16w)
        return self.classify(F.relu(self.conv2(x)))[:, 0]     # (B, 16h, 16w)


def new_polyp_head(kind, dim, depth, channels=256):
    """An untrained head for a backbone of this width and depth; channels: of DPT's fusion."""
    if kind == "dpt":
        return DPTHead(dim, channels)
    return LinearHead(dim, levels=len(blocks_of(kind, depth)[0]))
