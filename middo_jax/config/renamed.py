"""Settings of earlier versions, and their replacements."""

from __future__ import annotations

from collections.abc import Mapping

# The end of the sentence "config: OLD is now ...".
RENAMED: Mapping[str, str] = {
    "train.pack_length": "always model.max_length",
    "train.stochastic_rounding": "what train.param_dtype=bfloat16 always does",
    "train.weight_decay": "train.optimizer.weight_decay",
    "train.beta1": "the first of train.optimizer.betas, such as train.optimizer.betas=[0.9, 0.999]",
    "train.beta2": "the second of train.optimizer.betas, such as train.optimizer.betas=[0.9, 0.999]",
    "train.keep": "always 1",
    "train.spike_factor": "the number in train.on_bad_step, such as train.on_bad_step={stop: 3}",
    "train.tensorboard": "train.trackers, such as train.trackers=[tensorboard]",
    "train.wandb_project": "train.trackers, such as train.trackers=[{wandb: PROJECT}]",
    "scoring.ifd": "scoring.readings, such as scoring.readings=[ifd]",
    "complexity.pre_model": "train.start_from, which names the model before training too",
    "quality.top_p": "always 0.7, as published",
    "quality.top_k": "always 50, as published",
    "refine.top_p": "always 1",
    "refine.requests_per_minute": "refine.per_minute.requests",
    "refine.tokens_per_minute": "refine.per_minute.tokens",
    "refine.budget_usd": "refine.budget.usd",
    "refine.budget_tokens": "refine.budget.tokens",
    "refine.gates.numbers": "refine.gates.open, such as refine.gates.open=[numbers]",
    "refine.gates.code": "refine.gates.open, such as refine.gates.open=[code]",
    "refine.gates.language": "refine.gates.open, such as refine.gates.open=[language]",
    "refine.gates.loss": "refine.gates.open, such as refine.gates.open=[loss]",
    "refine.gates.coverage": "refine.gates.open, such as refine.gates.open=[coverage]",
    "refine.gates.distribution": "refine.gates.open, such as refine.gates.open=[distribution]",
    "refine.gates.quality": "refine.gates.open, such as refine.gates.open=[quality]",
    "serve.host": "the option --host of `middo serve`",
    "serve.port": "the option --port of `middo serve`",
}
