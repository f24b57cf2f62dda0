"""Server that starts Python programs as copies of a process that has imported torch and Lightning.

Importing them takes 3 to 4 s of CPU time, more than most runs of the tests. `processes.start_python` is the client. A
program finds what a new interpreter gives it: its own arguments, folder, environment, module path and descriptors, and
no module of Levin. It is a child of the client, not of this server. Only settings that OpenMP reads when torch is
imported have no effect.
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
from pathlib import Path

PRELOADED = ("lightning", "torchrl.envs", "torchrl.collectors", "torchrl.data", "wandb", "hydra", "gymnasium.vector")


def receive_request(connection: socket.socket) -> dict:
    """Fork for each request, and return it in the copy. The process of the server ends here, with its client."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not message:
            sys.exit()
        between = os.fork()
        if not between:
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:  # until the client is the parent, and can wait for this process
                time.sleep(0.0005)
            connection.send(str(os.getpid()).encode())
            connection.close()
            for target, descriptor in enumerate(descriptors):
                os.dup2(descriptor, target)
                os.close(descriptor)
            return json.loads(message)
        os.waitpid(between, 0)
        for descriptor in descriptors:
            os.close(descriptor)


def run_program(words: list[str], cwd: str, env: dict[str, str], new_session: bool, base: list[str]) -> None:
    """Run `python <words>`: `-m module`, `-c code` or a script, with its arguments."""
    if new_session:
        os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
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
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__file__ = words[0]
        exec(compile(Path(words[0]).read_bytes(), words[0], "exec"), vars(main))


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()  # or the garbage collector writes into the pages that copies share
    own = {sys.path[0], *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    base = [each for each in sys.path if each not in own]
    server = socket.socket(fileno=int(sys.argv[1]))
    run_program(**receive_request(server), base=base)
