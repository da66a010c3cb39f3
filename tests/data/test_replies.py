"""What a refiner's reply is taken for: reasoning, escapes, named forms, end tokens, reasons, parts."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import JSONResponse
from support.gate_verdicts import text_verdict
from support.scripted_refiner import HARD, Scripted, refine, sample
from support.scripted_server import SETTINGS, ScriptedServer, ask

from middo_jax.config import RefineSettings
from middo_jax.data.reply import control_token, without_end_tokens, without_reasoning
from middo_jax.refinement.acceptance.hidden import hidden_character
from middo_jax.refinement.endpoint.address import Secrets
from middo_jax.refinement.endpoint.cache import AnswerCache
from middo_jax.refinement.endpoint.ending import ending
from middo_jax.refinement.endpoint.faults import EndpointFailed
from middo_jax.refinement.endpoint.request import read_answer
from middo_jax.refinement.parse import parse_prompt
from middo_jax.refinement.rewrite import refine_tasks
from middo_jax.refinement.tasks import Task, Verdict
from middo_jax.rundir import json_line

pytest_plugins = ["support.scripted_server"]

SANE = {"accept": "sane", "max_corrections": 0}
ASKED = "Tell me where herons nest."
SAID = "Herons nest in tall trees, close to water."

# Reasoning -----------------------------------------------------------------------------------------

REASONED = [
    "<think>\nWhere do they nest?\n</think>\n\n{}",
    "<think>\n\n</think>\n\n{}",
    "Where do they nest? In trees.\n</think>\n\n{}",
    "Where do they nest?</think>{}",
    "<think>One.</think>\n<think>Two.</think>\n{}",
    "<THINK>Hm.</THINK>{}",
    "<thinking>Hm.</thinking>\n\n{}",
    "<thought>Hm.</thought>\n{}",
    "<reasoning>\nHm.\n</reasoning>\n{}",
    "<seed:think>Hm.</seed:think>{}",
    "<antThinking>Hm.</antThinking>{}",
    "<thinking_process>Hm.</thinking_process>{}",
    "<chain-of-thought>Hm.</chain-of-thought>{}",
    "<cot>Hm.</cot>{}",
    "<inner_monologue>Hm.</inner_monologue>{}",
    "<thinking>Hm.<reflection>No.</reflection></thinking><output>{}</output>",
    "[THINK]Hm.[/THINK]{}",
    "◁think▷Hm.◁/think▷{}",
    "<|begin_of_thought|>Hm.<|end_of_thought|>\n<|begin_of_solution|>{}<|end_of_solution|>",
    "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>",
    '<details type="reasoning" done="true">\n> Hm.\n</details>\n{}',
    "<think>Hm.</think>\n<answer>{}</answer>",
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>",
    "<|start|>assistant<|channel|>final<|message|>{}",
    "analysisThe user asks where.assistantfinal{}",
    "<|channel>thought\nHm.<channel|>{}",
    "Here is my thought process: hm. Here is my response: {}",
]


@pytest.mark.parametrize("form", REASONED)
def test_reasoning_in_front_is_no_part_of_a_reply(form: str) -> None:
    replies = form.format(f"<prompt>{ASKED}</prompt>"), form.format(SAID)
    outcome, _ = refine(HARD, *replies, settings=SANE)
    assert outcome.example is not None, outcome.verdict
    assert (outcome.example.prompt, outcome.example.response) == (ASKED, SAID)
    assert parse_prompt(form.format(json.dumps({"prompt": ASKED}))) == ASKED


@pytest.mark.parametrize(
    "begun",
    ["<think>", "[THINK]", "<reasoning>\n", "<seed:think>", "<|channel|>analysis<|message|>", "analysis"],
)
def test_reasoning_that_never_ends_holds_neither_prompt_nor_answer(begun: str) -> None:
    assert parse_prompt(f"{begun}Perhaps <prompt>a draft</prompt>, perhaps not") is None
    outcome, _ = refine(HARD, f"<prompt>{ASKED}</prompt>", f"{begun}They may nest", settings=SANE)
    assert outcome.verdict == Verdict("answer_readable", "empty answer")


def test_a_draft_in_later_reasoning_is_no_prompt() -> None:
    draft = "<think>Say <prompt>a draft</prompt> first"
    assert parse_prompt(f"Well. {draft}") is None
    assert parse_prompt(f"Well. {draft}</think> <prompt>{ASKED}</prompt>") == ASKED
    assert parse_prompt(f"<prompt>{ASKED}</prompt>\n{draft}") == ASKED


@pytest.mark.parametrize(
    "text",
    [
        "Write `</think>` behind it.",
        "It is opened by <think> and closed by </think>.",
        "```html\n<a>\n</think>\n```",
        "I think so.",
        "analysis of variance compares means",
    ],
)
def test_a_text_about_reasoning_is_left_alone(text: str) -> None:
    assert without_reasoning(text) == text
    assert parse_prompt(f"<prompt>{text}</prompt>") == text


def test_a_mark_that_the_sample_speaks_of_ends_nothing() -> None:
    asked = Task("rewrite", ("quality",), sample("What does </think> do in a reply?"))
    said = "The tag </think> ends the reasoning."
    outcome, _ = refine(asked, "<prompt>What is </think> for?</prompt>", said, settings=SANE)
    assert outcome.example is not None
    assert (outcome.example.prompt, outcome.example.response) == ("What is </think> for?", said)


@pytest.mark.parametrize("mark", ["<think>", "[THINK]", "</reasoning>", "<thinking>", "◁think▷"])
def test_reasoning_elsewhere_is_an_echo(mark: str) -> None:
    text = f"They nest in trees. <think> {mark} Is that right?"
    verdict = text_verdict(HARD, ASKED, text, settings=RefineSettings(accept="sane"))
    assert verdict is not None
    assert (verdict.gate, verdict.fault) == ("answer_sane", "echo")


@given(st.text())
def test_no_reply_is_too_odd_to_be_cut(text: str) -> None:
    for odd in (text, f"<think>{text}", f"{text}</think>", f"<|channel|>{text}"):
        cut = without_reasoning(odd)
        assert cut is None or cut in odd


@pytest.mark.parametrize(
    "piece", ["<think>", "</think>", "<think></think>", "[THINK] ", "<|end|>", "</s>", "</"]
)
def test_degenerate_replies_are_cut_in_no_time(piece: str) -> None:
    long = piece * (60_000 // len(piece))
    cut = without_reasoning(long)
    assert cut is None or cut in long
    assert without_end_tokens(long) in long
    read = parse_prompt(long)
    assert read is None or read in long


# Escapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "meant",
    [
        r"Compute $\frac{3}{4} \times \beta$.",
        r"Let $\theta = \tan \rho$ and $\nabla f \neq 0$.",
        r"\begin{cases} 1 \\ 2 \end{cases} with \sqrt{x}, \( y \) and \underline{z}",
        r"Solve $x \nu \ne 1$ for \text{all} x \to 0.",
        r"\binom{n}{k}, \forall x, \right) and \nRightarrow",
        r"What does the pattern \bcat\b or \d+ match?",
        r"Open C:\temp\new\files\report.txt and read it.",
    ],
)
def test_a_backslash_that_no_json_escaped_is_read_as_it_is(meant: str) -> None:
    assert parse_prompt('{"prompt": "' + meant + '"}') == meant
    assert parse_prompt('Here: {"prompt": "' + meant + '"}. Done.') == meant
    assert parse_prompt(json.dumps({"prompt": meant})) == meant


@pytest.mark.parametrize(
    "meant",
    [
        r"List the folder C:\new and say what is missing.",
        r"Go to the directory D:\notes\new first.",
        r"Run cd C:\new before you start.",
        r"Delete 'C:\new' and \"E:\notes\" for me.",
        r"What does `C:\new\next` contain?",
        r"Read C:\notes.txt and X:\new\node.json aloud.",
    ],
)
def test_a_path_is_told_by_the_words_around_it(meant: str) -> None:
    r"""JSON allows each backslash of these replies, so none shows that its writer escaped nothing."""
    assert parse_prompt('{"prompt": "' + meant + '"}') == meant.replace('\\"', '"')
    assert parse_prompt(json.dumps({"prompt": meant})) == meant


@pytest.mark.parametrize(
    "meant",
    [
        "Q:\nname three birds\nA:\nowl, wren and rook",
        "Write it in C:\nint main() { return 0; }",
        "Translate from C:\nnode = next;",
        "Answer with A:\nyes or B:\nno.",
        "Q:\nnotes.txt is what kind of file?",
        'Say "A:\nno" aloud.',
        "Choose an option: C:\nnone of these",
    ],
)
def test_a_line_break_after_a_letter_and_a_colon_is_no_path(meant: str) -> None:
    assert parse_prompt(json.dumps({"prompt": meant})) == meant


@pytest.mark.parametrize(
    "meant",
    [
        "One line.\nNext line.\n\nnot this one\ta tab",
        "1. nouns\n2. else\ni) first\nu = 3",
        "A café costs “3 €”.\n- new\n- old",
        "$\\frac{1}{2}$\nnext",
    ],
)
def test_escapes_that_were_meant_are_read_as_before(meant: str) -> None:
    for ascii_only in (True, False):
        assert parse_prompt(json.dumps({"prompt": meant}, ensure_ascii=ascii_only)) == meant


CONTROLS = ["\x00", "\x08", "\x0b", "\x0c", "\x1b", "\x7f", "\x85", "\x9b"]
INVISIBLE = ["\u202e", "\u2066", "\u200f", "\u200b", "\u200d", "\ufeff", "\u2060", "\u00ad", "\U000e0041"]


@pytest.mark.parametrize("character", [*CONTROLS, *INVISIBLE])
@pytest.mark.parametrize("accept", ["none", "sane"])
def test_no_hidden_character_enters_a_dataset(character: str, accept: Any) -> None:
    settings = RefineSettings(accept=accept)
    of_prompt = text_verdict(HARD, f"Name {character} a bird.", "A heron.", settings=settings)
    of_answer = text_verdict(HARD, "Name a bird.", f"A {character} heron.", settings=settings)
    kind = "control" if character in CONTROLS else "invisible"
    found = f"{kind} character U+{ord(character):04X}"
    assert of_prompt == Verdict("readable", f"{found} in the prompt")
    assert of_answer == Verdict("answer_readable", f"{found} in the answer")
    assert of_answer is not None
    assert of_answer.feedback
    # In a JSON reply, where the escape is plain ASCII.
    reply = json.dumps({"prompt": f"Name {character} a bird."})
    outcome, _ = refine(HARD, reply, "A heron.", settings={"accept": accept, "max_corrections": 0})
    assert outcome.verdict == of_prompt


def test_half_a_character_does_not_enter_a_dataset() -> None:
    """JSON within a reply can escape it. No file in UTF-8 can contain it: writing the round failed."""
    outcome, _ = refine(HARD, '{"prompt": "Name \\ud83d a bird."}', "A heron.", settings=SANE)
    assert outcome.verdict == Verdict("readable", "control character U+D83D in the prompt")
    json_line(outcome.to_json()).encode()


NEEDED = [
    "می\u200cخواهم نام یک پرنده را بدانم",  # Persian: within words
    "क्\u200dष और र्\u200dय",  # Hindi: half letters
    "ชื่อ\u200bนก",  # Thai: between words
    "A family: 👨\u200d👩\u200d👧, 👩🏽\u200d💻 and ❤️\u200d🔥.",
    "The flag of Wales: 🏴\U000e0067\U000e0062\U000e0077\U000e006c\U000e0073\U000e007f.",
    "שלום \u200e(ABC)\u200e עולם",  # Hebrew: brackets around Latin letters
    "السنة \u0601١٢",
]


@pytest.mark.parametrize("text", NEEDED)
def test_invisible_characters_that_a_script_needs_are_kept(text: str) -> None:
    assert hidden_character(text) is None
    assert hidden_character(f"Name it: {text}\n\tA heron.") is None


def test_invisible_characters_of_the_original_may_stay() -> None:
    assert hidden_character("Na\u200bme", given="a\u200bb") is None
    assert hidden_character("Na\u200bme", given="ab") == ("U+200B", "invisible character")
    assert hidden_character("Na\x1bme", given="a\x1bb") == ("U+001B", "control character")
    assert hidden_character("שלום \u202eabc", given="שלום") == ("U+202E", "invisible character")
    assert hidden_character("\U0001f3f4" + "\U000e0041" * 30) == ("U+E0041", "invisible character")


def test_lines_of_other_systems_become_line_feeds() -> None:
    outcome, _ = refine(HARD, "<prompt>Name\r\na bird.</prompt>", "A\theron\r\nor\rnone.", settings=SANE)
    assert outcome.example is not None
    assert (outcome.example.prompt, outcome.example.response) == ("Name\na bird.", "A\theron\nor\nnone.")


# The form named again ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "around",
    [
        "{}\nAs you asked, it is between <prompt> and </prompt>.",
        "{} It stands between <prompt> and </prompt> now.",
        "I shall write it between <prompt> and </prompt>:\n\n{}",
        "The new prompt goes in a <prompt> tag.\n{}",
        "{}\nI used the <prompt> tag for it.",
        "{}\nI wrote it into `<prompt>`.",
        "{}\nThe form was <prompt>your text goes here</prompt>, which I filled in.",
        "The form is <prompt>...</prompt>, so:\n{}",
        "{}\nI hope that the closing </prompt> is right.",
    ],
)
def test_a_form_that_a_sentence_names_is_not_the_prompt(around: str) -> None:
    assert parse_prompt(around.format(f"<prompt>{ASKED}</prompt>")) == ASKED


@pytest.mark.parametrize(
    ("reply", "prompt"),
    [
        ("It goes between <prompt> and </prompt>.", None),
        ("<prompt>your new prompt here</prompt>", None),
        ("<prompt>Explain the <prompt> tag.</prompt>", "Explain the <prompt> tag."),
        ('{"prompt": "Name a bird."}\nThe form is {"prompt": "..."}', "Name a bird."),
        ('{"prompt": "Name a bird."}\nI left out the <prompt> tags.', "Name a bird."),
        ('Here:\n{"prompt": "Explain <prompt>x</prompt>."}\nDone.', "Explain <prompt>x</prompt>."),
        ("<prompt>whole</prompt>\nBetter:\n<prompt>cut of", None),
        ("Sure! <prompt> Name a bird. </prompt> I hope it helps.", "Name a bird."),
    ],
)
def test_a_form_is_told_from_its_use(reply: str, prompt: str | None) -> None:
    assert parse_prompt(reply) == prompt


# End tokens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "token",
    [
        *("<|eot_id|>", "</s>", "<end_of_turn>", "<|endoftext|>", "<|end|>", "<|return|>", "<|eom_id|>"),
        *("<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "[|endofturn|]", "<|end_of_text|>", "<turn|>"),
        *("<eos>", "[EOS]", "<|eot|>", "</s></s>", "<|im_end|>\n<|endoftext|>", "\n\n<|eot_id|>\n"),
    ],
)
def test_end_tokens_of_other_families_are_cut_off(token: str) -> None:
    replies = f"<prompt>{ASKED}{token}</prompt>{token}", SAID + token
    outcome, _ = refine(HARD, *replies, settings=SANE, special_tokens=["<|bos|>", "<|stop|>"])
    assert outcome.example is not None, outcome.verdict
    assert (outcome.example.prompt, outcome.example.response) == (ASKED, SAID)


@pytest.mark.parametrize(
    "token", ["<|eot_id|>", "<start_of_turn>", "<|im_start|>", "[INST]", "<<SYS>>", "<｜User｜>", "</s>"]
)
def test_a_control_token_within_a_text_is_rejected_unless_the_sample_has_it(token: str) -> None:
    text = f"They nest.{token}user\nAnd now?"
    assert text_verdict(HARD, ASKED, text) == Verdict(
        "answer_readable", f"control token {token} in the answer"
    )
    about = Task("rewrite", ("quality",), sample(f"What does {token} mean?"))
    assert text_verdict(about, f"Say what {token} means.", f"A turn's mark, {token}, as text.") is None


@pytest.mark.parametrize(
    "text", ["Was <s>10</s>", "a <| b |> c", "x <- y", "vec![1] and [1, 2]", "<b>bold</b>"]
)
def test_markup_is_no_control_token(text: str) -> None:
    assert without_end_tokens(text) == text
    assert control_token(text) is None


# How an answer ended -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "how"),
    [
        *((word, "whole") for word in ("stop", "STOP", "eos", "eos_token", "end_turn", "stop_sequence")),
        *((word, "whole") for word in ("COMPLETE", "FINISH_REASON_STOP", "endTurn", "")),
        *((word, "cut") for word in ("length", "max_tokens", "MAX_TOKENS", "model_length", "max_new_tokens")),
        *((word, "cut") for word in ("FinishReason.MAX_TOKENS", "token_limit", "maxTokens", "whatever")),
        *((word, "filtered") for word in ("content_filter", "SAFETY", "RECITATION", "refusal")),
        *((word, "broken") for word in ("abort", "error", "cancelled", "tool_calls", "network_error")),
    ],
)
@pytest.mark.parametrize("accept", ["none", "sane"])
def test_only_a_whole_answer_is_accepted(reason: str, how: str, accept: Any) -> None:
    assert ending(reason) == how
    client = Scripted(f"<prompt>{ASKED}</prompt>", (SAID, reason), (SAID, reason))
    settings = RefineSettings(concurrency=1, response_format="text", accept=accept)
    [outcome] = asyncio.run(refine_tasks([HARD], client, settings, round_index=0))
    assert (outcome.example is not None) == (how == "whole")
    assert len(client.asked) == (3 if how == "cut" else 2)  # a cut answer is asked for once more
    if how != "whole":
        assert outcome.verdict is not None
        assert outcome.verdict.gate == "answer_readable"
        assert outcome.verdict.feedback


# The content of a message --------------------------------------------------------------------------


def body(content: Any, reason: str | None = "stop", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content, **more}
    return {"choices": [{"index": 0, "message": message, "finish_reason": reason}]}


@pytest.mark.parametrize(
    "content",
    [
        SAID,
        [{"type": "text", "text": SAID}],
        [{"type": "text", "text": SAID[:9]}, {"type": "text", "text": SAID[9:]}],
        [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}, {"type": "text", "text": SAID}],
        [{"type": "output_text", "text": SAID, "annotations": []}],
        [{"type": "reasoning", "text": "Hm."}, SAID],
        [{"type": "text", "text": {"value": SAID}}],
        {"type": "text", "text": SAID},
    ],
)
def test_the_text_of_a_message_in_parts(content: Any) -> None:
    answer = read_answer(body(content), "k", Secrets())
    assert (answer.text, answer.finish_reason) == (SAID, "stop")


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
UNREADABLE = [
    body(None),
    body([]),
    body([{"type": "image_url", "image_url": {"url": "x"}}]),
    body(None, "tool_calls", tool_calls=[CALL]),
    body(None, tool_calls=[CALL]),
    body("They", "abort"),
    body("They", "error"),
    body(7),
]


@pytest.mark.parametrize("reply", UNREADABLE)
def test_a_reply_without_a_text_is_unreadable(reply: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="finish_reason"):
        read_answer(reply, "k", Secrets())


def test_a_limit_or_a_filter_may_leave_no_text() -> None:
    assert read_answer(body(None, "length"), "k", Secrets()).text == ""
    assert read_answer(body(None, "content_filter"), "k", Secrets()).finish_reason == "content_filter"
    declined = read_answer(body(None, "stop", refusal="I'm sorry, no."), "k", Secrets())
    assert (declined.text, declined.finish_reason) == ("I'm sorry, no.", "content_filter")
    assert read_answer(body("", "stop"), "k", Secrets()).text == ""


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_answer_is_not_read(field: str) -> None:
    reasoned = {field: "Shall I? <prompt>A draft.</prompt>"}
    assert read_answer(body("A bird.", "stop", **reasoned), "k", Secrets()).text == "A bird."
    cut = read_answer(body("", "length", **reasoned), "k", Secrets())  # and asked for with more tokens
    assert (cut.text, ending(cut.finish_reason)) == ("", "cut")


def test_an_unreadable_reply_is_asked_for_again_and_never_kept(
    server: ScriptedServer, cache: AnswerCache
) -> None:
    server.script = lambda text, n: JSONResponse(UNREADABLE[n] if n < 3 else body(SAID))
    [answer], _ = ask(server.url, cache, "Where?")
    assert (answer.text, server.requests) == (SAID, 4)
    server.script = lambda text, n: JSONResponse(UNREADABLE[n % len(UNREADABLE)])
    [failed], _ = ask(server.url, cache, "Who?", settings=SETTINGS.model_copy(update={"max_retries": 1}))
    assert isinstance(failed, EndpointFailed)
    assert len(cache) == 1
