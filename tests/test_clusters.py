"""Hierarchical k-means and balanced sampling: against Lloyd, float64 and themselves after a kill; shares."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clusters


def blobs(n=600, k=8, dim=16, seed=0):
    rng = np.random.default_rng(seed)
    middles = rng.standard_normal((k, dim))
    x = middles[rng.integers(k, size=n)] + 0.6 * rng.standard_normal((n, dim))
    return F.normalize(torch.from_numpy(x).float(), dim=1)


def lloyd(x, k, rng):
    """Inertia of the textbook's spherical Lloyd from k random rows."""
    centres = x[rng.permutation(len(x))[:k]]
    for _ in range(100):
        label = (x @ centres.T).argmax(1)
        sums = torch.zeros_like(centres).index_add_(0, label, x)
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centres)
    return 1 - (x @ centres.T).amax(1).mean().item()


@pytest.mark.parametrize("k", [3, 8, 30])
def test_kmeans_is_as_good_as_the_best_of_ten_lloyd_runs(k):
    x, rng = blobs(), np.random.default_rng(1)
    best = min(lloyd(x, k, rng) for _ in range(10))
    centres, labels, cosines = clusters.kmeans(x, k)
    assert 1 - cosines.mean() <= 1.02 * best
    assert torch.equal((x @ centres.T).argmax(1), torch.from_numpy(labels)) and len(set(labels)) == k


def test_kmeans_repeats_and_does_not_depend_on_the_chunks(monkeypatch):
    x = blobs()
    first = clusters.kmeans(x, 8, seed=3)
    monkeypatch.setattr(clusters, "CHUNK", 64 * 50)
    second = clusters.kmeans(x, 8, seed=3)
    assert np.array_equal(first[1], second[1]) and torch.allclose(first[0], second[0], atol=1e-6)


def test_an_empty_cluster_restarts_and_identical_frames_are_no_trouble():
    x = F.normalize(torch.tensor([[1., 0], [1, 0], [1, 0], [0, 1]]), dim=1)
    assert clusters.kmeans(x, 2)[2].min() > 0.999
    clusters.kmeans(x, 4)


def test_equal_shares():
    rng = np.random.default_rng(0)
    assert clusters.equal_shares(10, np.array([1, 100, 2, 50]), rng).sum() == 10
    assert clusters.equal_shares(9, np.array([1, 100, 2, 50]), rng).tolist() == [1, 3, 2, 3]
    assert clusters.equal_shares(999, np.array([1, 5]), rng).tolist() == [1, 5]
    for _ in range(200):
        sizes, n = rng.integers(0, 9, 7), int(rng.integers(0, 40))
        shares = clusters.equal_shares(n, sizes, rng)
        assert shares.sum() == min(n, sizes.sum()) and (shares <= sizes).all() and (shares >= 0).all()
        assert shares.max(initial=0) - shares[shares < sizes].min(initial=99) <= 1  # nobody is two behind


def test_sampling_goes_down_the_hierarchy():
    tree = [np.repeat([0, 1, 2], [90, 9, 3]), np.array([0, 0, 1])]  # leaf 2 has a top of its own
    chosen = clusters.balanced_sample(tree, np.arange(102), 6, np.random.default_rng(0))
    counts = np.bincount(tree[0][chosen], minlength=3)
    assert counts[2] == 3 and sorted(counts[:2]) == [1, 2]


def test_concepts_at_50_to_1_come_out_even_where_the_embedding_tells_them_apart():
    """The hierarchy and the sampling alone; the top level has as many clusters as there are concepts."""
    g = torch.Generator().manual_seed(0)
    middles = torch.randn(2, 32, generator=g)
    x = F.normalize(middles[[0] * 250 + [1] * 5] + 0.3 * torch.randn(255, 32, generator=g), dim=1)
    tree = clusters.hierarchy(x, [127, 31, 7, 2], 0, 3, lambda name, compute: compute())
    chosen = clusters.balanced_sample(tree, np.arange(255), 10, np.random.default_rng(0))
    assert (chosen >= 250).sum() == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_labels_of_fast_products_are_those_of_float32(dtype):
    """Frames between two centres that bfloat16 cannot tell apart; of centres that are equal the first."""
    rng = np.random.default_rng(0)
    centres = blobs(300, 40, 64)
    nudge = torch.from_numpy(rng.standard_normal((100, 64))).float()
    centres[100:200] = F.normalize(centres[:100] + 1e-3 * nudge, dim=1)
    centres[299] = centres[250]
    between = F.normalize(centres[:100] + centres[100:200], dim=1)
    x = torch.cat([blobs(2000, 40, 64, seed=1), centres[[250]], between])
    labels, cosines, sums = clusters.assign(x, centres, dtype=dtype)
    products = x.double() @ centres.double().T
    assert np.array_equal(labels, products.argmax(1)) and labels[2000] == 250
    assert np.array_equal(labels[:2000], (x @ centres.T).argmax(1)[:2000])
    assert np.abs(cosines - products.amax(1).numpy()).max() < 1e-7
    expected = torch.zeros(300, 64, dtype=torch.int64)
    assert torch.equal(sums, expected.index_add_(0, torch.from_numpy(labels), (x * 2 ** 24).long()))
    rounded = (x.to(dtype) @ centres.to(dtype).T).argmax(1).numpy()
    assert dtype != torch.bfloat16 or (rounded != labels).sum() > 20  # the products alone would be wrong


def test_kmeans_stops_when_no_label_changes(monkeypatch):
    passes, real = [], clusters.assign

    def assign(*args, **kwargs):
        passes.append(real(*args, **kwargs))
        return passes[-1]

    monkeypatch.setattr(clusters, "assign", assign)
    x = blobs(40, 4, 8)
    clusters.lloyd(x, x[:4].clone(), tolerance=-1)  # of tolerance -1 it never has enough
    labels = [labels for labels, _, _ in passes]
    assert len(labels) < 50 and np.array_equal(labels[-1], labels[-2])
    assert not any(np.array_equal(a, b) for a, b in zip(labels[:-2], labels[1:-1]))


@pytest.mark.parametrize("leaves", (700, 1450))  # with and without k-means in its rounds of resampling
def test_a_long_kmeans_goes_on_from_its_last_pass(tmp_path, monkeypatch, leaves):
    """Killed in one pass of five, of the resampling too, it ends as if it had never been."""
    x, save, rng = blobs(2900, 30, 8), lambda name, compute: compute(), np.random.default_rng(0)
    whole, = clusters.hierarchy(x, [leaves], 0, 2, save)
    monkeypatch.setattr(clusters, "LONG", 0)
    seeded, killed, assign, first = [], 0, clusters.assign, clusters.first_centres

    def dies(*args, **kwargs):
        if rng.random() < 0.2:
            raise KeyboardInterrupt
        return assign(*args, **kwargs)

    monkeypatch.setattr(clusters, "assign", dies)
    monkeypatch.setattr(clusters, "first_centres", lambda *args: seeded.append(1) or first(*args))
    while True:
        try:
            file = lambda name: tmp_path / f"{name}.npz"
            tree, = clusters.hierarchy(x, [leaves], 0, 2, save, file)
            break
        except KeyboardInterrupt:
            killed += 1
    assert killed > 1 and len(seeded) == (3 if leaves == 700 else 1)
    assert np.array_equal(tree, whole) and not list(tmp_path.iterdir())


def partition(labels):
    return {tuple(np.flatnonzero(labels == k)) for k in np.unique(labels)}


def test_one_member_for_each_leaf_makes_further_rounds_needless():
    """What `cluster` leaves out, done: a second and a third round of k-means, which move nothing."""
    x, k = blobs(150, 8, 16), 60
    centres, labels, cosines = clusters.kmeans(x, k, seed=5)
    rounds = [partition(labels)]
    for r in range(3):
        near = clusters.nearest(labels, cosines, 1)
        centres = clusters.kmeans(x[near], k, seed=6 + r)[0]
        labels, cosines, _ = clusters.assign(x, centres)
        rounds.append(partition(labels))
    assert rounds[0] != rounds[1] == rounds[2] == rounds[3]
    assert partition(clusters.cluster(x, k, 5, 3)["labels"]) == rounds[1]
    assert partition(clusters.cluster(x, k, 5, 0)["labels"]) == rounds[0]
