"""Processes that start as copies of this one: importing torch and transformers takes each other process seconds."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable

import torch


def forked(*calls: Callable[[], object], as_ranks: bool = False) -> tuple[list[int], str]:
    """Make every call in a process of its own, of one thread, at once; their exit codes and all that they print.

    Args:
        as_ranks: as torchrun does it: with the environment of one launch's processes, and all end where one fails.
    """
    environment = {}
    if as_ranks:
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        environment = {"WORLD_SIZE": len(calls), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    children, told = [], os.memfd_create("told", 0)
    for rank, call in enumerate(calls):
        child = os.fork()
        if not child:
            own = environment and {**environment, "RANK": rank, "LOCAL_RANK": rank}
            _end_with(call, told, {name: str(value) for name, value in own.items()})
        children.append(child)
    codes = dict[int, int]()
    while len(codes) < len(children):
        for child in children:
            if child not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[child] = os.waitstatus_to_exitcode(ended[1])
        if as_ranks and any(codes.values()):
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    with open(told, "rb") as file:
        file.seek(0)
        return [codes[child] for child in children], file.read().decode()


def _end_with(call: Callable[[], object], told: int, environment: dict[str, str]) -> None:
    code = 1
    try:
        for standard in (1, 2):
            os.dup2(told, standard)
        sys.stdout, sys.stderr = (os.fdopen(standard, "w", buffering=1, closefd=False) for standard in (1, 2))
        os.environ.update(environment)
        torch.set_num_threads(1)  # the threads of this process's parent are not in it
        code = call() or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # os._exit() below would end the process without a word
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
