"""Refining: selected samples through a served chat model, and what passes the gates into the dataset.

client = ChatClient(settings, base_url, model, AnswerCache(path))
outcomes = reject_duplicates(examples, run(plan_tasks(examples, ...), client, settings, round_index))
examples = merge(examples, outcomes)
"""

from middo_jax.refine.batch import BatchClient, read_results
from middo_jax.refine.cache import Answer, AnswerCache, CacheError
from middo_jax.refine.client import ChatClient
from middo_jax.refine.duplicates import reject_duplicates
from middo_jax.refine.estimate import DryRun, dry_run
from middo_jax.refine.faults import BudgetReached, EndpointFailed, NotAnswered, RefinerError, RequestRefused
from middo_jax.refine.merge import merge
from middo_jax.refine.request import Refiner
from middo_jax.refine.rewrite import Outcome, Task, plan_tasks, refine_tasks, run
from middo_jax.refine.usage import Ledger, Usage

__all__ = [
    "Answer",
    "AnswerCache",
    "BatchClient",
    "BudgetReached",
    "CacheError",
    "ChatClient",
    "DryRun",
    "EndpointFailed",
    "Ledger",
    "NotAnswered",
    "Outcome",
    "Refiner",
    "RefinerError",
    "RequestRefused",
    "Task",
    "Usage",
    "dry_run",
    "merge",
    "plan_tasks",
    "read_results",
    "refine_tasks",
    "reject_duplicates",
    "run",
]
