"""The leak check sees what it is there for."""

from __future__ import annotations

import os
import threading

from mooncake_plugins.testing import LeakSnapshot


def test_an_open_descriptor_is_named() -> None:
    before = LeakSnapshot.take()
    reader, writer = os.pipe()
    try:
        assert [leak.split(" ->")[0] for leak in before.leaks_since()] == [
            f"descriptor {fd}" for fd in sorted((reader, writer))
        ]
    finally:
        os.close(reader)
        os.close(writer)
    assert before.leaks_since() == []


def test_a_running_thread_is_named() -> None:
    before, stop = LeakSnapshot.take(), threading.Event()
    thread = threading.Thread(target=stop.wait, name="forgotten")
    thread.start()
    try:
        assert before.leaks_since() == ["thread forgotten"]
    finally:
        stop.set()
        thread.join()
    assert before.leaks_since() == []
