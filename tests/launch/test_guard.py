"""The guard: it ends like its command, and nothing below it survives it or its supervisor."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from mooncake_plugins.launch import _guard

PATIENCE_S = 30.0


class Guarded:
    """A guard with its control pipe."""

    def __init__(self, *command: str, grace_s: float = 10.0) -> None:
        read_end, self.control = os.pipe()
        guard = [sys.executable, "-I", _guard.__file__, str(read_end), str(grace_s), *command]
        self.process = subprocess.Popen(
            guard,
            pass_fds=[read_end],
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        os.close(read_end)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close_control(self) -> None:
        if self.control >= 0:
            os.close(self.control)
            self.control = -1

    def end(self) -> int:
        return self.process.wait(timeout=PATIENCE_S)


@pytest.fixture
def guarded() -> Iterator[type[Guarded]]:
    made: list[Guarded] = []

    class Recorded(Guarded):
        def __init__(self, *command: str, grace_s: float = 10.0) -> None:
            super().__init__(*command, grace_s=grace_s)
            made.append(self)

    yield Recorded
    for one in made:
        one.close_control()
        one.end()
        assert one.process.stdout is not None
        one.process.stdout.close()


def python(code: str) -> tuple[str, str, str]:
    return sys.executable, "-c", code


@pytest.mark.parametrize("code", [0, 1, 127])
def test_it_ends_with_the_same_exit_code(guarded: type[Guarded], code: int) -> None:
    assert guarded(*python(f"raise SystemExit({code})")).end() == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT, signal.SIGINT])
def test_it_ends_by_the_same_signal(guarded: type[Guarded], number: signal.Signals) -> None:
    assert (
        guarded(
            *python(f"import signal; signal.signal({number}, 0) if {number} != 9 else 0; signal.raise_signal({number})")
        ).end()
        == -number
    )


def test_programs_that_cannot_be_executed(guarded: type[Guarded], tmp_path: Path) -> None:
    absent = guarded("/no/such/program")
    assert absent.line() == "mooncake: /no/such/program: no such program"
    assert absent.end() == 127
    (tmp_path / "data").touch()
    refused = guarded(str(tmp_path / "data"))
    assert "Permission denied" in refused.line()
    assert refused.end() == 126


def test_the_command_gets_default_signals_and_no_pipe(guarded: type[Guarded]) -> None:
    code = """
        import os, signal
        print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, sorted(os.listdir('/proc/self/fd')))
    """
    one = guarded(*python(textwrap.dedent(code)))
    assert one.line() == "True ['0', '1', '2', '3']"  # 3 is the listing itself
    assert one.end() == 0


def test_the_end_of_the_pipe_stops_the_command(guarded: type[Guarded]) -> None:
    one = guarded(*python("import time; print('up', flush=True); time.sleep(600)"))
    assert one.line() == "up"
    one.close_control()
    assert one.end() == -signal.SIGTERM


def test_a_wish_to_kill_is_obeyed_at_once(guarded: type[Guarded]) -> None:
    deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    one = guarded(*python(deaf), grace_s=600.0)
    assert one.line() == "up"
    os.write(one.control, b"K")
    assert one.end() == -signal.SIGKILL


def test_a_stopped_process_is_killed_too(guarded: type[Guarded]) -> None:
    stopped = "import os, signal; print('up', flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    one = guarded(*python(stopped), grace_s=0.2)
    assert one.line() == "up"
    one.close_control()
    assert one.end() == -signal.SIGKILL


def test_stragglers_are_ended_when_the_command_has_ended(guarded: type[Guarded]) -> None:
    code = """
        import subprocess, sys
        sleeper = [sys.executable, '-c', 'import time; time.sleep(600)']
        print(subprocess.Popen(sleeper, start_new_session=True).pid)
    """
    one = guarded(*python(textwrap.dedent(code)))
    pid = int(one.line())
    assert one.end() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_command_dies_with_a_killed_guard(guarded: type[Guarded]) -> None:
    one = guarded(*python("import os, time; print(os.getpid(), flush=True); time.sleep(600)"))
    pid = int(one.line())
    one.process.kill()
    assert one.end() == -signal.SIGKILL
    descriptor = None
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], PATIENCE_S)[0]
    finally:
        os.close(descriptor)
