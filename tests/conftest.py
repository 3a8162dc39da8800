"""What every test shares: where the official numbers lie, how weights and inputs are made from their
names, one small set of synthetic frames."""
import os
import pathlib
import sys

import numpy as np
import pytest
import torch

# with torch.use_deterministic_algorithms cuBLAS refuses every product unless this is set
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

REFERENCE = pathlib.Path(__file__).parent / "reference"
sys.path.insert(0, str(REFERENCE))  # fill.py lies beside the numbers that were made with it
from beside import (child, children, pytest_collection_modifyitems,  # noqa: E402, F401
                    pytest_runtestloop)
from fill import array, fill_value  # noqa: E402


@pytest.fixture(scope="session")
def synthetic_set(tmp_path_factory):
    """The embedded data set, small: 2 videos of 6 frames, a twentieth of the patients, all 64 px. Made
    once for all tests, which only read it, by whichever process asks first: the other waits."""
    import synthetic
    root = tmp_path_factory.getbasetemp() / "synthetic" / "set"
    return synthetic.ensure(root, videos=2, frames=6, scale=.05, size=64, workers=0)


@pytest.fixture(scope="session", autouse=True)
def loose_pictures():
    """PNG files are packed loosely: tightly takes a quarter of some tests."""
    import figures
    save = figures.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", lambda picture, path, **options: save(
            picture, path, **{"compress_level": 1} | options))
        yield


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
