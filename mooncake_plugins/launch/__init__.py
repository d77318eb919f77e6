"""Starting and supervising the parts of a deployment on this host: engines and the Conductor.

Which parts there are and how each is started comes from launch profiles (hook ``mooncake_launch_profiles``); what to do
when one is ready, dies or does not stop is decided by a sans-I/O state machine (`Supervisor`), and done by a thin shell
(`supervise`).
"""

from __future__ import annotations

from mooncake_plugins.launch._gpus import split_gpus, visible_gpus
from mooncake_plugins.launch._plan import Deployment, check_model, plan
from mooncake_plugins.launch._ports import check_port_is_free, free_ports
from mooncake_plugins.launch._profile import Command, LaunchProfile, PartSpec
from mooncake_plugins.launch._rundir import RunDirectory
from mooncake_plugins.launch._shell import Part, supervise
from mooncake_plugins.launch._supervisor import Supervisor

__all__ = [
    "Command",
    "Deployment",
    "LaunchProfile",
    "Part",
    "PartSpec",
    "RunDirectory",
    "Supervisor",
    "check_model",
    "check_port_is_free",
    "free_ports",
    "plan",
    "split_gpus",
    "supervise",
    "visible_gpus",
]
