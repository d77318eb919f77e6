"""The hand-off of KV from a prefill to a decode instance. Both engines' connectors are thin adapters over this."""

from mooncake_plugins.handoff._cache import BlockCache, HostCache, LayerPlace
from mooncake_plugins.handoff._description import (
    DESCRIPTION_VERSION,
    PARAMS_KEY,
    EngineDescription,
    EngineRole,
    RequestParams,
)
from mooncake_plugins.handoff._messages import HANDOFF_ROLE, ToDecode
from mooncake_plugins.handoff._options import HandoffOptions
from mooncake_plugins.handoff._pull_service import PullService
from mooncake_plugins.handoff._source_service import SourceIdentity, SourceService
from mooncake_plugins.handoff._steps import HandoffStep, PrefillWork, PullRequest, PullResult
from mooncake_plugins.handoff._ticket import Ticket, TicketBook, sign_ticket, verify_ticket
from mooncake_plugins.handoff._watch import WatchSession, WatchState
from mooncake_plugins.handoff._watch_service import WatchService

__all__ = [
    "DESCRIPTION_VERSION",
    "HANDOFF_ROLE",
    "PARAMS_KEY",
    "BlockCache",
    "EngineDescription",
    "EngineRole",
    "HandoffOptions",
    "HandoffStep",
    "HostCache",
    "LayerPlace",
    "PrefillWork",
    "PullRequest",
    "PullResult",
    "PullService",
    "RequestParams",
    "SourceIdentity",
    "SourceService",
    "Ticket",
    "TicketBook",
    "ToDecode",
    "WatchService",
    "WatchSession",
    "WatchState",
    "sign_ticket",
    "verify_ticket",
]
