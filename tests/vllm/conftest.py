"""What the connector's tests need: vLLM in this environment (no server), two tiny models, one process group."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from tests.vllm.modelless import ModellessEngine, Pair

HERE = Path(__file__).parent
REASON = "vLLM is not installed in this environment; `make test` has one"
IS_ABSENT = importlib.util.find_spec("vllm") is None

# A busy machine is no failure, and engines without a model take some milliseconds to make.
settings.register_profile("mooncake", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mooncake")

if not IS_ABSENT:
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1", VLLM_HOST_IP="127.0.0.1")
    # vLLM and torch warn while they are imported; that must not fail a test that happens to import them first.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mooncake_vllm.connector

        mooncake_vllm.register()


class _NeedsVllm(pytest.Module):
    """A test module that cannot even be imported here."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(REASON, allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Without vLLM the modules of this folder are skipped as a whole, and say so."""
    return _NeedsVllm.from_parent(parent, path=module_path) if IS_ABSENT and HERE in module_path.parents else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.vllm)
            # What vLLM, torch and transformers warn about is not ours.
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"))


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tiny models that differ in their weights only."""
    from tests.e2e.fleets import make_model

    folder = tmp_path_factory.mktemp("models")
    small = ("--layers", "2", "--hidden", "64", "--heads", "2", "--kv-heads", "1")
    first, second = (
        make_model(folder / name, *small, "--seed", seed) for name, seed in (("first", "0"), ("second", "1"))
    )
    return first, second


@pytest.fixture(scope="session")
def model(models: tuple[Path, Path]) -> Path:
    return models[0]


@pytest.fixture
def make_config(model: Path) -> Callable[..., VllmConfig]:
    """Return a function that makes a real engine configuration, as the front end of an engine does."""
    from tests.vllm.modelless import engine_config

    return lambda role="kv_both", **options: engine_config(model, role, **options)


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[None]:
    """A process group of one, as in an engine's only worker."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state

    from tests.vllm.modelless import engine_config

    with set_current_vllm_config(engine_config(model, "kv_both")):
        store = f"file://{tmp_path_factory.mktemp('group')}/store"
        parallel_state.init_distributed_environment(1, 0, store, 0, "gloo")
        parallel_state.ensure_model_parallel_initialized(1, 1)
    yield
    parallel_state.cleanup_dist_env_and_memory()


@pytest.fixture
def make_engine(make_config: Any, process_group: None) -> Iterator[Callable[..., ModellessEngine]]:
    """Return a function that makes an engine without a model; see ``modelless``."""
    from tests.vllm.modelless import ModellessEngine

    made: list[ModellessEngine] = []

    def make(role: str, *, blocks: int = 64, **options: Any) -> ModellessEngine:
        made.append(ModellessEngine(make_config(role, **options), blocks))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def pair(make_engine: Any) -> Pair:
    """A prefill and a decode engine without a model."""
    from tests.vllm.modelless import Pair

    return Pair(make_engine("kv_producer"), make_engine("kv_consumer"))
