"""Run one command, and see to it that nothing which it started outlives it or the supervisor.

    python -I _guard.py CONTROL_FD GRACE_S COMMAND [ARGUMENT…]

The supervisor holds the other end of the control pipe. When that end closes, because the supervisor ended in whatever
way (SIGKILL included), or when it says ``K``, everything below this process is stopped. Engines have several levels of
processes; a process that loses its parent becomes a child of this one (it is a "subreaper"), so none can escape, not
even by leaving the process group.

The exit status is that of the command; if a signal killed it, the same signal ends this process. Only the standard
library is imported, and only what is needed: this program is started once per part.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
STRAGGLER_GRACE_S = 3.0
NOT_FOUND, NOT_EXECUTABLE = 127, 126


def prctl(option: int, value: int) -> None:
    """Call prctl(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def start(command: list[str]) -> int:
    """Start the command in this process group and return its process id. It dies if this process dies."""
    guard = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = NOT_EXECUTABLE
    try:
        for number in (*IGNORED, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == guard:  # else it died before the line above
            os.execvp(command[0], command)
    except FileNotFoundError:
        code = NOT_FOUND
        os.write(2, f"mooncake: {command[0]}: no such program\n".encode())
    except OSError as error:
        os.write(2, f"mooncake: {command[0]}: {error}\n".encode())
    finally:
        os._exit(code)


def descendants() -> list[int]:
    """All processes below this one."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    after_name = file.read().rpartition(b")")[2].split()
            except OSError:  # it has just ended
                continue
            children.setdefault(int(after_name[1]), []).append(int(entry))
    found, todo = [], [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def signal_all(number: int) -> None:
    """Send a signal to all processes below this one."""
    for pid in descendants():
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


class Guard:
    """The loop: waits for the end of the command or of the supervisor, then cleans up."""

    def __init__(self, control: int, grace_s: float, command: list[str]) -> None:
        self.control, self.grace_s = control, grace_s
        self.status: int | None = None
        self.kill_at: float | None = None
        self.wakeup, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self.leader = start(command)

    def run(self) -> int:
        """Wait until no process is left below this one; the wait status of the command."""
        while self.reap():
            timeout_s = None
            if self.kill_at is not None:
                timeout_s = self.kill_at - time.monotonic()
                if timeout_s <= 0:
                    signal_all(signal.SIGKILL)
                    timeout_s = 0.05  # a process may have forked meanwhile: look again
            watched = [self.wakeup] if self.control < 0 else [self.wakeup, self.control]
            readable, _, _ = select.select(watched, [], [], timeout_s)
            if self.wakeup in readable:
                os.read(self.wakeup, 4096)
            if self.control in readable:
                self.hear(os.read(self.control, 64))
        return self.status if self.status is not None else NOT_EXECUTABLE << 8

    def reap(self) -> bool:
        """Collect what has ended; False if nothing is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            if pid == self.leader:
                self.status = status
                self.stop(min(self.grace_s, STRAGGLER_GRACE_S))

    def hear(self, said: bytes) -> None:
        """React to the supervisor: its end, or its wish to kill."""
        if not said:
            self.control = -1
            self.stop(self.grace_s)
        elif b"K" in said:
            self.kill_at = time.monotonic()

    def stop(self, grace_s: float) -> None:
        """Ask everything below to end, and set the time to kill it."""
        if self.kill_at is None:
            signal_all(signal.SIGTERM)
            self.kill_at = time.monotonic() + grace_s


def end_like(status: int) -> None:
    """End this process as the command ended."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def main(argv: list[str]) -> None:
    """See the head of this file."""
    control = int(argv[1])
    os.set_inheritable(control, False)
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    end_like(Guard(control, float(argv[2]), argv[3:]).run())


if __name__ == "__main__":
    main(sys.argv)
