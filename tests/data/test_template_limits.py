"""Chat templates and tokenizers of strangers: one sentence in place of a full memory or an endless wait."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from support.tiny_model import write_tiny_model

from middo_jax.data.template_limits import fault_of
from middo_jax.data.templates import CONTROL_TOKENS, TemplateError, declared_ends, named_template
from middo_jax.data.tokenize import load_tokenizer

EATERS = {
    "range": ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    "loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "processor time",
    ),
    "text": ("{{ 'a' * 10**10 }}", "of memory"),
    "list": ("{% set x = [0] * 10**9 %}", "of memory"),
    "format": ("{{ '%1000000000d' % 1 }}", "of memory"),
    "center": ("{{ 'a'|center(10**10) }}", "of memory"),
    "power": ("{{ 10 ** (10 ** 10) }}", "processor time"),  # one instruction, which no exception can end
    "macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deep"),
    "doubles": (
        "{% set ns = namespace(x='aaaa') %}{% for m in messages %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}"
        "{{ ns.x|length }}",
        "of memory|processor time",
    ),
    "output": ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 1,000,000 characters"),
    "brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deep"),
    "length": ("{# " + "a" * 1_000_000 + " #}", "1,000,006 characters"),
}


def processor_time() -> float:
    """Seconds of this process and of those that it has started and that have ended."""
    each = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in each)


@pytest.mark.parametrize("name", EATERS)
def test_a_template_that_eats_resources_is_refused(name: str) -> None:
    template, words = EATERS[name]
    began = processor_time()
    fault = fault_of(template, {"bos_token": "<s>"})
    assert fault is not None
    assert any(word in fault for word in words.split("|")), fault
    assert "\n" not in fault
    assert processor_time() - began < 1.0


@pytest.mark.parametrize(
    "template",
    [
        *(named_template(name) for name in CONTROL_TOKENS),
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{% for i in [1] %}{% break %}{% endfor %}",
        "{{ raise_exception('system turns are not supported') }}",
        "{{ messages[1].content + 1 }}",  # wrong, but small: the first rendering says what is wrong
        "{% if %}",
        "{{ strftime_now('%Y') }}{{ messages | tojson }}{{ bos_token }}",
    ],
)
def test_other_templates_are_not_the_trials_concern(template: str) -> None:
    assert fault_of(template, {"bos_token": "<s>"}) is None


def test_a_tokenizer_with_such_a_template_is_not_loaded(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model")
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": EATERS["text"][0]}))
    with pytest.raises(TemplateError, match=r"chat template of .*model cannot be used: it takes more than"):
        load_tokenizer(model)
    own = tmp_path / "own.jinja"
    own.write_text(EATERS["range"][0])
    with pytest.raises(TemplateError, match="Range too big"):
        load_tokenizer(model, str(own))
    assert load_tokenizer(model, "chatml")


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_deep_file_of_stop_tokens_is_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(TemplateError, match=rf"{name}: not a JSON object: .*nested deeper") as caught:
        declared_ends(tmp_path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "content", ["{}", "", "null", "[" * 100_000, '{"model": {"type": "BPE", "vocab": {}, "merges": []}}']
)
def test_a_damaged_tokenizer_is_one_sentence(tmp_path: Path, content: str) -> None:
    model = write_tiny_model(tmp_path / "model")
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(TemplateError, match=r"model: its tokenizer") as caught:
        load_tokenizer(model)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_tokenizer_without_tokens_is_one_sentence(tmp_path: Path) -> None:
    """Its files can be loaded: they are whole, and say that there are none."""
    model = write_tiny_model(tmp_path / "model")
    whole = json.loads((model / "tokenizer.json").read_text())
    bpe = {"type": "BPE", "vocab": {}, "merges": []}
    empty = {"added_tokens": [], "post_processor": None, "model": bpe}
    (model / "tokenizer.json").write_text(json.dumps(whole | empty))
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(TemplateError, match="its tokenizer has no tokens"):
        load_tokenizer(model)
