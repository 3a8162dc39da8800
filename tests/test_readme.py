"""README.md and docs/ against the code: every file, function, flag, test and set-up command that they
name; what the course and the page of one step say is printed; the commands, small; demo.sh, stopped
and started.
"""
import argparse
import ast
import contextlib
import importlib
import io
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import vit

from test_predict import fake_ffmpeg  # noqa: F401

ROOT = pathlib.Path(__file__).resolve().parents[1]
README, COURSE, DEMO = (ROOT / name for name in ("README.md", "docs/course.md", "demo.sh"))
SCRIPTS = ("synthetic", "data", "vit", "curate", "pretrain", "probe_classify", "probe_segment",
           "probe_mes", "predict", "docs.study", "docs.search", "docs.step", "bench")
FOREIGN_FLAGS = {"--nproc-per-node", "--shutdown-timeout", "--help"}  # torchrun's, and everyone's
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
texts = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)


def test_file_map_names_every_file():
    mapped = set(re.findall(r"^\| \d* ?\| `([\w./]+)` \|", README.read_text(), re.M))
    patterns = "*.py", "*.sh", "custom_kernels/*.py", "docs/*.py"
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert mapped == {str(path.relative_to(ROOT)) for path in files}


def test_set_up_commands_are_those_of_ci():
    commands = [line for line in README.read_text().splitlines() if "-m venv" in line]
    ci = [line for line in (ROOT / ".ci/run").read_text().splitlines() if "-m venv" in line]
    assert len(commands) == 2 and commands[1:] == ci
    set_up = ("python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
              ".venv/bin/python ")
    assert commands == [set_up + "pretrain.py --arch vitt14 --recipe demo", set_up + "-m pytest"]


def test_the_healthy_log_is_the_one_beside_it():
    rows = (ROOT / "docs/logs/demo.jsonl").read_text().splitlines()
    rows = {row["step"]: row for row in map(json.loads, rows)}
    names, *cells = [line.strip("| ").split(" | ") for line in
                     (ROOT / "docs/help.md").read_text().splitlines() if re.match(r"\| (step|\d+) \|", line)]
    assert len(cells) == 7 and names[0] == "step"
    for line in cells:
        row = rows[int(line[0])]
        assert [float(cell) for cell in line] == [round(float(row[name]), 2) for name in names]


def test_the_first_screen_starts():
    """Both commands, how large, how long and what they end with."""
    first = README.read_text().splitlines()[:35]
    assert sum("-m venv" in line for line in first) == 2 and "```text" in first
    assert any(line.startswith("done: runs/vitt14-demo/teacher_200.pt") for line in first)
    assert re.search(r"\d GB to download", " ".join(first)) and re.search("minutes", " ".join(first))
    assert len(README.read_text().splitlines()) <= 220


def defined(path):
    """Every "name" and "Class.name" at the top level and in the classes of a Python file."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        targets = [t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name)]
        names |= {node.name} if hasattr(node, "name") else set(targets)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if hasattr(part, "name")}
    return names


@texts
def test_functions_and_tests_exist(path):
    named = re.findall(r"`([\w/]+\.py)::?([\w.]+)`", path.read_text())
    assert len(named) > 20 or path.name not in ("papers.md", "course.md")
    assert not [f"{file}:{name}" for file, name in named if name not in defined(ROOT / file)]


@texts
def test_files_exist(path):
    text = path.read_text()
    prose = re.sub("```.*?```", "", text, flags=re.S)  # in code head["a"](x) is no link
    linked = re.findall(r"(?:\]\(|src=\")(?!http)([^)#\"]+)", prose)
    assert not [target for target in linked if not (path.parent / target).exists()]
    for target, heading in re.findall(r"\]\((?!http)([^)#]*)#([^)]+)\)", prose):
        headings = re.findall("^#+ (.*)$", (path.parent / (target or path.name)).read_text(), re.M)
        assert heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], heading
    coded = re.findall(r"`((?:[\w-]+/)*[\w-]+\.(?:py|sh|md|txt|png))`", text)
    assert coded or path != README
    assert not [name for name in coded if not (ROOT / name).exists()]


# --- commands: argparse alone sees them, before the script touches anything ----------------------


class Parsed(Exception):
    """A script has read its flags."""


@pytest.fixture
def parsers(monkeypatch):
    """List of the parsers that a script's main(argv) used; it ends there, by Parsed, or by SystemExit
    for wrong flags."""
    used, real = [], argparse.ArgumentParser.parse_known_args

    def parse(self, args=None, namespace=None):
        used.append(self)
        found, rest = real(self, args, namespace)
        if any(action.nargs == argparse.REMAINDER for action in self._actions):
            return found, rest  # bench.py: its sub-command comes next
        if self.prog in ("bench.py step", "python -m docs.study", "python -m docs.search"):
            importlib.import_module("pretrain").parse(rest)  # it hands them on
        raise Parsed if not rest else SystemExit(f"unknown: {rest}")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    return used


def main(name, argv):
    with contextlib.suppress(Parsed):
        importlib.import_module(name).main(argv)
        pytest.fail(f"{name}.py {argv} read no flags")


def commands(text):
    """(script, argv) of each line in the bash blocks that starts one of our scripts."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.rpartition(" && ")[2], comments=True)
            for i, word in enumerate(words):
                if word.removesuffix(".py") in SCRIPTS and (word[-3:] == ".py" or words[i - 1] == "-m"):
                    yield word.removesuffix(".py"), words[i + 1:]
                    break


@texts
def test_commands_have_flags_that_exist(path, parsers):
    found = list(commands(path.read_text()))
    assert len(found) > 3 or path.name not in ("README.md", "results.md", "course.md")
    for name, argv in found:
        main(name, argv)


SMALL = {  # added to a command: as few frames, pixels and steps as it takes
    "pretrain": "--steps 2 --batch 4 --global-size 28 --local-size 28 --local-crops 2 --prototypes 16 "
                "--head-hidden 32 --export-every 1 --device cpu",
    "curate": "--target 4 --sharp 0 9 --workers 0 --device cpu",
    "vit": "--size 28",
    "predict": "--overlays 2 --device cpu",
    "bench cost": "--archs vitt14",  # the rest of bench.py measures, for minutes to hours
    "probe_classify": "--size 28 --splits 1 --device cpu",
    "probe_mes": "--size 28 --splits 1 --device cpu",
    "probe_segment": "--size 28 --boosted-size 28 --scales 1 --steps 2 --heads linear boosted "
                     "--device cpu"}


@pytest.fixture
def laid_out(tmp_path, monkeypatch, synthetic_set, few_draws, fake_ffmpeg):  # noqa: F811
    """A folder with all that the README's commands name, from synthetic frames of 64 pixels; it is the
    working directory, on one thread. A third of the blocks are enough."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vit.ARCHS, "vitt14", vit.ARCHS["vitt14"] | {"depth": 4})
    (tmp_path / "data").mkdir()
    (tmp_path / "data/synthetic").symlink_to(synthetic_set)
    for name in ("Kvasir-SEG", "hyper-kvasir", "LIMUC"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "data/synthetic" / name)
    (tmp_path / "data/CVC-ClinicDB").symlink_to(tmp_path / "data/synthetic/scope2/Kvasir-SEG")
    for name, video in (("a", "video0000"), ("b", "video0001")):
        (tmp_path / "frames" / name).mkdir(parents=True)
        frames = sorted((tmp_path / "data/synthetic/unlabelled" / video).iterdir())
        for i, frame in enumerate(frames):
            shutil.copy(frame, tmp_path / "frames" / name / f"{i + 1:06d}.jpg")
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(b"a film")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def test_commands_run(laid_out, capsys, request):
    """The commands of the results and of the README, small; two steps of a tiny backbone stand for
    every published run and for DINOv2's weights. Each script ends with a command that can be pasted."""
    results = commands((ROOT / "docs/results.md").read_text())
    trained_first = sorted(results, key=lambda command: command[0] != "pretrain")
    ran = []
    for name, argv in [*trained_first, *commands(README.read_text())]:
        flags = SMALL.get(f"{name} {argv[0]}" if name == "bench" else name)
        if flags is None:
            assert name in ("bench", "docs.study"), name  # the study has tests of its own
            continue
        argv = [re.sub(r"teacher_\d+", "teacher_2", word) for word in argv]
        argv = [re.sub("^vits14$", "vitt14", word.replace("vitb14", "vitt14")) for word in argv]
        argv = [re.sub("^dinov2_vitt14$", "dinov2_vitt14.pth", word) for word in argv]  # fetch nothing
        if "--curve" in argv or "--histogram" in argv:
            flags = "--size 28 --device cpu"
        for word in argv:
            if re.match(r"dinov2_\w+\.pth$", word) and not pathlib.Path(word).exists():
                vit.export_backbone(word, vit.build_vit("vitt14", image_size=28))
        importlib.import_module(name).main(argv + flags.split())
        ran.append((name, capsys.readouterr().out))
    assert {name for name, _ in ran} == {key.split()[0] for key in SMALL}
    probed = [out for name, out in ran if name.startswith("probe") and "checkpoint | step" not in out]
    assert all(re.search(r"^\| random initialisation .*\d\.\d{3}", out, re.M) for out in probed)
    runs = "adapt-224-seed0", "nothing-vits14", "vitt14-adapt", "vitt14-scratch"
    made = ["curated/manifest.csv", "tokens.png", "annotated.mp4", "runs/adapted-cpu/*.png"]
    assert all(list(laid_out.glob(name)) for name in made + [f"runs/{r}/teacher_2.pt" for r in runs])
    request.getfixturevalue("parsers")  # from here on a script reads its flags and no more
    closing = {name: found for name, out in ran
               if (found := re.findall(r"^(?:next:|     ) ((?:torchrun|python) .*)$", out, re.M))}
    assert {"curate", "pretrain", "probe_classify", "probe_mes", "probe_segment"} <= closing.keys()
    for name, argv in commands("```bash\n" + "\n".join(sum(closing.values(), [])) + "\n```"):
        assert os.path.exists(argv[0]) or name == "pretrain"
        main(name, argv)


@texts
def test_flags_in_prose_exist(path, parsers):
    for name in SCRIPTS[:-1]:
        with contextlib.suppress(SystemExit):  # one of them wants arguments
            main(name, [])
    for what in importlib.import_module("bench").COMMANDS:
        main("bench", [what])
    known = {flag for parser in parsers for flag in parser._option_string_actions} | FOREIGN_FLAGS
    assert not set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text())) - known


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_and_a_wrong_flag(name, capsys):
    module = importlib.import_module(name)
    for argv, code in ((["--help"], 0), (["--no-such-flag"], 2)):
        with pytest.raises(SystemExit) as end:
            module.main(argv)
        assert end.value.code == code, argv
    assert "usage:" in capsys.readouterr().out


def test_nothing_is_promised():
    for path in PAGES:
        assert not re.search(r"\b(TODO|TBD|FIXME|XXX|lorem)\b", path.read_text()), path
    pictures = [path for path in ROOT.glob("docs/*") if path.suffix in (".png", ".jpg")]
    assert 0 < sum(path.stat().st_size for path in pictures) < 2**20


# --- the course, and one step --------------------------------------------------------------------


def assert_printed(out, said):
    """Word by word the same; numbers with a point to rounding."""
    found, said = (re.findall(r"-?\d+\.\d+|\w+", text) for text in (out, said))
    assert len(found) == len(said)
    for a, b in zip(found, said):
        assert float(a) == pytest.approx(float(b), rel=0.02, abs=2e-4) if "." in b else a == b


def lessons():
    """{number: text}."""
    return dict(re.findall(r"^## (\d+)\. .*?\n(.*?)(?=^## |\Z)", COURSE.read_text(), re.M | re.S))


@pytest.mark.parametrize("number", lessons())
def test_lesson_prints_what_it_says(number):
    blocks = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", lessons()[number], re.S)
    code, printed = blocks.groups()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert_printed(out.getvalue(), printed)


@pytest.mark.parametrize("number", lessons())
def test_faults_can_be_planted_and_name_their_test(number):
    lesson = lessons()[number]
    file = re.search(r"Fault, in `([\w/.]+)`", lesson)[1]
    faults = re.findall(r"```diff\n-(.*)\n\+(.*)\n```", lesson)
    assert faults and len(faults) == len(re.findall(r"`tests/test_\w+\.py::\w+`", lesson))
    for line, fault in faults:
        lines = (ROOT / file).read_text().split("\n")
        assert lines.count(line) == 1, f"{file} does not have the line {line}"
        ast.parse((ROOT / file).read_text().replace(line, fault))


def test_step_page_says_what_the_code_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = importlib.import_module("docs.step")
    step.main(["--out", str(tmp_path)])
    folders = ROOT / "docs", tmp_path
    old, new = (step.CODE.findall((folder / "step.md").read_text()) for folder in folders)
    assert len(old) == 10
    for (code, said), (same, out) in zip(old, new, strict=True):
        assert code == same
        assert_printed(out, said)
    for name in ("step-crops.jpg", "step-targets.png"):
        assert len({Image.open(folder / name).size for folder in folders}) == 1


@pytest.mark.parametrize("arch", ["vitt14", "vits14_reg4"])
def test_plain_pytorch_reads_the_export(arch, tmp_path, filled):
    """What docs/help.md says of it, and of timm's models: the names are the released ones."""
    vit, text = importlib.import_module("vit"), (ROOT / "docs/help.md").read_text()
    model, names = filled(vit.build_vit(arch, image_size=56)).eval(), {}
    vit.export_backbone(tmp_path / "OUT.pth", model)
    weights = torch.load(tmp_path / "OUT.pth", weights_only=True)
    exec(re.search(r"```python\n(import torch\n.*?def tokens.*?)```", text, re.S)[1], names)
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.cat([model(images)["cls"][:, None], *list(model(images).values())[1:]], 1)
        found = names["tokens"](weights, images, heads=model.dim // 64)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# --- the demonstration ---------------------------------------------------------------------------

STUB = """import pathlib, sys
words = sys.argv[1:]
with open("calls.txt", "a") as calls:
    print(*words, sep="\\t", file=calls)
print("table of", words[0])
stop = pathlib.Path("stop.txt")
if stop.exists() and stop.read_text() == words[0]:
    stop.unlink()
    sys.exit(0 if words[0] == "pretrain.py" else 130)  # a signal lets pre-training end well, early
if "--show" in words or "--sheet" in words:
    pathlib.Path(words[-1]).touch()
out = pathlib.Path(words[words.index("--out") + 1] if "--out" in words else ".")
if words[0] == "pretrain.py":
    (out / f"teacher_{words[words.index('--steps') + 1]}.pt").touch()
if words[0] == "predict.py":
    (out / "overlays").mkdir(parents=True)
    (out / "timeline_a.png").touch(), (out / "overlays/a.jpg").touch()
if words[0] == "curate.py":
    out.mkdir(parents=True)
    (out / "sheet.png").touch()
"""


def test_adapt_hands_its_arguments_on(tmp_path, parsers):
    """Its commands by the same stand-in for Python, and its manifest by Python itself: all flags exist,
    the training images of Kvasir-SEG are trained on, those of val.txt are looked at."""
    folder = tmp_path / "a folder with spaces"
    for name in ("videos/a", "Kvasir-SEG/images", "Kvasir-SEG/masks"):
        (folder / name).mkdir(parents=True)
    (folder / "videos/a/000001.jpg").touch()
    for stem, kind in itertools.product("t1 t2 v1 v2 v3 v4 v5".split(), ("images", "masks")):
        Image.new("L", (8, 8)).save(folder / f"Kvasir-SEG/{kind}/{stem}.jpg")
    for name, stems in (("train", "t1 t2"), ("val", "v1 v2 v3 v4 v5")):
        (folder / f"Kvasir-SEG/{name}.txt").write_text("\n".join(stems.split()) + "\n")
    (folder / "stub.py").write_text(STUB)
    (folder / "stop.txt").write_text("nothing")
    python = folder / "python"
    real = shlex.quote(sys.executable)
    python.write_text(f'#!/bin/sh\nif [ "$1" = - ]; then exec {real} "$@"; fi\n'
                      f'exec {real} stub.py "$(basename "$1")" "${{@:2}}"\n'.replace("/bin/sh", "/bin/bash"))
    python.chmod(0o755)

    def adapt(*words):
        env = dict(os.environ, PYTHON=str(python), ADAPT_FLAGS="--steps 7")
        return subprocess.run(["bash", str(ROOT / "adapt.sh"), *words], env=env, cwd=folder, text=True,
                              capture_output=True)
    assert adapt("w.pth").returncode == 2 and "KVASIR_SEG" in adapt("w.pth").stderr
    done = adapt("w.pth", "videos", "Kvasir-SEG", "other", "grades")
    assert done.returncode == 0, done.stderr
    rows = (folder / "runs/adapted/frames.csv").read_text().splitlines()
    assert [row.rsplit("/", 1)[1] for row in rows[1:]] == [
        "000001.jpg,a", "t1.jpg,Kvasir-SEG t1", "t2.jpg,Kvasir-SEG t2"]
    calls = [line.split("\t") for line in (folder / "calls.txt").read_text().splitlines()]
    assert [call[0] for call in calls] == ["pretrain.py", "probe_segment.py", "probe_mes.py", "vit.py"]
    for script, *argv in calls:
        main(script.removesuffix(".py"), argv)
    steps = [value for flag, value in itertools.pairwise(calls[0]) if flag == "--steps"]
    assert steps == ["450", "7"][torch.cuda.is_available():]  # of the two the last holds
    assert "Kvasir-SEG/images/v4.jpg" in calls[3] and "Kvasir-SEG/images/v5.jpg" not in calls[3]
    (folder / "empty").mkdir()
    assert "empty: no images here" in adapt("w.pth", "empty", "Kvasir-SEG").stderr


def test_demo_goes_on_where_it_was_stopped(tmp_path, parsers):
    """Its commands by a stand-in for Python that notes them: stopped in each stage once, no stage is done
    twice, and all flags exist."""
    folder = tmp_path / "a folder with spaces"
    for name in ("data/synthetic/Kvasir-SEG/images", "runs/demo-7"):
        (folder / name).mkdir(parents=True)
    shutil.copy(DEMO, folder)
    python = folder / "python"
    (folder / "stub.py").write_text(STUB)
    # by a shell, because a #! line does not bear a path with spaces
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" stub.py "$@"\n')
    python.chmod(0o755)
    for i in range(5):
        (folder / f"data/synthetic/Kvasir-SEG/images/patient{i}_0.jpg").touch()

    def demo(script=folder / "demo.sh", python=python):
        env = dict(os.environ, PYTHON=str(python), DEMO_STEPS="7")
        return subprocess.run(["bash", str(script)], env=env, text=True, capture_output=True)
    stages = ["synthetic.py", "curate.py", "pretrain.py", "probe_classify.py", "probe_segment.py",
              "probe_mes.py", "predict.py"]
    for stage in stages:
        (folder / "stop.txt").write_text(stage)
        assert demo().returncode == 130
    done = demo()
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(f"table of {name}") for name in stages[3:5]] == [1, 1]
    assert re.search(r"Pictures:\n(.*\.(png|jpg)\n)+$", done.stdout)
    calls = [line.split("\t") for line in (folder / "calls.txt").read_text().splitlines()]
    own = "-", "-c"  # the demonstration's own lines of Python
    scripts = [call[0] for call in calls if call[0] not in own]
    pictures = ["data.py", "vit.py", "probe_mes.py", "probe_mes.py"]
    assert scripts == [s for s in stages for _ in range(2)] + pictures
    for script, *argv in calls:
        if script not in own:
            main(script.removesuffix(".py"), argv)
    again = demo()
    assert again.returncode == 0
    assert len((folder / "calls.txt").read_text().splitlines()) == len(calls) + 2
    missing = demo(DEMO, "/nowhere/python")
    assert missing.returncode == 1 and "PYTHON=/nowhere/python cannot import" in missing.stderr
