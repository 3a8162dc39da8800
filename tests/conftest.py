"""What every test shares: where the official numbers lie, how weights and inputs are made from their
names, one small set of synthetic frames, and what works in processes of its own beside the tests."""
import importlib.util
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

# with torch.use_deterministic_algorithms cuBLAS refuses every product unless this is set
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

REFERENCE = pathlib.Path(__file__).parent / "reference"
sys.path.insert(0, str(REFERENCE))  # fill.py lies beside the numbers that were made with it
from fill import array, fill_value  # noqa: E402


# Half a minute each, on a core that is idle otherwise: they start with the first test, and the tests
# that look at them come last. {(file, test): what Python is to run}
AGAIN = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
CHILDREN = {
    ("test_attention.py", "test_again_with_kernels_interpreted"): [*AGAIN, "tests/test_attention.py"],
    ("test_prototype_loss.py", "test_again_with_kernels_interpreted"): [
        *AGAIN, "tests/test_prototype_loss.py"],
    ("test_attention.py", "test_compiled_for"): [
        "tests/attention_aot.py", "90:bfloat16:257,50,1370", "80:bfloat16:257,50"]}


def child_of(item):
    key = item.path.name, getattr(item, "originalname", None)
    return key if key in CHILDREN else None


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: child_of(item) is not None)  # the others keep their order


@pytest.fixture(scope="session", autouse=True)
def children(request, tmp_path_factory):
    """Those of CHILDREN whose tests were asked for, one after the other, so that a core and the memory
    of one are enough: the shell that runs them and {key: file of the output}; "<file>.code" gets the
    exit code."""
    asked = dict.fromkeys(filter(None, map(child_of, request.session.items)))
    if os.environ.get("TRITON_INTERPRET") == "1" or not importlib.util.find_spec("triton"):
        asked = {}
    folder, lines, outputs = tmp_path_factory.mktemp("children"), ["true"], {}
    for i, key in enumerate(asked):
        outputs[key] = folder / f"{i}.txt"
        more = ["env", "TRITON_INTERPRET=1"] if "interpreted" in key[1] else []
        command = shlex.join([*more, sys.executable, *CHILDREN[key]])
        lines.append(f"{command} > {outputs[key]} 2>&1; echo $? > {outputs[key]}.code")
    shell = subprocess.Popen(
        ["sh", "-c", "\n".join(lines)], cwd=pathlib.Path(__file__).parents[1], start_new_session=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    yield shell, outputs
    if shell.poll() is None:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()


@pytest.fixture
def child(request, children):
    """(exit code, output) of the process that this test looks at."""
    shell, outputs = children
    output = outputs[child_of(request.node)]
    code = output.with_name(f"{output.name}.code")
    while shell.poll() is None and not (code.exists() and code.read_text()):
        time.sleep(0.2)
    return int(code.read_text()), output.read_text()


@pytest.fixture(scope="session")
def synthetic_set(tmp_path_factory):
    """The embedded data set, small: 2 videos of 6 frames, a twentieth of the patients, all 64 px. Made
    once for all tests, which only read it."""
    import synthetic
    root = tmp_path_factory.mktemp("synthetic") / "set"
    return synthetic.ensure(root, videos=2, frames=6, scale=.05, size=64, workers=0)


@pytest.fixture
def few_draws(monkeypatch):
    """Probes with 20 draws in each interval, 2 of few labels and 2 settings a head: all of their code
    in a tenth of the time, for tests that do not look at the numbers."""
    import probe_classify
    import probe_mes
    import probe_segment
    import results
    interval = results.bootstrap_interval
    monkeypatch.setattr(
        results, "bootstrap_interval", lambda *a, **k: interval(*a, **k | {"n": 20}))
    for module in (results, probe_segment):
        monkeypatch.setattr(module, "DRAWS", 2)
    for module in (probe_classify, probe_mes):
        heads = {name: (fit, settings[:2]) for name, (fit, settings) in module.HEADS.items()}
        monkeypatch.setattr(module, "HEADS", heads)


@pytest.fixture
def reference():
    """reference("losses") -> the arrays of tests/reference/losses.npz."""
    return lambda name: np.load(REFERENCE / f"{name}.npz")


@pytest.fixture
def filled():
    """filled(module, prefix="") gives every tensor of its state dict the reference value of its name;
    returns the module."""
    def fill(module, prefix=""):
        state = module.state_dict()
        module.load_state_dict({
            k: torch.from_numpy(fill_value(prefix + k, v.shape)) for k, v in state.items()})
        return module
    return fill


@pytest.fixture
def named_input():
    """named_input("headgrad0", (10, 97)) -> the standard-normal float32 tensor of that name."""
    return lambda name, shape: torch.from_numpy(array(name, tuple(shape)))
