"""``mooncake doctor``: runs the checks that plugins offer."""

from __future__ import annotations

import json
from collections.abc import Iterator

import click

from mooncake_plugins.errors import MooncakeError
from mooncake_plugins.plugins import CheckResult, CheckStatus, PluginRegistry, Provider, default_registry

HOOK = "mooncake_doctor_checks"


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(as_json: bool) -> int:
    """Say what this host can do, and how to fix what it cannot. Exit code 1 if something fails."""
    results = list(run_checks(default_registry()))
    if as_json:
        click.echo(json.dumps([_as_dict(result) for result in results], indent=2))
    else:
        for result in results:
            click.echo(f"[{result.status.value:^4}] {result.name}: {result.detail}")
            if result.remedy:
                click.echo(f"       {result.remedy}")
    return int(any(result.status is CheckStatus.FAIL for result in results))


def run_checks(registry: PluginRegistry) -> Iterator[CheckResult]:
    """The findings of all checks. A check that breaks is a failed finding."""
    for provider in registry.providers(HOOK).values():
        yield from _run_one(provider)
    for failure in registry.failures:
        remedy = "update or uninstall it, or name it in MOONCAKE_PLUGINS_DISABLED"
        yield CheckResult(f"plugin {failure.name}", CheckStatus.WARN, f"left out: {failure.reason}", remedy)


def _run_one(provider: Provider) -> Iterator[CheckResult]:
    try:
        for result in provider.load()():
            if not isinstance(result, CheckResult):
                raise TypeError(f"a CheckResult is expected, got {type(result).__name__}")
            yield result
    except MooncakeError as error:
        yield CheckResult(provider.name, CheckStatus.FAIL, str(error))
    except Exception as error:  # noqa: BLE001 - a check may raise anything; the others must go on
        detail = f"the check itself failed: {type(error).__name__}: {error}"
        yield CheckResult(provider.name, CheckStatus.FAIL, detail, f"tell the authors of plugin {provider.plugin!r}")


def _as_dict(result: CheckResult) -> dict[str, str]:
    return {"name": result.name, "status": result.status.value, "detail": result.detail, "remedy": result.remedy}
