"""Runs curate.py in several processes of this machine, as torchrun does, but forked: torch is imported once.

    python tests/curate_worker.py plan.json      [[processes, [module, function] or null, [flags]], ...]

The named function kills the last process at its second call, or at its first if it is called once.
Prints one line per run: "done" or "killed".
"""
import json
import os
import socket
import sys

import torch.multiprocessing as mp

import clusters
import curate


def one(rank, world, port, dies, argv):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    curate.BATCH = 8
    curate.SAMPLE = clusters.SAMPLE = 48  # fewer than there are frames
    clusters.CHUNK = 4 * 4 * 120  # 4 rows: every stage has several chunks
    if dies and rank == world - 1:
        module, calls = {"curate": curate, "clusters": clusters}[dies[0]], []
        real = getattr(module, dies[1])

        def fatal(*args, **kwargs):
            calls.append(1)
            if len(calls) == 2 or dies[1] not in ("quality", "assign"):
                os._exit(7)
            return real(*args, **kwargs)
        setattr(module, dies[1], fatal)
    if world == 1:
        del os.environ["WORLD_SIZE"]
    curate.main(argv)


def main(plan):
    for world, dies, argv in json.load(open(plan)):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        try:
            mp.start_processes(one, (world, port, dies, argv), world, start_method="fork")
            print("done", flush=True)
        except mp.ProcessExitedException:
            print("killed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
