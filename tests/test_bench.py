"""bench.py's own arithmetic: what a step is made of, its FLOP, candidates that run in turn."""
import re

import pytest
import torch

import bench
import synthetic
import vit

SMALL = ("--arch tiny --recipe demo --device cpu --batch 4 --global-size 56 --local-size 28 "
         "--local-crops 2 --prototypes 64 --head-hidden 48 --bottleneck 16").split()


@pytest.fixture
def trainer(monkeypatch, synthetic_set):
    """A function: number type -> bench.Trainer of a tiny architecture."""
    monkeypatch.setitem(vit.ARCHS, "tiny", dict(dim=32, depth=2, heads=2))
    monkeypatch.setattr(synthetic, "ensure", lambda: synthetic_set)
    return lambda precision: bench.Trainer(SMALL, f"--precision {precision}", "auto")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_is_the_sum_of_its_parts(trainer, precision):
    t = trainer(precision)
    assert t.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    t.step()
    parts = t.parts(steps=1)
    assert list(parts) == list(bench.PARTS)
    casts = parts.pop("casts of weights and their gradients")
    assert (casts > 0) == (precision == "bf16")  # float32 casts nothing
    assert all(s > 0 for name, s in parts.items() if name != "other casts and copies"), parts


def test_gradients_belong_to_the_part_that_made_them():
    attend = bench.named("attention", lambda x: x.softmax(-1) * 2)
    x = torch.randn(64, 64, requires_grad=True)
    with torch.profiler.profile(record_shapes=True) as profile:
        attend(x).sum().backward()
    parts = bench.split_by_part(profile.events(), set(), whole=1.0)
    inside = [e for e in profile.events() if re.search("softmax|mul", e.name.lower())]
    inside = sum(e.self_cpu_time_total for e in inside) / 1e6
    assert parts["attention"] >= inside > 0 and sum(parts.values()) == pytest.approx(1.0)


def test_flop_of_a_step_are_those_of_its_products(trainer):
    t = trainer("fp32")
    B, D, depth, n, few, hidden, neck, K = 4, 32, 2, 17, 5, 48, 16, 64
    M = len(next(t.raw)["masked"])
    next(t.raw)  # the step takes the first batch
    tokens, pairs = 2 * B * n, 2 * B * n**2
    embedded = 2 * B * (n - 1)

    def forward(tokens, pairs, embedded, cls, patches):
        block = 2 * tokens * 12 * D**2 + 4 * pairs * D
        dino, ibot = (D * hidden + hidden**2 + hidden * w + w * K for w in (neck, 256))
        heads = cls * dino + patches * ibot
        return depth * block + 2 * embedded * 3 * 14**2 * D + 2 * heads
    teacher = forward(tokens, pairs, embedded, 2 * B, M)
    tokens, pairs, embedded = tokens + 2 * B * few, pairs + 2 * B * few**2, embedded + 2 * B * (few - 1)
    student = forward(tokens, pairs, embedded, 4 * B, M)
    pixels = 2 * embedded * 3 * 14**2 * D  # images want no gradient
    few_more = 0.01  # KoLeo's and Sinkhorn's products
    assert t.flops() == pytest.approx(teacher + 3 * student - pixels, rel=few_more)


def test_candidates_run_in_turn():
    calls = []
    bench.seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, runs=2)
    assert calls == list("ababab")


def test_step_prints_a_row_per_variant(trainer, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "product_rate", lambda device, dtype, clock: 1e10)
    variants = ["--variants", "float32", "bf16"]
    bench.main(["step", "--archs", "tiny", "--runs", "1", *variants, *SMALL[2:]])
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^\| (float32|bf16) \| (.*) \|$", out, re.M))
    assert rows.keys() == {"float32", "bf16"} and rows["float32"].split(" | ")[2] == "1.00"
    assert set(bench.PARTS) <= set(re.findall(r"^\| ([^|]+) \| [-\d.]+ \| ", out, re.M))
    assert re.search(r"^A save of last.pt, 1 MB, holds training for \d+ ms; .* after \d+.\d s", out, re.M)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [
    "model --batch 1 --runs 1", "probe --batch 1 --sizes 28 --runs 1", "cost --recipes demo",
    "live --sizes 28 --batches 1 --frames 2 --frame 64 64", "input --frames 1 --runs 1"])
def test_command_prints_rows(trainer, monkeypatch, command, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # for this process, not for its tests
    archs = [] if command.startswith("input") else ["--archs", "tiny"]
    bench.main([*command.split(), *archs])
    tables = re.findall(r"^\|(?:---\|)+\n((?:\|.*\n)+)", capsys.readouterr().out, re.M)
    assert tables and not any("nan" in rows for rows in tables)
