"""launch/'s YAML and Dockerfiles against the published schemas, and what they promise.

JobSet's and Kubernetes' schemas are those of the package kubeflow-trainer-api (Apache-2.0), made from the
OpenAPI specifications that both projects publish. SkyPilot's schema is written down here as far as
launch/skypilot.yaml uses it, after sky/utils/schemas.py of SkyPilot 0.14.
"""

from __future__ import annotations

import re
import typing
from typing import Any

import pydantic
import pytest
import yaml
from support.launching import ROOT

LAUNCH = ROOT / "launch"


def unknown_fields(value: Any, model: Any, place: str = "") -> list[str]:
    """Fields that the model does not have, at any depth; generated models ignore them."""
    if isinstance(value, list):
        return [found for item in value for found in unknown_fields(item, model, f"{place}[]")]
    models = [
        part for part in _parts(model) if isinstance(part, type) and issubclass(part, pydantic.BaseModel)
    ]
    if not isinstance(value, dict) or not models:
        return []
    fields = {field.alias or name: field.annotation for name, field in models[0].model_fields.items()}
    found = [f"{place}.{key}" for key in value if key not in fields]
    for key in value.keys() & fields.keys():
        found += unknown_fields(value[key], fields[key], f"{place}.{key}")
    return found


def _parts(annotation: Any) -> list[Any]:
    """Optional[List[X]] -> [X, NoneType]; a mapping has keys of its own."""
    if typing.get_origin(annotation) is dict:
        return []
    inner = [part for argument in typing.get_args(annotation) for part in _parts(argument)]
    return inner or [annotation]


@pytest.fixture(scope="module")
def jobset() -> dict[str, Any]:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text())


@pytest.fixture(scope="module")
def schema() -> Any:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="install the dev extra")
    return models.JobsetV1alpha2JobSet


def test_jobset_is_valid_by_the_schemas_of_jobset_and_kubernetes(jobset: dict[str, Any], schema: Any) -> None:
    schema.from_dict(jobset)
    assert unknown_fields(jobset, schema) == []


@pytest.mark.parametrize(
    "path",
    [
        "failurePolicy",
        "replicatedJobs",
        "replicatedJobs.0.template.spec",
        "replicatedJobs.0.template.spec.template.spec",
    ],
)
def test_the_schema_check_sees_a_misspelt_field_at_every_depth(
    jobset: dict[str, Any], schema: Any, path: str
) -> None:
    wrong = yaml.safe_load(yaml.safe_dump(jobset))
    place = wrong["spec"]
    for key in path.split("."):
        place = place[int(key)] if key.isdigit() else place[key]
    target = place[0] if isinstance(place, list) else place
    target["misspelt"] = 1
    assert [field.rsplit(".", 1)[1] for field in unknown_fields(wrong, schema)] == ["misspelt"]


def test_the_schema_check_sees_a_wrong_value(jobset: dict[str, Any], schema: Any) -> None:
    wrong = yaml.safe_load(yaml.safe_dump(jobset))
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]["action"] = (
        "Restart"
    )
    with pytest.raises(pydantic.ValidationError, match="Count"):
        schema.from_dict(wrong)


def test_jobset_starts_again_after_a_preemption_and_not_after_an_error(jobset: dict[str, Any]) -> None:
    spec = jobset["spec"]
    [slices] = spec["replicatedJobs"]
    job = slices["template"]["spec"]
    disruption, error = job["podFailurePolicy"]["rules"]
    assert disruption["action"] == "Count"
    assert [condition["type"] for condition in disruption["onPodConditions"]] == ["DisruptionTarget"]
    assert error["action"] == "FailJob"
    assert error["onExitCodes"]["operator"] == "NotIn"
    assert {75, 143} <= set(error["onExitCodes"]["values"])
    assert 1 not in error["onExitCodes"]["values"]
    [rule] = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    # What the servers check beyond their schemas.
    assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
    assert error["onExitCodes"]["values"] == sorted(set(error["onExitCodes"]["values"]))
    assert spec["failurePolicy"]["maxRestarts"] == 50
    assert job["backoffLimit"] == 0
    assert job["parallelism"] == job["completions"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # Kubernetes wants it beside podFailurePolicy


def test_jobset_s_hosts_have_what_a_slice_needs(jobset: dict[str, Any]) -> None:
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    rule = job["podFailurePolicy"]["rules"][1]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert pod["hostNetwork"] is True
    assert pod["dnsPolicy"] == "ClusterFirstWithHostNet"  # without it, names of the cluster are unknown
    assert pod["terminationGracePeriodSeconds"] >= 300
    assert {port["containerPort"] for port in container["ports"]} >= {8471, 8080}
    memory, runs = pod["volumes"]
    assert memory["emptyDir"] == {"medium": "Memory"}
    assert runs["nfs"]["path"]
    places = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert places == {memory["name"]: "/dev/shm", runs["name"]: "/runs"}
    assert "runs_dir=/runs" in container["args"]  # a bucket is refused by the program
    assert container["command"][:2] == ["tini", "--"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert values["JAX_COORDINATOR_PORT"] == "8476"
    assert values["OPENAI_API_KEY"] is None  # from a secret


class Strict(pydantic.BaseModel):
    """No other fields, no conversions."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class JobRecovery(Strict):
    """Exit codes are 0 to 255."""

    strategy: typing.Literal["FAILOVER", "EAGER_NEXT_REGION"]
    max_restarts_on_errors: typing.Annotated[int, pydantic.Field(ge=0)]
    recover_on_exit_codes: list[typing.Annotated[int, pydantic.Field(ge=0, le=255)]]


class Resources(Strict):
    """What a node is."""

    accelerators: str
    use_spot: bool
    disk_size: int | str
    job_recovery: JobRecovery


class Task(Strict):
    """A SkyPilot task."""

    name: str
    num_nodes: int
    resources: Resources
    workdir: str
    envs: dict[typing.Annotated[str, pydantic.Field(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*$")], str | None]
    secrets: dict[str, str | None]
    setup: str
    run: str


def test_skypilot_s_task_is_valid_and_restarts_on_75() -> None:
    task = Task.model_validate(yaml.safe_load((LAUNCH / "skypilot.yaml").read_text()))
    assert task.resources.job_recovery.recover_on_exit_codes == [75]
    for word in (
        "SKYPILOT_NODE_IPS",
        "SKYPILOT_NUM_NODES",
        "SKYPILOT_NODE_RANK",
        "--coordinator",
        "--process ",
    ):
        assert word in task.run
    # The program takes these options before the command.
    assert task.run.index("--coordinator") < task.run.index("--process ") < task.run.index(" run ")
    assert task.secrets == {"OPENAI_API_KEY": ""}  # a name, never a key


@pytest.mark.parametrize(("device", "extra"), [("tpu", "tpu"), ("gpu", "gpu")])
def test_an_image_copies_files_that_exist_and_has_a_parent_for_the_program(device: str, extra: str) -> None:
    text = (LAUNCH / f"Dockerfile.{device}").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        for name in line.split():
            assert (ROOT / name).exists(), name
    assert f"'.[{extra}," in text
    assert 'ENTRYPOINT ["tini", "--", "middo"]' in text
    assert "KEY" not in text
