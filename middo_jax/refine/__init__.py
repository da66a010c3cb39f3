"""Refining: selected samples through a served chat model, and what passes the gates into the dataset.

client = ChatClient(settings, base_url, model, AnswerCache(path))
outcomes = reject_duplicates(examples, run(plan_tasks(examples, ...), client, settings, round_index))
examples = merge(examples, outcomes)
"""

from middo_jax.refine.cache import Answer, AnswerCache, CacheError, Usage
from middo_jax.refine.client import (
    BudgetReached,
    ChatClient,
    EndpointFailed,
    RefinerError,
    RequestRefused,
)
from middo_jax.refine.merge import merge, reject_duplicates
from middo_jax.refine.rewrite import Outcome, Task, dry_run, plan_tasks, refine_tasks, run

__all__ = [
    "Answer",
    "AnswerCache",
    "BudgetReached",
    "CacheError",
    "ChatClient",
    "EndpointFailed",
    "Outcome",
    "RefinerError",
    "RequestRefused",
    "Task",
    "Usage",
    "dry_run",
    "merge",
    "plan_tasks",
    "refine_tasks",
    "reject_duplicates",
    "run",
]
