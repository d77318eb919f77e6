"""A small server in place of an engine, with two more processes below it, as engines have.

    part.py RUN_DIR NAME HOST PORT [--in NAME:BEHAVIOUR …]

Behaviours: ``deaf`` (ignores SIGTERM), ``unready`` (serves 503), ``dies`` (exit code 3 before it is ready), ``crashes``
    (SIGSEGV when
``RUN_DIR/crash`` appears), ``orphan`` (a process below leaves the session), ``ends`` (exit code 0 when
``RUN_DIR/crash`` appears).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

RUN_DIR, NAME, HOST, PORT = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
ASKED = [word.partition(":")[2] for word in sys.argv[5:] if word.startswith(f"{NAME}:")]
CHILD = (
    "import signal, sys, time\nif sys.argv[2] == 'deaf': signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"
)


class Handler(BaseHTTPRequestHandler):
    """Answers every GET."""

    def do_GET(self) -> None:
        self.send_response(503 if "unready" in ASKED else 200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def watch(path: Path) -> None:
    while not path.exists():
        time.sleep(0.02)
    if "crashes" in ASKED:
        signal.raise_signal(signal.SIGSEGV)
    os._exit(0)


print(
    f"{NAME} says hello; role {os.environ.get('TOY_ROLE')}, gpus {os.environ.get('CUDA_VISIBLE_DEVICES')}", flush=True
)
print(f"secret {os.environ['MOONCAKE_SECRET_FILE']}", flush=True)
if "dies" in ASKED:
    print("toy engine: cannot find my model", flush=True)
    sys.exit(3)
kind = "deaf" if "deaf" in ASKED else "normal"
subprocess.Popen([sys.executable, "-c", CHILD, str(RUN_DIR), kind], start_new_session="orphan" in ASKED)
subprocess.Popen([sys.executable, "-c", CHILD, str(RUN_DIR), kind])
if "deaf" in ASKED:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "crashes" in ASKED or "ends" in ASKED:
    threading.Thread(target=watch, args=(RUN_DIR / "crash",), daemon=True).start()
HTTPServer((HOST, PORT), Handler).serve_forever()
