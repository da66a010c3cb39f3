"""The fields of a request, each with its range; docs/serving.md lists them.

Types are strict: a number in quotes is no number. null is the default. Fields that would change the answer
and are not offered are refused by name, unless they have the value that changes nothing. Other unknown
fields are ignored, since OpenAI's clients send many that are about billing and storage.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import pydantic
from pydantic import ConfigDict, Field, StringConstraints

from middo_jax.data.example import Role
from middo_jax.inference.errors import ApiError
from middo_jax.inference.sampling import HOTTEST, INT32_MAX, TOP_LOGPROBS

MAX_CHOICES = 16  # n
MAX_SEQUENCES = 128  # prompts x n
MAX_MESSAGES = 4096
MAX_STOPS = 16
DEFAULT_MAX_TOKENS = 16  # of /v1/completions, as OpenAI's

# Field -> the values that change nothing.
_NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
}
_NOT_OFFERED_IN_CHAT: dict[str, tuple[Any, ...]] = _NOT_OFFERED | {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "web_search_options": (None,),
}
_NOT_OFFERED_IN_COMPLETIONS: dict[str, tuple[Any, ...]] = _NOT_OFFERED | {
    "suffix": (None, ""),
    "best_of": (None, 1),
}


class _Fields(pydantic.BaseModel):
    """Every list has fail_fast: a body may have half a million wrong items, and an error takes a kilobyte."""

    model_config = ConfigDict(strict=True)


class TextPart(_Fields):
    """A piece of a message; of OpenAI's kinds only text."""

    type: Literal["text"]
    text: str


class ChatMessage(_Fields):
    """One turn."""

    role: Role
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    @property
    def text(self) -> str:
        """The content as one string."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(_Fields):
    """Of a streamed answer."""

    include_usage: bool | None = Field(None, description="Send one more chunk, with the counts of tokens.")


StopText = Annotated[str, StringConstraints(max_length=1024)]


class GenerationRequest(_Fields):
    """The fields that both kinds of requests have."""

    model_config = ConfigDict(strict=True, extra="allow")
    not_offered: ClassVar[Mapping[str, tuple[Any, ...]]]
    text_field: ClassVar[str]  # the one that has the text

    model: str | None = Field(None, description="The name of the served model, see /v1/models.")
    temperature: float | None = Field(
        None, ge=0, le=HOTTEST, allow_inf_nan=False, description="0: the likeliest token, always. Default 1."
    )
    top_p: float | None = Field(
        None, gt=0, le=1, description="Sample from the likeliest tokens with this share. Default 1."
    )
    top_k: int | None = Field(
        None, ge=0, le=INT32_MAX, description="Sample from the k likeliest tokens. 0: all (default)."
    )
    seed: int | None = Field(
        None, ge=-(2**63), le=2**64 - 1, description="Repeats a sampled answer; choice i has seed + i."
    )
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None = Field(
        None, description="Texts that end the answer and are not part of it."
    )
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Answers per prompt. Default 1.")
    stream: bool | None = Field(None, description="Send the answer in pieces, as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Reads a request's body.

        Raises:
          ApiError: it is no JSON, a field is missing or out of its range, or something is not offered.
        """
        try:
            request = cls.model_validate_json(body)
        except pydantic.ValidationError as error:
            raise _refusal(error) from None
        extra = request.model_extra or {}
        for name, neutral in cls.not_offered.items():
            if name in extra and not any(_equal(extra[name], each) for each in neutral):
                message = f"{name}: not offered by this server; leave it out"
                raise ApiError(400, message, name, "unsupported_parameter")
        if request.stream_options is not None and not request.stream:
            raise ApiError(400, "stream_options: only with stream", "stream_options")
        request.check()
        return request

    def check(self) -> None:
        """Raises ApiError for fields that do not go together."""

    @property
    def most_tokens(self) -> int | None:
        """Of an answer; None: as many as the context has room for."""
        raise NotImplementedError

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities of the answer's tokens are asked for."""
        raise NotImplementedError

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether those of the prompt's tokens are."""
        return False

    @property
    def stop_texts(self) -> list[str]:
        """`stop` as a list, without empty strings."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in stops if text]

    @property
    def n_choices(self) -> int:
        """Answers per prompt."""
        return self.n or 1

    @property
    def n_answers(self) -> int:
        """Answers to all prompts."""
        return self.n_choices

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    not_offered, text_field = _NOT_OFFERED_IN_CHAT, "messages"

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_tokens: int | None = Field(
        None,
        ge=1,
        le=INT32_MAX,
        description="Maximum number of tokens. Default: what the context has room for.",
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, le=INT32_MAX, description="OpenAI's newer name of max_tokens."
    )
    logprobs: bool | None = Field(None, description="Return the log-probability of each token.")
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=TOP_LOGPROBS,
        description="Number of likeliest tokens whose log-probabilities are given. Only with logprobs.",
    )

    def check(self) -> None:
        """Raises ApiError for fields that do not go together."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs=true", "top_logprobs")

    @property
    def most_tokens(self) -> int | None:
        """Of an answer; None: as many as the context has room for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities of the answer's tokens are asked for."""
        return bool(self.logprobs)


TokenId = Annotated[int, Field(ge=0, le=INT32_MAX)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    not_offered, text_field = _NOT_OFFERED_IN_COMPLETIONS, "prompt"

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_SEQUENCES, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_SEQUENCES, fail_fast=True)]
    ) = Field(description="One text or several; or their token ids.")
    max_tokens: int | None = Field(
        None, ge=0, le=INT32_MAX, description="Maximum number of tokens. 0 only with echo. Default 16."
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=TOP_LOGPROBS,
        description="Log-probabilities of the tokens and of so many likeliest ones.",
    )
    echo: bool | None = Field(None, description="Return the prompt before the answer.")

    def check(self) -> None:
        """Raises ApiError for fields that do not go together."""
        if self.max_tokens == 0 and not self.echo:
            raise ApiError(400, "max_tokens: 0 only with echo=true", "max_tokens")
        if self.stream and self.echo and self.logprobs is not None:
            raise ApiError(400, "stream: not together with echo and logprobs", "stream")
        if self.n_answers > MAX_SEQUENCES:
            raise ApiError(
                400,
                f"n: {len(self.prompts)} prompts x {self.n_choices} choices are over {MAX_SEQUENCES}; "
                "send several requests",
                "n",
            )

    @property
    def most_tokens(self) -> int | None:
        """Of an answer."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def has_logprobs(self) -> bool:
        """Whether log-probabilities of the answer's tokens are asked for."""
        return self.logprobs is not None

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether those of the prompt's tokens are; a request for no token is one for them."""
        return bool(self.echo) and (self.has_logprobs or self.max_tokens == 0)

    @property
    def n_answers(self) -> int:
        """Answers to all prompts."""
        return len(self.prompts) * self.n_choices

    @functools.cached_property
    def prompts(self) -> list[str] | list[list[int]]:
        """`prompt` as a list of texts, or of lists of token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if token_ids := [each for each in self.prompt if isinstance(each, int)]:
            return [token_ids]
        texts = [each for each in self.prompt if isinstance(each, str)]
        return texts or [each for each in self.prompt if isinstance(each, list)]


def _equal(value: object, neutral: object) -> bool:
    """Equality in JSON: true is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _refusal(error: pydantic.ValidationError) -> ApiError:
    """Names the field of the first error; pydantic's names of a union's members are left out."""
    first = error.errors(include_url=False, include_input=False)[0]
    names = {*ChatRequest.model_fields, *CompletionRequest.model_fields}
    for model in (ChatMessage, TextPart, StreamOptions):
        names |= model.model_fields.keys()
    param = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in names) or None
    return ApiError(400, f"{param or 'request body'}: {first['msg']}", param)
