"""The refiner's instructions and worked examples. `refine.prompts` names a file with the user's own.

# mine.yaml: what is not named stays as below
rewrite:
  instruction: Rewrite the prompt below as a question of a nurse to a colleague.
  example:
    prompt: pain?
    response: Where?
    new_prompt: How do I assess pain in a child of three?

A change of a shipped text requires a new `VERSION`.
"""

from __future__ import annotations

from typing import Any

import pydantic

from middo_jax.config import ConfigError
from middo_jax.config.own_texts import OwnTexts, Text, read_texts
from middo_jax.refinement.parse import parse_prompt

VERSION = "3"
SETTING = "refine.prompts"


class RevisionExample(OwnTexts):
    """A worked example of a revision. The response is shown only if the real request shows one too."""

    prompt: Text
    response: Text
    new_prompt: Text

    @pydantic.model_validator(mode="after")
    def _is_a_revision(self) -> RevisionExample:
        if self.new_prompt == self.prompt:
            raise ValueError("new_prompt repeats prompt, and the refiner would learn to repeat it")
        return self


class AdditionExample(OwnTexts):
    """A worked example of an addition."""

    core: Text
    neighbours: tuple[Text, ...] = pydantic.Field(min_length=1)
    new_prompt: Text


class Revision(OwnTexts):
    """How one kind of revision is asked for."""

    instruction: Text
    example: RevisionExample


class Addition(OwnTexts):
    """How an addition is asked for."""

    instruction: Text
    example: AdditionExample


class Words(OwnTexts):
    """The texts of all requests to the refiner, except those on which reading its reply depends.

    Attributes:
      simplify: asks for an easier prompt.
      rewrite: asks for a better one.
      both: asks for one that is easier and better, for a sample that two axes selected.
      synthesize: asks for a new one of the same area.
      in_context: is added where the prompt is the last turn of a conversation.
      several: is added where prompts have several turns.
      complete: asks for the whole of an answer that broke off.
    """

    simplify: Revision
    rewrite: Revision
    both: Revision
    synthesize: Addition
    in_context: Text
    several: Text
    complete: Text

    @property
    def written(self) -> tuple[str, ...]:
        """The new prompts of the examples: a reply that repeats one of them is an echo."""
        tasks = (self.simplify, self.rewrite, self.both, self.synthesize)
        return tuple(task.example.new_prompt for task in tasks)

    @property
    def version(self) -> str:
        """Part of every request's key and of lineage: the shipped version, and a hash of a file's texts."""
        return VERSION if self == SHIPPED else f"{VERSION}-{self.hash}"


def read_words(path: str | None) -> Words:
    """The shipped words, with those of a file in their place.

    Raises:
      ConfigError: see `read_texts`; or an example's new prompt could not be read from a reply.
    """
    if path is None:
        return SHIPPED
    own = read_texts(SETTING, path, SHIPPED)
    for name in ("simplify", "rewrite", "both", "synthesize"):
        written: Any = getattr(own, name).example.new_prompt
        if parse_prompt(f"<prompt>{written}</prompt>") != written:
            raise ConfigError(
                f"{SETTING}={path}: {name}.example.new_prompt cannot be read from a reply: give the plain "
                "prompt, without tags, quotation marks around it, or reasoning"
            )
    return own


_VAGUE = {"prompt": "tell about plants", "response": "Plants are green."}
SHIPPED = Words.model_validate(
    {
        "simplify": {
            "instruction": "Rewrite the prompt below into an easier one that a small model can learn from. "
            "Keep its subject, its kind of task and its language, and the names, numbers and formats that "
            "remain, but ask for fewer steps in plainer words and give everything that is needed.",
            "example": {
                "prompt": "Derive and prove the formula for the sum of the first n cubes.",
                "response": "It is (n(n + 1)/2)^2.",
                "new_prompt": "Compute 1^3 + 2^3 + 3^3 and show that it equals (1 + 2 + 3)^2.",
            },
        },
        "rewrite": {
            "instruction": "Rewrite the prompt below so that it is clear, complete and factual. Keep its "
            "subject, purpose and language, and the names, numbers and formats that are right.",
            "example": _VAGUE
            | {
                "new_prompt": "Explain in one paragraph how plants use sunlight, water and carbon dioxide to "
                "make food."
            },
        },
        "both": {
            "instruction": "Rewrite the prompt below so that it is clear, complete and factual, and also "
            "easy enough for a small model to learn from: fewer steps, plainer words. Keep its subject, its "
            "kind of task and its language, and the names, numbers and formats that are right.",
            "example": _VAGUE
            | {
                "new_prompt": "Name three things that a plant needs to make its food, and say where it gets "
                "each of them."
            },
        },
        "synthesize": {
            "instruction": "Below are a core prompt and its neighbours. Write one entirely new prompt of the "
            "same area and language that asks for something none of them asks for. Do not reword or combine "
            "them. It must make sense on its own.",
            "example": {
                "core": "Name three birds that cannot fly.",
                "neighbours": ["Why do birds sing in the morning?"],
                "new_prompt": "Describe how the feathers of an owl let it fly without a sound.",
            },
        },
        "in_context": "The prompt is the last thing that the user says in the conversation below. The new "
        "prompt takes its place. It may refer to what was said before, and must not ask again what was "
        "answered there.",
        "several": "Where a prompt has parts marked [turn 1], [turn 2], a user wrote them one after the "
        "other. Write the new prompt as one message, without such marks.",
        "complete": "Your answer broke off. Give the whole answer again, from its beginning to its end, and "
        "only that.",
    }
)
