"""What works beside the tests, as a core of two would be idle otherwise: processes of their own that
some tests look at, and a second process that runs tests as the first does."""
import ast
import importlib.util
import itertools
import multiprocessing
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch

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


def wanted():
    """Not in a process that is one of them, nor in the second."""
    return (os.environ.get("TRITON_INTERPRET") != "1" and importlib.util.find_spec("triton")
            and multiprocessing.current_process().name != SECOND)


@pytest.fixture(scope="session", autouse=True)
def children(request, tmp_path_factory):
    """Those of CHILDREN whose tests were asked for, one after the other, so that a core and the memory
    of one are enough: the shell that runs them and {key: file of the output}; "<file>.code" gets the
    exit code."""
    asked = dict.fromkeys(filter(None, map(child_of, request.session.items)))
    if not wanted():
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


# --- the second process ------------------------------------------------------------------------

SECOND = "second"


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """Two processes, of which each takes the next file that nobody has taken; what the second finds,
    the first says. pytest's own loop where there is one file, one core, a debugger, or a GPU, as a
    process that has seen one bears no fork."""
    config = session.config
    alone = config.option.collectonly or config.option.usepdb or session.testsfailed
    files = [list(tests) for _, tests in itertools.groupby(
        session.items, lambda item: (item.path, child_of(item) is not None))]
    last = [tests for tests in files if child_of(tests[0])]  # their processes are the first's
    shared = [tests for tests in files if not child_of(tests[0])]
    if alone or len(shared) < 2 or cores() < 2 or torch.cuda.is_available():
        return None
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(cores() // 2)  # of this one's own, and of all that it starts
        torch.set_num_threads(cores() // 2)
    config._tmp_path_factory.getbasetemp()  # one for both
    untaken, end = os.pipe()
    os.write(end, bytes(range(len(shared))))
    os.close(end)
    with tempfile.NamedTemporaryFile() as reports:
        second = multiprocessing.get_context("fork").Process(
            target=run_second, name=SECOND, args=(session, shared, untaken, reports.name))
        second.start()
        try:
            for tests in itertools.chain(taken(shared, untaken), last):
                run(session, tests)
                hand_over(config, reports)
                if session.shouldfail:
                    raise session.Failed(session.shouldfail)
                if session.shouldstop:
                    raise session.Interrupted(session.shouldstop)
            second.join()
        finally:
            second.kill()
        hand_over(config, reports)
    if second.exitcode:
        session.shouldfail = f"the second process ended with code {second.exitcode}"
        raise session.Failed(session.shouldfail)
    return True


def taken(files, untaken):
    """Those files of a list that this process is the first to ask for: a byte of the pipe for each."""
    while byte := os.read(untaken, 1):
        yield files[byte[0]]


def run(session, tests):
    """The tests of one file. A test that is called the next one, of any other file, makes pytest end
    what the file's tests share."""
    other = next(item for item in session.items if item.path != tests[0].path)
    for item, following in zip(tests, [*tests[1:], other]):
        if not session.shouldfail and not session.shouldstop:
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)


def run_second(session, files, untaken, reports):
    """The second process: it says nothing, and writes each report as a line of Python,
    as JSON knows no tuples."""
    plugins, config = session.config.pluginmanager, session.config
    plugins.unregister(name="terminalreporter")
    capture = plugins.getplugin("capturemanager")
    capture.stop_global_capturing()  # into the files of the first
    capture.start_global_capturing()
    capture.suspend_global_capture()
    with open(reports, "a", encoding="utf-8", buffering=1) as file:
        class Reports:
            def pytest_runtest_logreport(self, report):
                found = config.hook.pytest_report_to_serializable(config=config, report=report)
                print(repr(found), file=file)
        plugins.register(Reports())
        first = os.getppid()
        for tests in itertools.takewhile(lambda _: os.getppid() == first, taken(files, untaken)):
            run(session, tests)
        plugins.getplugin("runner").pytest_sessionfinish(session)  # ends what all tests share


def hand_over(config, reports):
    """Say what the second process has found since, as if it had been found here."""
    while (line := reports.readline()).endswith(b"\n"):
        hook = config.hook
        report = hook.pytest_report_from_serializable(config=config, data=ast.literal_eval(line.decode()))
        if report.when == "setup":
            hook.pytest_runtest_logstart(nodeid=report.nodeid, location=report.location)
        hook.pytest_runtest_logreport(report=report)
        if report.when == "teardown":
            hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)
    reports.seek(-len(line), os.SEEK_CUR)  # the half of a line
