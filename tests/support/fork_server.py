"""Server that starts Python programs as copies of a process that has imported torch and Lightning.

Importing them takes 3 to 4 s of CPU time, more than most runs of the tests. `processes.start_python` is the client. A
program gets its own arguments, folder, environment, module path and descriptors, a newly seeded NumPy and no module of
Levin. It becomes a child of the client. Unlike in a new interpreter, libraries are imported already, so they have read
their settings (OpenMP, MuJoCo), and all copies share the seed of Python's hashes. `forked=False` starts a new one.
`preloaded` names more modules that the server imports, with the module path of the first program that asks for them.
"""

import gc
import importlib
import json
import os
import runpy
import socket
import sys
import time
import types

import numpy as np

PRELOADED = ("lightning", "torchrl.envs", "torchrl.collectors", "torchrl.data", "wandb", "hydra", "gymnasium.vector")


def receive_request(connection: socket.socket) -> dict:
    """Wait for requests, and fork for each: the copy returns the request. The server exits when its client does."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            sys.exit()
        helper = os.fork()  # its child becomes one of the client's when the helper exits
        if not helper:
            helper = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == helper:
                time.sleep(0.0005)
            connection.send(f"{os.getpid()} {os.getppid()}".encode())
            connection.close()
            for target, descriptor in enumerate(descriptors):
                os.dup2(descriptor, target)
                os.close(descriptor)
            return json.loads(message)
        os.waitpid(helper, 0)
        for descriptor in descriptors:
            os.close(descriptor)


def run_program(words: list[str], cwd: str, env: dict[str, str], new_session: bool, base: list[str]) -> None:
    """Run `python <words>`: `-m module`, `-c code` or a script, with its arguments."""
    if new_session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    np.random.seed()
    sys.modules.pop("__mp_main__", None)  # multiprocessing's name for this script
    path = [each for each in env.get("PYTHONPATH", "").split(os.pathsep) if each]
    if words[0] == "-m":
        sys.path[:] = [os.getcwd(), *path, *base]
        sys.argv[:] = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path[:] = ["", *path, *base]
        sys.argv[:] = ["-c", *words[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main))
    else:
        sys.path[:] = [os.path.dirname(os.path.abspath(words[0])), *path, *base]
        sys.argv[:] = words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    for name in (*PRELOADED, *sys.argv[2:]):
        importlib.import_module(name)
    os.fsync = lambda _: None  # as in conftest.py
    gc.freeze()  # or the garbage collector writes into the pages that copies share
    own = {sys.path[0], *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    base = [each for each in sys.path if each not in own]
    server = socket.socket(fileno=int(sys.argv[1]))
    run_program(**receive_request(server), base=base)
