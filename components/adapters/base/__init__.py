"""The common ground of all adapters; options import it, never one another."""

from components.adapters.base.merging import merge, unmerge
from components.adapters.base.sharing import sharing
from components.adapters.base.task_ids import OFF, TaskIds
from components.adapters.base.wrapping import (
    AdapterLayer,
    adapter_layers,
    adapter_state,
    base_roles,
    breakdown,
    by_token,
    count_parameters,
    disabled,
    inject,
    load_adapter_state,
    may_rest,
    parameter_roles,
    selected,
    set_enabled,
    task_ids,
    tasks_to_say,
    unwrap,
)

__all__ = [
    "OFF",
    "AdapterLayer",
    "TaskIds",
    "adapter_layers",
    "adapter_state",
    "base_roles",
    "breakdown",
    "by_token",
    "count_parameters",
    "disabled",
    "inject",
    "load_adapter_state",
    "may_rest",
    "merge",
    "parameter_roles",
    "selected",
    "set_enabled",
    "sharing",
    "task_ids",
    "tasks_to_say",
    "unmerge",
    "unwrap",
]
