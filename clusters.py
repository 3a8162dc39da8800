"""Hierarchical k-means over millions of unit vectors, and balanced samples of its tree.

Vo et al. 2024, arXiv 2405.15613.

    tree = hierarchy(x, [100_000, ..., 16], seed=0, rounds=3, save=lambda name, fn: fn())
    chosen = balanced_sample(tree, rows, target, rng)

x is anything with a length and x[slice or array] -> (b, D) float32 unit vectors: a tensor, or
the rows of a file that no memory holds. Under torch.distributed every process calls the same
functions with the same arguments: each takes whole chunks of the rows, and all get the result,
bit for bit that of one.
"""
import zipfile
import zlib
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import vit

CHUNK = 2 ** 25  # numbers of the largest intermediate on the device
LONG = 2 ** 32  # products of a pass from which k-means keeps what it has found so far
SAMPLE = 2 ** 16  # rows that the first centres are taken from, however many there are


# -----------------------------------------------------------------------------------------------
# Processes: all run the same lines; each does its share and adds to it what the others did

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def first_decides(compute):
    """compute() of the first process, in all of them; so is an error that it raises, in the others
    as a ValueError: see curate.main."""
    box = [None, None]
    if rank() == 0:
        try:
            box[0] = compute()
        except (ValueError, OSError) as error:
            box[1] = error
    if world() > 1:
        dist.broadcast_object_list(box)
    if box[1] is not None:
        raise box[1] if rank() == 0 else ValueError(str(box[1]))
    return box[0]


def add_up(array):
    """The numpy array or tensor with the sum over the processes in it. Integers, and floats of
    which all but one are zero: their sum is the same in any order, so the number of processes
    shows in no result."""
    if world() > 1:
        tensor = torch.as_tensor(array)
        host = tensor.cpu()
        dist.all_reduce(host)
        tensor.copy_(host)
    return array


def left_by_earlier_run(path):
    """The arrays of an .npz file; None without one, or for one that is not whole: zip files
    carry checksums."""
    try:
        with np.load(path) as file:
            return dict(file)
    except FileNotFoundError:
        return None
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError):
        print(f"{path}: damaged, so it is computed again")
        return None


# -----------------------------------------------------------------------------------------------
# Cosines of many rows with many columns

def chunks(n, width):
    """Slices of range(n), each of at most CHUNK / width rows."""
    size = max(1, CHUNK // max(width, 1))
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def shares(n, width):
    """Those of the chunks that are this process's. Every chunk is whole in one process."""
    return chunks(n, width)[rank()::world()]


def width_of(columns):
    """Numbers that a row takes at most while it is compared with the columns (k, D): k products,
    or 4 copies of itself."""
    return max(len(columns), 4 * columns.shape[1])


def gather(x, rows):
    """x[rows] (m, D), read chunk by chunk, so that no more than a chunk is there twice."""
    first = x[rows[:1]]
    found = torch.empty(len(rows), first.shape[1], device=first.device)
    for part in chunks(len(rows), 4 * first.shape[1]):
        found[part] = x[rows[part]]
    return found


class Columns:
    """Unit vectors (k, D) that many rows are compared with, and their copy in the number type of
    the fast products."""

    def __init__(self, x, dtype=None):
        self.x, self.dtype = x, dtype or vit.precision(x.device)
        self.fast = x.to(self.dtype)
        self.error = max((part.float() - x[i:i + len(part)]).norm(dim=1).amax().item()
                         for i, part in zip(range(0, len(x), 4096), self.fast.split(4096)))

    def near(self, rows, least=None):
        """The pairs of a row of rows (b, D) and a column whose cosine is at least `least` or,
        without it, the row's largest: row numbers, column numbers, cosines in float64, (m,)
        each. No such pair is missing, some more are there.

        Products in bfloat16 are off by up to a hundredth, so they only tell which pairs may be
        meant; these are computed again in float64. With x = x' + dx, c = c' + dc for the rounded
        x', c':
            |x.c - x'.c'| = |dx.c' + x.dc| <= |dx| |c'| + |x| |dc|
        and to that comes the rounding of the product and its sum over D float32 terms."""
        fast, eps, D = rows.to(self.dtype), torch.finfo(self.dtype).eps, rows.shape[1]
        products = fast @ self.fast.T                                       # (b, k)
        dx, dc = (fast.float() - rows).norm(dim=1), self.error
        off = 1.001 * (dx * (1 + dc) + dc) + eps + D * 2 ** -23     # (b,), 1.001: |x| is about 1
        floor = products.amax(1).float() - 2 * off if least is None else least - off
        floor = (floor - eps).to(self.dtype)                         # eps: rounded down for sure
        row, column = (products >= floor[:, None]).nonzero().T             # (m,), rows ascending
        cosines, size = row.new_empty(len(row), dtype=torch.float64), max(1, CHUNK // 8 // D)
        for part in chunks(len(row), CHUNK // size):
            cosines[part] = (rows[row[part]].double() * self.x[column[part]].double()).sum(1)
        return row, column, cosines


# -----------------------------------------------------------------------------------------------
# Hierarchical k-means

def assign(x, centres, sums=True, dtype=None, bar=False):
    """Nearest centre of every row: labels (n,) int64, cosines (n,) float32, and the sum of each
    cluster's rows (k, D), int64 in units of 2^-24. Decided in float64, whatever number type the
    products are computed in; of equals the first.

    Sums are taken in fixed point: integers add up to the same in any order, so that neither a
    GPU's atomic additions nor the number of processes change a bit."""
    labels, cosines = np.zeros(len(x), np.int64), np.zeros(len(x), np.float32)
    total = torch.zeros(centres.shape, dtype=torch.int64, device=centres.device)
    columns = Columns(centres, dtype)
    parts = shares(len(x), width_of(centres))
    for part in tqdm(parts, desc="pass", disable=None if bar else True, delay=5, leave=False):
        rows = x[part]                                                      # (b, D)
        row, column, cosine = columns.near(rows)                            # (m,) each, m >= b
        best = cosine.new_full((len(rows),), -2).scatter_reduce_(0, row, cosine, "amax")
        first = torch.where(cosine == best[row], column, len(centres))
        label = torch.full_like(best, len(centres), dtype=row.dtype)
        label.scatter_reduce_(0, row, first, "amin")                        # of equals the first
        labels[part], cosines[part] = label.cpu().numpy(), best.cpu().numpy()
        if sums:
            total.index_add_(0, label, (rows * 2 ** 24).long())
    return add_up(labels), add_up(cosines), add_up(total) if sums else None


def first_centres(x, k, rng, bar=False):
    """k rows of x (n, D) by greedy k-means++: each the best of a few drawn with probability ~
    squared distance to the nearest so far."""
    distance, chosen = torch.ones(len(x), device=x.device, dtype=torch.float64), []
    for i in tqdm(range(k), desc=f"first centres, k = {k}", disable=not bar, delay=5):
        u = rng.random(2 + int(np.log(k)) if i else 1)                      # (candidates,)
        u, ends = torch.from_numpy(u).to(x.device), distance.cumsum(0)
        drawn = torch.searchsorted(ends, u * ends[-1], right=True).clamp(max=len(x) - 1)
        left = (1 - x @ x[drawn].T).clamp(min=0).double()                   # (n, candidates)
        if i:
            left = torch.minimum(distance[:, None], left)
        best = left.sum(0).argmin()
        distance = left[:, best]
        chosen.append(drawn[best])
    return x[torch.stack(chosen)]


def kmeans(x, k, seed=0, steps=50, tolerance=1e-4, bar=False, so_far=None):
    """Spherical k-means of n unit vectors (anything with len and x[slice or array] -> (b, D)):
    centres (k, D), labels, cosines (n,).

    First centres by k-means++ (Arthur and Vassilvitskii 2007) on at most SAMPLE or 4 k rows,
    then Lloyd over all of them, chunk by chunk, until no label changes or the inertia, the mean
    of 1 - cosine, falls by less than `tolerance` of itself. An empty cluster restarts at the row
    that its centre fits worst. Small data gets several starts, the best of which is returned.
    so_far: path of a file that holds the centres before each pass of a
    long k-means, which goes on from there. ValueError if k is not in 1..n."""
    if not 1 <= k <= len(x):
        raise ValueError(f"{k} clusters asked of {len(x)} frames: --clusters must lie between 1 and "
                         "the number of frames")
    rng, best = np.random.default_rng(seed), None
    bar = bar and rank() == 0
    starts = min(10, max(1, 2 ** 20 // (k * len(x))))
    so_far = so_far if starts == 1 and k * len(x) >= LONG else None
    for _ in range(starts):
        some = np.sort(rng.choice(len(x), min(len(x), max(SAMPLE, 4 * k)), replace=False))
        known = first_decides(lambda: left_by_earlier_run(so_far)) if so_far else None
        if known is None:
            seeded = first_decides(lambda: (first_centres(gather(x, some), k, rng, bar).cpu(), rng))
            rng, known = seeded[1], {"centres": seeded[0], "step": 0, "inertia": np.inf}
        known["centres"] = torch.as_tensor(known["centres"]).to(x[:1].device)
        centres, labels, cosines = lloyd(x, **known, steps=steps, tolerance=tolerance, bar=bar,
                                         so_far=so_far)
        inertia = 1 - cosines.mean(dtype=np.float64)
        if best is None or inertia < best[0]:
            best = inertia, centres, labels, cosines
    return best[1:]


def lloyd(x, centres, step=0, inertia=np.inf, steps=50, tolerance=1e-4, bar=False, so_far=None):
    """Centres (k, D), labels and cosines (n,) after at most `steps` passes of k-means over x, of which
    `step` have been made and ended in these centres and this inertia."""
    before, old, k = inertia, None, len(centres)
    for step in tqdm(range(step, steps), desc=f"k-means, k = {k}", disable=not bar, delay=5):
        if so_far and rank() == 0:
            with vit.replacing(so_far) as temporary:
                np.savez(temporary, centres=centres.cpu(), step=step, inertia=before)
        labels, cosines, sums = assign(x, centres, bar=bar)
        inertia = 1 - cosines.mean(dtype=np.float64)
        settled = inertia >= (1 - tolerance) * before or np.array_equal(labels, old)
        if settled or step == steps - 1:
            return centres, labels, cosines
        before, old, empty = inertia, labels, np.setdiff1d(np.arange(k), labels)
        for part in chunks(k, 32 * centres.shape[1]):  # in place: there may be a gigabyte of them
            centres[part] = F.normalize(sums[part].double(), dim=1).float()
        if len(empty):
            centres[empty] = x[np.sort(np.argsort(cosines, kind="stable")[:len(empty)])]


def nearest(labels, cosines, per):
    """Sorted numbers of the `per` members of each cluster that its centre fits best."""
    order = np.lexsort((-cosines, labels))
    starts = np.searchsorted(labels[order], labels[order])
    return np.sort(order[np.arange(len(order)) - starts < per])


def cluster(x, k, seed, rounds, part=lambda r: None):
    """{"centres": (k, D), "labels": (n,)} of k-means of x, then of `rounds` of
    resampling-clustering (Vo et al. 2024, section 3.3): the members nearest to the centres,
    alike many from each cluster, are clustered in their place, so the centres spread over what
    there is, not over how often it is there.

    With fewer than four rows to a cluster one member stands for each: it is the centre of the
    next round, nearest to itself, and further rounds would change nothing, so there is one round
    without k-means."""
    centres, labels, cosines = kmeans(x, k, seed, bar=True, so_far=part(0))
    per = max(1, len(x) // (2 * k))
    for r in range(min(rounds, 1) if per == 1 else rounds):
        near = nearest(labels, cosines, per)
        if len(near) < k:  # more identical frames than clusters
            break
        if per == 1:
            centres = gather(x, near)
        else:
            few = torch.utils.data.Subset(x, near)
            centres = kmeans(few, k, seed + r + 1, bar=True, so_far=part(r + 1))[0]
        labels, cosines, _ = assign(x, centres, sums=False)
    return {"centres": centres.cpu().numpy(), "labels": labels}


def hierarchy(x, sizes, seed, rounds, save, file=lambda name: None):
    """Levels of k-means, each on the centres of the one below (Vo et al. 2024, section 3.2): for
    each level the label of every item of the level below, (n,), (sizes[0],), (sizes[1],), ...

    x: unit vectors; sizes: clusters from the leaves up; save(name, compute) keeps the result of a
    level, file(name) is a path for what a long k-means has found so far. Eight frames of which six
    show one thing (a) and two another (b), sizes [4, 2]:

        top                0              1         tree[1] = [0, 0, 0, 1]
                        /  |  \\           |
        leaves        0    1    2         3         tree[0] = [0, 0, 1, 1, 2, 2, 3, 3]
                     / \\  / \\  / \\       / \\
        frames       a a  a a  a a       b b

    Of four frames that are asked each top cluster gives two: half of them show b, not a quarter.
    """
    tree = []
    for level, k in enumerate(sizes):
        part = [file(f"part{level + 1}.{r}") for r in range(rounds + 1)]
        compute = partial(cluster, x, k, seed + level, rounds, part.__getitem__)
        found = save(f"clusters{level + 1}", compute)
        for path in filter(None, part if rank() == 0 else ()):
            path.unlink(missing_ok=True)  # the level is kept
        tree.append(found["labels"])
        x = torch.from_numpy(found["centres"]).to(x.device)
    return tree
# -----------------------------------------------------------------------------------------------
# Balanced sampling

def equal_shares(n, sizes, rng):
    """(m,) integers that add up to min(n, sum of sizes): as equal as `sizes` (m,) lets them be;
    rng places what does not divide."""
    order = np.argsort(sizes, kind="stable")
    rising, left = sizes[order], np.arange(len(sizes), 0, -1)
    below = np.cumsum(rising) - rising                               # what the smaller ones hold
    first = np.searchsorted(below + rising * left, n)                  # the smallest not emptied
    if first == len(sizes):
        return sizes.copy()
    share, rest = divmod(int(n - below[first]), int(left[first]))
    shares = np.minimum(sizes, share)
    shares[rng.permutation(order[first:])[:rest]] += 1
    return shares


def members(labels, k):
    """List of k arrays: the items of each cluster, ascending."""
    ends = np.cumsum(np.bincount(labels, minlength=k))
    return np.split(np.argsort(labels, kind="stable"), ends[:-1])


def sizes_of(tree, rows):
    """Frames under each cluster, level by level from the leaves up, counting only those at
    `rows`."""
    counts = [len(level) for level in tree[1:]] + [tree[-1].max() + 1]   # clusters of each level
    sizes = [np.bincount(tree[0][rows], minlength=counts[0])]
    for labels, k in zip(tree[1:], counts[1:]):
        sizes.append(np.bincount(labels, sizes[-1], k).astype(np.int64))
    return sizes


def capped(video, leaf, cap, rng):
    """Sorted numbers of at most `cap` frames per video, those of a longer one spread evenly over
    its clusters."""
    chosen = []
    for frames in members(video, video.max() + 1):
        if len(frames) > cap:
            _, place = np.unique(leaf[frames], return_inverse=True)
            groups = members(place, place.max() + 1)
            quota = equal_shares(cap, np.array([len(g) for g in groups]), rng)
            drawn = [rng.permutation(g)[:q] for g, q in zip(groups, quota)]
            frames = frames[np.concatenate(drawn)]
        chosen.append(frames)
    return np.sort(np.concatenate(chosen))


def balanced_sample(tree, rows, target, rng):
    """Sorted numbers of min(target, len(rows)) of the frames `rows`: every cluster shares its
    quota equally among the clusters below it, none more than it holds, and a leaf draws at
    random (Vo et al. 2024, section 3.4, flat in the leaves)."""
    sizes = sizes_of(tree, rows)
    quota = equal_shares(target, sizes[-1], rng)
    for level in range(len(tree) - 1, 0, -1):
        below_quota = np.zeros(len(tree[level]), np.int64)
        for q, below in zip(quota, members(tree[level], len(quota))):
            below_quota[below] = equal_shares(q, sizes[level - 1][below], rng)
        quota = below_quota
    leaves = members(tree[0][rows], len(quota))
    drawn = [rows[rng.permutation(leaf)[:q]] for leaf, q in zip(leaves, quota)]
    return np.sort(np.concatenate(drawn))
