"""Processes for tests, forked from one that has imported what they run: to import torch takes a core
for seconds."""
import multiprocessing
import os
import pathlib
import sys
import tempfile
from multiprocessing import forkserver

import pytest

TESTS = pathlib.Path(__file__).parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "pretrain", "predict", "torch.distributed.run"])


def begin(output, env, new_session, function, args):
    """All that a forked process does."""
    if new_session:
        os.setsid()
    os.environ.clear()
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    function(*args)


def fork(function, *args, env=os.environ, new_session=False):
    """A started multiprocessing.Process that calls the function, which it finds by its name;
    process.output is a file with what it prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{TESTS.parent}{os.pathsep}{TESTS}")
        forkserver.ensure_running()
    output = tempfile.NamedTemporaryFile("r")
    how = output.name, dict(env), new_session, function, args
    process = FORKS.Process(target=begin, args=how)
    process.start()
    process.output = output
    return process


def both(function, *args):
    """function(rank, *args) in two processes that are to end well."""
    processes = [fork(function, rank, *args) for rank in range(2)]
    try:
        for process in processes:
            process.join(240)
            assert process.exitcode == 0, process.output.read()
    finally:
        for process in processes:  # one of them may wait for another that has failed
            process.kill()
