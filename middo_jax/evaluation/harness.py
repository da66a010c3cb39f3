"""lm-eval's requests, answered by our passes and our engine. Needs the extra `eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from middo_jax.evaluation.pairs import Encoder, Pair

MAX_GEN_TOKS = 256  # tokens of an answer where a task sets no limit, as in lm-eval
_GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class Prompt(NamedTuple):
    """A text to be continued.

    Attributes:
      tokens: of the text, at least one.
      max_tokens: of the answer at most.
      until: texts before which the answer ends.
      temperature: 0 takes the likeliest token, always.
      top_p: sample from the likeliest tokens that hold this share of the probability; 1 is off.
      top_k: sample from the k likeliest tokens; 0 is off.
      seed: of the samples.
    """

    tokens: list[int]
    max_tokens: int
    until: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


class Backend(Protocol):
    """The model: it scores and answers. Results come in the order of what is given."""

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether its tokens are the likeliest ones.

        No context and no continuation is empty.
        """
        ...

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """The answer to each prompt, without the text that ended it."""
        ...


class HarnessModel(TemplateLM):
    """A model for lm-eval.

    Args:
      encoder: the tokenizer. Its chat template is used if lm-eval is told to apply one.
      backend: the model.
      max_length: tokens of context and continuation, or of prompt and answer. A context that is too long
        is cut on its left.
      say: receives what was cut or empty, one line per kind and call.
    """

    def __init__(
        self, encoder: Encoder, backend: Backend, max_length: int, say: Callable[[str], None]
    ) -> None:
        super().__init__()
        self.tokenizer = encoder.tokenizer
        self.max_length = max_length
        self._encoder, self._backend, self._say = encoder, backend, say

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS; its BOS where it has none."""
        eos = self._encoder.tokenizer.eos_token_id
        return eos if isinstance(eos, int) else self._encoder.prefix

    @property
    def prefix_token_id(self) -> int:
        """The context of a text that has none: BOS, or EOS where there is no BOS."""
        return self._encoder.prefix

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer where a task sets no limit."""
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """Where the tokenizer comes from."""
        return str(self._encoder.tokenizer.name_or_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text; without the tokenizer's special ones if `add_special_tokens` is False."""
        if add_special_tokens is False:
            return Encoder(self._encoder.tokenizer, False).text(string)
        return self._encoder.text(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text. Without a generation prompt, the last message stays open."""
        return str(
            self._encoder.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See `LM`; the boundary between context and continuation is found as in `pairs`.

        A continuation without tokens has log-likelihood 0 and is greedy: the product of no probabilities.
        """
        return self._scores(
            self._encoder.pairs([cast(tuple[str, str], request.args) for request in requests])
        )

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return self._scores([Pair(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """See `LM`. A text without tokens has log-likelihood 0."""
        windows: list[Pair] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = self._encoder.text(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            new = [Pair(*make_disjoint_window(window)) for window in rolling]
            windows += new
            owners += [i] * len(new)
        totals = [0.0] * len(requests)
        for i, (log_likelihood, _) in zip(owners, self._scores(windows), strict=True):
            totals[i] += log_likelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM`. Sampling is seeded by the request's place, so that a second run gives the same.

        Raises:
          ValueError: a task sets something that the engine cannot do, or leaves no room for the prompt.
        """
        prompts = [self._prompt(i, *request.args) for i, request in enumerate(requests)]
        n_cut = sum(is_cut for _, is_cut in prompts)
        if n_cut:
            self._say(f"{n_cut} prompts were cut on the left to leave room in {self.max_length} tokens")
        return self._backend.answers([prompt for prompt, _ in prompts])

    def _prompt(self, seed: int, context: str, settings: dict[str, Any]) -> tuple[Prompt, bool]:
        """A request of `generate_until`, and whether its context was cut."""
        found: dict[str, Any] = dict(normalize_gen_kwargs(settings, MAX_GEN_TOKS))
        if unknown := found.keys() - _GENERATION:
            raise ValueError(
                f"generation_kwargs of a task: {', '.join(sorted(unknown))} is not supported; "
                f"what is: {', '.join(sorted(_GENERATION))}"
            )
        max_tokens = int(found["max_gen_toks"])
        room = self.max_length - max_tokens
        if room < 1:
            raise ValueError(
                f"a task asks for answers of up to {max_tokens} tokens, and evaluate.max_length="
                f"{self.max_length} leaves no room for the prompt: raise it, or lower the task's max_gen_toks"
            )
        tokens = self._encoder.text(context) or [self.prefix_token_id]
        eos = str(self._encoder.tokenizer.decode([self.eot_token_id]))
        until = handle_stop_sequences(list(found["until"]), eos)
        prompt = Prompt(
            tokens[-room:],
            max_tokens,
            tuple(text for text in until if text),
            float(found.get("temperature", 1.0)) if found["do_sample"] else 0.0,
            float(found.get("top_p") or 1.0),
            int(found.get("top_k") or 0),
            seed,
        )
        return prompt, len(tokens) > room

    def _scores(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        scored = [i for i, pair in enumerate(pairs) if pair.continuation]
        if len(scored) < len(pairs):
            self._say(f"{len(pairs) - len(scored)} continuations have no token; their log-likelihood is 0")
        fitting = [self._fitting(pairs[i]) for i in scored]
        n_cut = sum(fits.context != pairs[i].context for i, fits in zip(scored, fitting, strict=True))
        if n_cut:
            self._say(f"{n_cut} contexts were cut on the left to fit into {self.max_length} tokens")
        found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        for i, score in zip(scored, self._backend.log_likelihoods(fitting), strict=True):
            found[i] = score
        return found

    def _fitting(self, pair: Pair) -> Pair:
        """The pair with the end of its context. The last token is predicted and not read: hence the 1."""
        room = self.max_length + 1 - len(pair.continuation)
        if room < 1:
            raise ValueError(
                f"a continuation has {len(pair.continuation)} tokens; evaluate.max_length={self.max_length} "
                "leaves no room for any context before it"
            )
        return Pair(pair.context[-room:], pair.continuation)
