"""The thin environment of one checkout on top of a shared one.

It sees the packages of the shared environment through a .pth file, has this checkout installed in editable form (so
that entry points are found, also by engines that are started from it), and has console scripts of its own, which run in
it.

    python _overlay.py SHARED_BIN      (run by the new environment itself) make its console scripts
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib import metadata
from pathlib import Path

from _steps import Pip, locked, run

ROOT = Path(__file__).resolve().parents[1]
NOT_LINKED = ("python", "activate", "pip")


def make(name: str, shared: Path) -> Path:
    """The environment of this checkout in .venv/NAME; made, or made anew if what it rests on has changed."""
    folder = ROOT / ".venv" / name
    stamp = folder / "mooncake-stamp.json"
    wanted = {"shared": str(shared), "checkout": str(ROOT), "project": (ROOT / "pyproject.toml").read_text()}
    with locked(folder.with_suffix(".lock")):
        if not is_current(stamp, wanted):
            shutil.rmtree(folder, ignore_errors=True)
            build(shared, folder)
            stamp.write_text(json.dumps(wanted))
    return folder


def is_current(stamp: Path, wanted: dict[str, str]) -> bool:
    """Whether an environment was made for exactly this."""
    try:
        return bool(json.loads(stamp.read_text()) == wanted)
    except (OSError, ValueError):
        return False


def build(shared: Path, folder: Path) -> None:
    """Make the environment."""
    log = folder.with_suffix(".log")
    log.write_bytes(b"")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], log)
    line = f"import site; site.addsitedir({str(site_packages(shared))!r})\n"
    (site_packages(folder) / "_shared_packages.pth").write_text(line)
    python = folder / "bin" / "python"
    Pip(python, log).install(["--no-deps", "--no-build-isolation", "--editable", str(ROOT)])
    run([str(python), __file__, str(shared / "bin")], log)


def site_packages(environment: Path) -> Path:
    """Where an environment keeps its packages."""
    return environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


def link_scripts(shared: Path, own: Path) -> None:
    """Give this environment the commands of the shared one; those written in Python run with this interpreter."""
    scripts = {point.name: point for point in metadata.entry_points(group="console_scripts")}
    for source in sorted(shared.iterdir()):
        target = own / source.name
        if target.exists() or source.name.lower().startswith(NOT_LINKED):
            continue
        if source.name in scripts:
            write_script(target, scripts[source.name])
        else:
            target.symlink_to(source)


def write_script(path: Path, point: metadata.EntryPoint) -> None:
    """A console script; started through sh, because the path of the interpreter may be too long for a #! line."""
    lines = (
        "#!/bin/sh",
        f"""'''exec' "{sys.executable}" "$0" "$@\"""",
        "' '''",
        "import sys",
        f"from {point.module} import {point.attr.split('.')[0]}",
        'if __name__ == "__main__":',
        f"    sys.exit({point.attr}())",
    )
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)


if __name__ == "__main__":
    link_scripts(Path(sys.argv[1]), Path(sys.executable).parent)
