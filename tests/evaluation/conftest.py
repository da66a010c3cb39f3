"""Tests of the harness need lm-eval (extra `eval`), which the dev extra brings."""

import importlib.util

collect_ignore = (
    [] if importlib.util.find_spec("lm_eval") else ["test_harness.py", "test_pairs.py", "test_suite.py"]
)
