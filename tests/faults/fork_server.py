"""Starts ranks of `pipeline.train` in milliseconds: a server that has imported everything forks.

A new interpreter spends seconds on importing torch: a campaign of hundreds of kills would spend
hours on it, and the tests of distributed runs most of their time. The server only imports: it has
one thread, no process group and no Accelerate state, so a child is what a new process is after its
imports; and it is a process of its own, whose log, exit status and death by signal are its own.
Hash seeds alone are shared, so some lives of a campaign are started as new processes.
"""

import json
import os
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Rank:
    """A process that runs `python -m MODULE`, started by the server or by itself."""

    def __init__(self, pid: int, owner: "ForkServer | subprocess.Popen[bytes]") -> None:
        self.pid = pid
        self.owner = owner
        self.pidfd = os.pidfd_open(pid)
        """readable once the process has ended; nobody else can get the pid before `wait`"""
        self._status: int | None = None

    def ends_within(self, seconds: float) -> bool:
        """Waits for the end, at most so long."""
        return self._status is not None or bool(select.select([self.pidfd], [], [], seconds)[0])

    def kill(self) -> None:
        """Nothing when it has been waited for."""
        if self._status is None:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def wait(self) -> int:
        """Waits for the end; returns the exit status, or minus the signal's number."""
        if self._status is None:
            if isinstance(self.owner, ForkServer):
                self._status = int(self.owner.ask(wait=self.pid))
            else:
                self._status = self.owner.wait()
            os.close(self.pidfd)
        return self._status


class ForkServer:
    """The client's side. Leaving the `with` block ends the server and all that it started."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-W", "error", __file__],
            cwd=ROOT,
            env=_environment({}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.communicate()

    def ask(self, **request: Any) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError("the fork server ended; its traceback is on stderr")
        return json.loads(answer)

    def start(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        module: str = "pipeline.train",
    ) -> Rank:
        full = _environment(environment)
        return Rank(self.ask(start=[module, *words], environment=full, log=str(log)), self)


def start_fresh(words: Sequence[str], environment: Mapping[str, str], log: Path) -> Rank:
    """The same process, started by exec."""
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "pipeline.train", *words],
            cwd=ROOT,
            env=_environment(environment),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Rank(process.pid, process)


def _environment(added: Mapping[str, str]) -> dict[str, str]:
    """This process's own, with this checkout's packages before any installed ones."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **added}


def serve() -> list[str] | None:
    """Answers requests until the client is gone; returns, in each child, its module and its
    arguments."""
    answers = os.dup(1)
    os.dup2(2, 1)
    children: set[int] = set()
    # Not sys.stdin: what its buffer holds would be copied into children.
    with os.fdopen(os.dup(0), "rb", buffering=0) as requests:
        for line in requests:
            request = json.loads(line)
            if "wait" in request:
                pid = request["wait"]
                answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                children.discard(pid)
            else:
                threads = list(Path("/proc/self/task").iterdir())
                assert len(threads) == 1, "a fork would lose threads"
                answer = os.fork()
                if answer == 0:
                    os.close(answers)
                    return _become(request)
                children.add(answer)
            os.write(answers, json.dumps(answer).encode() + b"\n")
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return None


def _become(request: Mapping[str, Any]) -> list[str]:
    """In the child: what exec and the shell's redirections would have set."""
    words: list[str] = request["start"]
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(nothing)
    os.close(log)
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = words
    return words


def main() -> int:
    import torch._dynamo  # takes a second, on first use by an optimizer
    import torch.distributed.algorithms.ddp_comm_hooks.default_hooks  # on first use, by DDP
    from accelerate.state import PartialState

    import pipeline.train
    import pipeline.validate  # noqa: F401

    assert not PartialState._shared_state
    assert not torch.distributed.is_initialized()
    words = serve()
    if words is None:
        return 0
    sys.modules.pop(words[0], None)  # `runpy` warns of what has been imported
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
