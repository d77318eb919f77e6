"""Each mutant of ``catalogue.py`` is noticed by its test; without it the test passes.

Every mutant gets a copy of the sources of its own, and its test runs there in a process of its own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from tests.mutants.catalogue import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]
SOURCES = ("mooncake_plugins", "store", "conductor", "connectors", "scripts", "examples", "tests")
TIMEOUT_S = 300
AT_ONCE = 2
# A mutant often makes its test wait for something that never comes.
PATIENCE_S = "4"


def copy_of_the_sources(target: Path) -> Path:
    """A checkout that can be changed; compiled files come along, so that only the changed one is compiled."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name)
    shutil.copy2(ROOT / "pyproject.toml", target)
    return target


def run(root: Path, tests: Iterable[str], **environment: str) -> Counter[str]:
    """Run tests of a checkout; how often each one, by its name without parameters, failed: 0 if it passed.

    Raises:
        AssertionError: A test was not found or skipped, or the run did not come to an end.
    """
    wanted = set(tests)
    report = root / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *sorted(wanted)]
    path = os.pathsep.join(str(root / folder) for folder in (".", "store", "conductor", "connectors/vllm"))
    variables = os.environ | {"PYTHONPATH": path, "HYPOTHESIS_STORAGE_DIRECTORY": str(root / ".hypothesis")}
    done = subprocess.run(
        command, cwd=root, env=variables | environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode in (0, 1) and report.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    failures: Counter[str] = Counter()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '').partition('[')[0]}"
        assert case.find("skipped") is None, f"{name} was skipped"
        failures[name] += case.find("failure") is not None
    assert set(failures) == wanted, f"ran {sorted(failures)} instead of {sorted(wanted)}"
    return failures


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_text_of_every_mutant_occurs_exactly_once(mutant: Mutant) -> None:
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, (
        f"{mutant.name!r}: its text occurs {text.count(mutant.old)} times in {mutant.file}"
    )
    assert mutant.new != mutant.old


def test_every_mutant_has_a_name_of_its_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("old", ["no such text", "import"])
def test_a_text_that_does_not_occur_exactly_once_is_an_error_that_names_the_mutant(tmp_path: Path, old: str) -> None:
    mutant = replace(MUTANTS[0], old=old)
    file = tmp_path / mutant.file
    file.parent.mkdir(parents=True)
    file.write_text("import a\nimport b\n")
    with pytest.raises(LookupError, match=f"mutant '{mutant.name}'"):
        mutant.apply(tmp_path)
    assert file.read_text() == "import a\nimport b\n"


@pytest.mark.mutants
def test_without_a_mutant_the_tests_pass(tmp_path: Path) -> None:
    failures = run(copy_of_the_sources(tmp_path), {mutant.test for mutant in MUTANTS})
    assert +failures == Counter()


def run_mutant(root: Path, mutant: Mutant) -> int:
    """How often the mutant's test fails."""
    mutant.apply(copy_of_the_sources(root))
    failures = run(root, [mutant.test], MOONCAKE_TEST_PATIENCE_S=PATIENCE_S)
    shutil.rmtree(root)
    return failures[mutant.test]


@pytest.fixture(scope="module")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[int]]]:
    """The runs of all mutants that were selected, a few at a time."""
    name = test_the_mutant_is_noticed.__name__
    items = [item for item in request.session.items if isinstance(item, pytest.Function) and item.originalname == name]
    selected = [cast(Mutant, item.callspec.params["mutant"]) for item in items]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {one.name: pool.submit(run_mutant, tmp_path_factory.mktemp("mutant"), one) for one in selected}
        pool.shutdown(cancel_futures=True)


@pytest.mark.mutants
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_mutant_is_noticed(outcomes: dict[str, Future[int]], mutant: Mutant) -> None:
    failures = outcomes[mutant.name].result()
    assert failures > 0, f"{mutant.test} passes although {mutant.name}: {mutant.guards!r} is not guarded"
