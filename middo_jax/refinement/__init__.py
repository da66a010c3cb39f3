"""Refining: a served chat model rewrites selected samples; rewrites that pass the gates enter the dataset.

requests = prompts.requests(model, settings, seed)
client = ChatClient(requests, base_url, AnswerCache(path))
tasks = plan_tasks(examples, {"complexity": ids, "quality": more_ids}, knn_ids, scores)
outcomes = run(tasks, client, settings, round_index)
examples = merge(examples, outcomes)
"""

from middo_jax.refinement.endpoint.batch import BatchClient, read_results
from middo_jax.refinement.endpoint.cache import AnswerCache, CacheError
from middo_jax.refinement.endpoint.client import ChatClient
from middo_jax.refinement.endpoint.faults import (
    BudgetReached,
    EndpointFailed,
    NotAnswered,
    RefinerError,
    RequestRefused,
)
from middo_jax.refinement.endpoint.ledger import Ledger
from middo_jax.refinement.endpoint.request import Answer
from middo_jax.refinement.endpoint.usage import Usage
from middo_jax.refinement.estimate import DryRun, dry_run
from middo_jax.refinement.merge import merge
from middo_jax.refinement.rewrite import Refiner, refine_tasks, run
from middo_jax.refinement.tasks import Outcome, Task, Verdict, plan_tasks

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
    "Verdict",
    "dry_run",
    "merge",
    "plan_tasks",
    "read_results",
    "refine_tasks",
    "run",
]
