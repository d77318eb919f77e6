"""A prefill or decode worker in a process of its own that obeys one JSON command a line; see ``RemoteSide``."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import msgspec

from mooncake_plugins.handoff import HandoffOptions, Ticket
from mooncake_plugins.transports import _vectored
from tests.handoff.harness import DecodeSide, Memory, PrefillSide, wait_until

ROOT = Path(__file__).parents[2]


class Child:
    """State of the child, one method a command."""

    def __init__(self, role: str, memory: dict[str, int], options: dict[str, Any]) -> None:
        make = {"prefill": PrefillSide, "decode": DecodeSide}[role]
        self.side: Any = make(transport="tcp", memory=Memory(**memory), options=HandoffOptions(**options))

    def ticket(self) -> dict[str, Any]:
        ticket: dict[str, Any] = msgspec.to_builtins(msgspec.structs.asdict(self.side.ticket()))
        return ticket

    def prefill(self, transfer: str, prompt: str, ids: list[int]) -> None:
        self.side.prefill(transfer, prompt.encode(), ids)

    def chunk(self, transfer: str, prompt: str, ids: list[int], first: int, after: int) -> None:
        self.side.chunk(transfer, prompt.encode(), ids, first, after)

    def fill(self, ids: list[int], value: int) -> None:
        self.side.memory.fill(ids, value)

    def pull(self, ticket: dict[str, Any], prompt: str, ids: list[int]) -> str:
        request: str = self.side.pull(Ticket(**ticket), prompt.encode(), ids)
        return request

    def result(self, request: str) -> dict[str, Any]:
        return asdict(self.side.result(request))

    def counters(self) -> dict[str, int]:
        return dict(self.side.service.counters)

    def live_transfers(self) -> int:
        live: int = self.side.service.live_transfers
        return live

    def stop_after(self, call: str, nth: int) -> None:
        """Stop this process (SIGSTOP) right after its nth bulk system call ``send`` or ``recv`` from now on."""
        original = getattr(_vectored.Vector, call)
        left = [nth]

        def counted(*arguments: Any) -> int:
            moved: int = original(*arguments)
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGSTOP)
            return moved

        setattr(_vectored.Vector, call, counted)


def main() -> None:
    """Obey until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # nothing but answers may go there
    child = Child(**json.loads(sys.argv[1]))
    print(json.dumps({"ok": None}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        result = getattr(child, command.pop("command"))(**command)
        print(json.dumps({"ok": result}), file=answers, flush=True)
    child.side.close()


class RemoteSide:
    """A worker in a child process that can be stopped, resumed and killed. Leaving the context kills it."""

    def __init__(self, role: str, *, memory: dict[str, int] | None = None, **options: Any) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        arguments = json.dumps({"role": role, "memory": memory or {}, "options": options})
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.handoff.child", arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=environment,
            bufsize=0,
        )
        self._received = b""

    def begin(self, command: str, **arguments: Any) -> None:
        """Send a command without waiting for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **arguments}).encode() + b"\n")

    def answer(self, timeout_s: float = 60) -> Any:
        """Return the answer of the oldest command that has none yet."""
        assert self._process.stdout is not None
        while b"\n" not in self._received:
            ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
            data = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            assert data, "the child gave no answer" if not ready else "the child ended"
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        return json.loads(line)["ok"]

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a command and return its answer."""
        self.begin(command, **arguments)
        return self.answer()

    def ticket(self) -> Ticket:
        return Ticket(**self.ask("ticket"))

    def freeze(self) -> None:
        """Stop the child, as a debugger or a swapping host would."""
        os.kill(self._process.pid, signal.SIGSTOP)
        self.wait_frozen()

    def wait_frozen(self) -> None:
        """Wait until it has stopped (by itself, after ``stop_after``)."""
        stat = Path(f"/proc/{self._process.pid}/stat")
        wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "the child to stop")

    def resume(self) -> None:
        """Let it go on."""
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait(20)

    def __enter__(self) -> Self:
        self.answer()
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


if __name__ == "__main__":
    main()
