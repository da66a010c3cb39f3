"""The JSON of answers: objects of OpenAI's API from pieces of text and tokens."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from middo_jax.inference.generation import Piece
from middo_jax.inference.logprobs import TokenLogprob
from middo_jax.inference.requests import ChatRequest, CompletionRequest
from middo_jax.inference.text import TextStream, is_whole_text, token_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Json = dict[str, Any]


class Writer(Protocol):
    """Writes the answers to one request."""

    def whole(self, pieces: Sequence[Piece]) -> Json:
        """The response, of one piece per answer."""
        ...

    def chunk(self, piece: Piece) -> Json:
        """An event of a stream."""
        ...

    def usage_chunk(self, n_tokens: int) -> Json:
        """The last event of a stream, if counts of tokens are asked for."""
        ...


class _Head:
    """What all objects of a response have in common."""

    def __init__(self, prefix: str, model_name: str, prompts: Sequence[Sequence[int]]) -> None:
        self._same = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}
        self._n_prompt_tokens = sum(map(len, prompts))

    def of(self, kind: str, choices: list[Json]) -> Json:
        return {**self._same, "object": kind, "choices": choices}

    def usage(self, n_tokens: int) -> Json:
        """The counts of tokens; a prompt counts once, however many answers it has."""
        return {
            "prompt_tokens": self._n_prompt_tokens,
            "completion_tokens": n_tokens,
            "total_tokens": self._n_prompt_tokens + n_tokens,
        }


class ChatWriter:
    """Writes `chat.completion` objects and `chat.completion.chunk` objects.

    Args:
      asked: the request.
      model_name: is repeated in each object.
      tokenizer: makes text of tokens.
      prompts: tokens of each prompt.
    """

    def __init__(
        self,
        asked: ChatRequest,
        model_name: str,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self._asked, self._tokenizer = asked, tokenizer
        self._head = _Head("chatcmpl", model_name, prompts)
        self._begun: set[int] = set()  # answers whose first chunk is written

    def whole(self, pieces: Sequence[Piece]) -> Json:
        """The response, of one piece per answer."""
        choices = [
            {
                "index": piece.choice,
                "message": {"role": "assistant", "content": piece.text},
                "logprobs": self._logprobs(piece),
                "finish_reason": piece.finish_reason,
            }
            for piece in pieces
        ]
        n_tokens = sum(len(piece.steps) for piece in pieces)
        return {**self._head.of("chat.completion", choices), "usage": self._head.usage(n_tokens)}

    def chunk(self, piece: Piece) -> Json:
        """An event of a stream."""
        delta = {"content": piece.text}
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            delta["role"] = "assistant"
        choice = {
            "index": piece.choice,
            "delta": delta,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }
        return self._head.of("chat.completion.chunk", [choice])

    def usage_chunk(self, n_tokens: int) -> Json:
        """The last event of a stream, if counts of tokens are asked for."""
        return {**self._head.of("chat.completion.chunk", []), "usage": self._head.usage(n_tokens)}

    def _logprobs(self, piece: Piece) -> Json | None:
        if not self._asked.logprobs:
            return None
        content = []
        for token, logprob in piece.steps:
            assert logprob is not None
            top = [self._token(*pair) for pair in logprob.top[: self._asked.top_logprobs or 0]]
            content.append({**self._token(token, logprob.logprob), "top_logprobs": top})
        return {"content": content}

    def _token(self, token: int, logprob: float) -> Json:
        text = token_text(token, self._tokenizer)
        as_bytes = list(text.encode()) if is_whole_text(token, self._tokenizer) else None
        return {"token": text, "logprob": logprob, "bytes": as_bytes}


class CompletionWriter:
    """Writes `text_completion` objects; the chunks of a stream have the same form.

    Args:
      asked: the request.
      model_name: is repeated in each object.
      tokenizer: makes text of tokens.
      prompts: tokens of each prompt.
      echoes: the text of each prompt; used if the request asks for it.
    """

    def __init__(
        self,
        asked: CompletionRequest,
        model_name: str,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[Sequence[int]],
        echoes: Sequence[str],
    ) -> None:
        self._asked, self._tokenizer = asked, tokenizer
        self._prompts, self._echoes = prompts, echoes
        self._head = _Head("cmpl", model_name, prompts)
        self._begun: set[int] = set()  # answers whose first chunk is written
        # Per answer: its text so far, and how many characters that is.
        self._texts = defaultdict[int, TextStream](lambda: TextStream(tokenizer))
        self._n_chars = defaultdict[int, int](int)

    def whole(self, pieces: Sequence[Piece]) -> Json:
        """The response, of one piece per answer."""
        n_tokens = sum(len(piece.steps) for piece in pieces)
        choices = self._head.of("text_completion", [self._choice(piece) for piece in pieces])
        return {**choices, "usage": self._head.usage(n_tokens)}

    def chunk(self, piece: Piece) -> Json:
        """An event of a stream."""
        return self._head.of("text_completion", [self._choice(piece)])

    def usage_chunk(self, n_tokens: int) -> Json:
        """The last event of a stream, if counts of tokens are asked for."""
        return {**self._head.of("text_completion", []), "usage": self._head.usage(n_tokens)}

    def _choice(self, piece: Piece) -> Json:
        text = piece.text
        if self._asked.echo and piece.choice not in self._begun:
            text = self._echoes[piece.choice // self._asked.n_choices] + text
        self._begun.add(piece.choice)
        return {
            "index": piece.choice,
            "text": text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece: Piece) -> Json | None:
        if self._asked.logprobs is None:
            return None
        rows: list[tuple[int, TokenLogprob | None]] = []
        if piece.end is not None and piece.end.prompt_logprobs is not None:
            prompt = self._prompts[piece.choice // self._asked.n_choices]
            rows += zip(prompt, piece.end.prompt_logprobs, strict=True)
        rows += piece.steps
        # The stop token has no text, but clients that score texts count on the entry of each generated token.
        if piece.end is not None and piece.end.stop is not None:
            rows.append(piece.end.stop)
        return {
            "tokens": [token_text(token, self._tokenizer) for token, _ in rows],
            "token_logprobs": [None if logprob is None else logprob.logprob for _, logprob in rows],
            "top_logprobs": [
                None if logprob is None else self._top(token, logprob) for token, logprob in rows
            ],
            "text_offset": [self._offset(piece.choice, token) for token, _ in rows],
        }

    def _top(self, token: int, logprob: TokenLogprob) -> dict[str, float]:
        """Token -> log-probability, with the token itself; of tokens with equal texts the likelier one."""
        pairs = [*logprob.top[: self._asked.logprobs], (token, logprob.logprob)]
        return {token_text(i, self._tokenizer): value for i, value in reversed(pairs)}

    def _offset(self, index: int, token: int) -> int:
        """Characters before a token, in the text that its answer's tokens have."""
        text = self._texts[index]
        before = self._n_chars[index] + text.n_pending
        self._n_chars[index] += len(text.push(token))
        return before
