"""The rows of plan.json, in the form of `rows`: see there."""

from typing import Annotated, TypedDict


class PlannedNetworkRow(TypedDict):
    """The collectives of one kind along the same mesh axes, per round."""

    kind: Annotated[str, "such as all-gather"]
    axes: Annotated[list[str], "mesh axes"]
    runs: Annotated[float, "how often they run"]
    bytes: Annotated[float, "bytes of their inputs per device"]
    seconds: Annotated[float, "their time, hidden behind other work or not"]


class PlannedProgramRow(TypedDict):
    """One compiled program."""

    name: Annotated[str, "what it computes"]
    runs: Annotated[float, "how often it runs per round"]
    seconds: Annotated[float | None, "time of one run; null if it does not fit"]
    compiled_in: Annotated[float, "seconds of its compilation for the plan"]


class PlannedStageRow(TypedDict):
    """One stage of a round."""

    stage: Annotated[str, "train, score, rate, neighbours, refine or export"]
    note: Annotated[str, "what was assumed or left out"]
    fits: Annotated[bool, "whether all its programs fit"]
    memory_gib: Annotated[dict[str, float], "GiB per device by kind, of the program that needs the most"]
    used_gib: Annotated[float, "their sum"]
    usable_gib: Annotated[float, "what a device has for programs"]
    remedy: Annotated[list[str] | None, "the nearest settings that fit; null if it fits, or if none do"]
    seconds_per_round: Annotated[float | None, "predicted time; null if it does not fit"]
    compiler_seconds_per_round: Annotated[float | None, "the same by the compiler's cycles"]
    limited_by: Annotated[str | None, "matmuls, memory or network"]
    seconds_by_limit: Annotated[dict[str, float], "time that each of the three limits"]
    flops: Annotated[float, "per device and round"]
    bytes: Annotated[float, "of memory read and written, per device and round"]
    network: Annotated[list[PlannedNetworkRow], "collectives by kind and mesh axes"]
    notes: Annotated[list[str], "parts of programs that could not be counted"]
    programs: Annotated[list[PlannedProgramRow], "its programs"]


class PlannedRefinerRow(TypedDict):
    """The refiner's work in a round: first attempts only."""

    rows: Annotated[float, "rows to rewrite"]
    requests: Annotated[float, "requests"]
    prompt_tokens: Annotated[float, "tokens of prompts"]
    completion_tokens: Annotated[float, "tokens of answers"]
    usd: Annotated[float, "cost by `refine.prices`"]


class PlanFile(TypedDict):
    """What `middo plan` predicts for a run."""

    version: Annotated[int, "of this file's format"]
    topology: Annotated[str, "the chips, such as v5e:8x8"]
    chips: Annotated[int, "their number"]
    mesh: Annotated[dict[str, int], "devices along each mesh axis"]
    rows: Annotated[int, "rows of the dataset"]
    tokens: Annotated[float, "their tokens"]
    lengths: Annotated[str, "where rows and lengths are from"]
    rounds: Annotated[int, "number of rounds"]
    chosen: Annotated[list[str], "values in place of settings that are `auto`"]
    fits: Annotated[bool, "whether all stages fit"]
    training_mfu: Annotated[float | None, "predicted MFU of training; null if it was not planned"]
    hours: Annotated[float, "of all rounds, of the stages that fit"]
    chip_hours: Annotated[float, "hours times chips"]
    usd: Annotated[float | None, "chip-hours times the price; null without a price"]
    refiner_per_round: Annotated[PlannedRefinerRow, "the refiner's work"]
    stages: Annotated[list[PlannedStageRow], "the stages of a round"]
