"""launch/pytorchjob.yaml: the training operator accepts it, and a pod starts what it should."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.stand_ins import ROOT, copy, launch, listening
from tests.hub_cache import cache_model

__all__ = ["copy", "listening"]  # fixtures

# What the operator fills in, and rejects the job without; its CRD says the same at much greater
# length.
POD = {
    "terminationGracePeriodSeconds": int,
    "containers": [
        {"name": str, "image": str, "command": [str], "args": [str], "resources": {"limits": dict}}
    ],
}
REPLICAS = {"replicas": int, "restartPolicy": str, "template": {"spec": POD}}
JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "nprocPerNode": str,
        "runPolicy": {"backoffLimit": int, "cleanPodPolicy": str},
        "pytorchReplicaSpecs": {"Master": REPLICAS, "Worker": REPLICAS},
    },
}


def fits(value: Any, schema: Any, at: str = "") -> None:
    """Every key of ``schema`` is in ``value``, with the type or the structure that it says."""
    if isinstance(schema, type):
        assert type(value) is schema, f"{at}: {value!r} is no {schema.__name__}"
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, at
        for i, item in enumerate(value):
            fits(item, schema[0], f"{at}[{i}]")
    else:
        assert schema.keys() <= value.keys(), f"{at}: no {schema.keys() - value.keys()}"
        for key in schema:
            fits(value[key], schema[key], f"{at}.{key}")


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "launch" / "pytorchjob.yaml").read_text())


def test_pytorchjob_is_what_the_operator_takes(job: dict[str, Any]) -> None:
    fits(job, JOB)
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    assert spec["pytorchReplicaSpecs"].keys() == {"Master", "Worker"}
    assert spec["pytorchReplicaSpecs"]["Master"]["replicas"] == 1
    assert spec["runPolicy"]["cleanPodPolicy"] in ("All", "Running", "None")
    for replicas in spec["pytorchReplicaSpecs"].values():
        assert replicas["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        pod = replicas["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch", (
            "the operator gives its environment to the container of this name"
        )
        # The operator makes a service for the port of this name; ranks meet there.
        assert {"name": "pytorchjob-port", "containerPort": 29500} in container["ports"]
        # One rank for each GPU of a pod.
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(spec["nprocPerNode"])
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        # The command is a path in the image, which has the repository's launch/ at the same place.
        assert os.access(ROOT / container["command"][0], os.X_OK)


@pytest.mark.parametrize(
    ("replica", "index", "rank"), [("Master", 0, 0), ("Worker", 0, 1), ("Worker", 2, 3)]
)
def test_a_pod_takes_its_place(
    copy: Path,
    listening: int,
    job: dict[str, Any],
    replica: str,
    index: int,
    rank: int,
    tmp_path: Path,
) -> None:
    """The pod's own command under what the operator sets (its setPodEnv), node 0's service name
    answering here."""
    spec = job["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    num_nodes = replicas["Master"]["replicas"] + replicas["Worker"]["replicas"]
    # The pod of this parameter exists in the job as it is written.
    assert index < spec["pytorchReplicaSpecs"][replica]["replicas"]
    port = {"MASTER_PORT": str(listening), "PET_MASTER_PORT": str(listening)}
    injected = {
        "MASTER_ADDR": "localhost", "PET_MASTER_ADDR": "localhost", "PET_NNODES": str(num_nodes),
        "RANK": str(rank),
        "PET_NODE_RANK": str(rank), "PET_NPROC_PER_NODE": spec["nprocPerNode"],
        "WORLD_SIZE": str(num_nodes * 8),
    }  # fmt: skip
    (container,) = spec["pytorchReplicaSpecs"][replica]["template"]["spec"]["containers"]
    script = Path(container["command"][0]).name
    # What lies on the shared disk is looked up before ranks start: here it is a name on the hub and
    # a folder of this test.
    here = {
        "model.path": "Qwen/Qwen3-30B-A3B",
        "data.train": "runs/quickstart/arithmetic.jsonl",
        "checkpoint.dir": "run",
    }
    arguments = []
    for argument in container["args"]:
        key = argument.partition("=")[0]
        arguments.append(f"{key}={here[key]}" if key in here else argument)
    # The config file comes first; its path is relative to the repository.
    arguments[0] = str(ROOT / arguments[0])
    # Downloaded before: the hub is not asked for it.
    cache_model(tmp_path / "hub", here["model.path"])
    result = launch(
        copy, script, *arguments, **injected, **port, LOCAL_ADDR="10.0.0.7",
        HF_HUB_CACHE=str(tmp_path / "hub"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    # After the line with its process id, what torchrun was started with.
    said = result.stdout.splitlines()[1:]
    assert said[:4] == ["--nnodes", "4", "--nproc-per-node", "8"]
    assert f"localhost:{listening}" in said
    # Node 0 holds the store; the others wait for it, which may take a pod's start.
    assert f"is_host={int(rank == 0)},timeout=900,read_timeout=30" in said
    assert said[said.index("--local-addr") + 1 :] == [
        "10.0.0.7",
        "-m",
        "megalora.train",
        *arguments,
    ]
