"""How an answer ended: four endings for the many spellings of `finish_reason`."""

from __future__ import annotations

import re
from typing import Literal

# whole     the model ended its answer
# cut       a limit ended it, or the reason is unknown
# filtered  a filter ended it, or the model declined
# broken    the server failed, or the model called a tool: another try may be answered
Ending = Literal["whole", "cut", "filtered", "broken"]

_WHOLE = {
    *("stop", "stopped", "stop_sequence", "stop_token", "stop_string", "stop_str", "stop_word", "stop_id"),
    *("eos", "eos_token", "eos_token_id", "eos_found", "eot", "eog", "end", "ended", "end_turn"),
    *("end_of_turn",),
    *("end_of_text", "end_of_sequence", "endoftext", "complete", "completed", "finish", "finished", "done"),
    *("normal", "natural", "success", "succeeded", "null", "none", ""),
}
_FILTERED = {
    *("content_filter", "content_filtered", "contentfilter", "filtered", "filter", "moderation", "moderated"),
    *("safety", "image_safety", "refusal", "refused", "recitation", "blocklist", "blocked", "spii"),
    *("prohibited_content", "sensitive", "guardrail", "guardrail_intervened", "guardrails", "model_armor"),
    *("error_toxic", "toxic", "policy_violation", "language"),
}
_BROKEN = {
    *("abort", "aborted", "error", "failed", "failure", "cancel", "cancelled", "canceled", "timeout"),
    *("time_limit", "interrupted", "preempted", "disconnect", "disconnected", "load", "network_error"),
    *("insufficient_system_resource", "engine_error", "server_error", "internal_error", "user_cancel"),
    *("tool_calls", "tool_call", "tool_use", "tool_code", "function_call", "function_calls"),
    *("malformed_function_call", "unexpected_tool_call"),
}


def ending(finish_reason: str) -> Ending:
    """How an answer ended, by its finish reason: "stop" -> "whole", "MAX_TOKENS" -> "cut".

    An unknown reason counts as cut, so that no answer is trained on that may be incomplete.
    """
    word = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", finish_reason.strip()).lower()
    word = re.sub(r"[\s./-]+", "_", word).removeprefix("finish_reason_").removeprefix("finishreason_")
    if word in _WHOLE:
        return "whole"
    if word in _FILTERED:
        return "filtered"
    return "broken" if word in _BROKEN or word.endswith(("_error", "_abort")) else "cut"
