"""The InfluenceJob model: defaults, limits, rules between fields, and what its schema must offer a CRD."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from influence_job.spec import (
    BlockStructure,
    CgSpec,
    CleanupPolicy,
    Device,
    DirectSpec,
    EkfacSpec,
    Expectation,
    InfluenceJob,
    Mode,
    OnExisting,
    Operation,
    Precision,
    Quantity,
    SecondOrder,
    Unsupported,
    Verify,
)
from manifests import manifest, spec


def errors_of(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Location and message of every error of a document."""
    with pytest.raises(ValidationError) as caught:
        InfluenceJob.model_validate(document, by_alias=True, by_name=False)
    return [(".".join(map(str, e["loc"])), e["msg"]) for e in caught.value.errors()]


def test_a_minimal_spec_takes_the_documented_defaults() -> None:
    made = spec()
    assert (made.operation, made.mode, made.precision) == (Operation.INFLUENCES, Mode.UP, Precision.FLOAT32)
    assert made.method == EkfacSpec(
        name="Ekfac",
        regularization=0.01,
        update_diagonal=True,
        expectation=Expectation.SAMPLED,
        samples=1,
        seed=0,
        unsupported=Unsupported.REFUSE,
    )
    output = made.output
    assert (output.on_existing, output.dense, output.top_k) == (OnExisting.RESUME, True, 100)
    assert (output.verify, output.max_bytes.bytes) == (Verify.SAMPLE, 2**40)
    assert output.allow_mixed_hardware is False
    assert (made.backoff_limit, made.suspend, made.cleanup_policy) == (3, False, CleanupPolicy.WORKERS)
    assert (made.startup_deadline_seconds, made.progress_deadline_seconds) == (3600, 3600)
    assert made.active_deadline_seconds is made.ttl_seconds_after_finished is made.chunks is None
    assert made.workers.replicas == 1


def test_cg_and_direct_default_to_what_a_job_should_use_and_not_to_pydvl() -> None:
    cg = spec(method={"name": "Cg", "regularization": 0.1}).method
    assert isinstance(cg, CgSpec)
    assert (cg.rtol, cg.atol, cg.maxiter, cg.simultaneous, cg.preconditioner) == (1e-4, 0.0, None, True, None)
    direct = spec(method={"name": "Direct", "regularization": 0.1}).method
    assert isinstance(direct, DirectSpec)
    assert (direct.blocks, direct.second_order) == (BlockStructure.FULL, SecondOrder.HESSIAN)


def test_a_document_comes_back_unchanged_from_json() -> None:
    job = InfluenceJob.model_validate(manifest(workers={"resources": {"limits": {"memory": "16Gi"}}}))
    assert InfluenceJob.model_validate_json(job.model_dump_json(by_alias=True)) == job
    assert InfluenceJob.model_validate(job.model_dump(by_alias=True, exclude_unset=True, mode="json")) == job


@pytest.mark.parametrize(
    ("changes", "device"),
    [
        ({}, Device.CPU),
        ({"workers": {"resources": {"limits": {"memory": "1Gi"}}}}, Device.CPU),
        ({"workers": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}, Device.CUDA),
        ({"workers": {"resources": {"limits": {"amd.com/gpu": "2"}}}}, Device.CUDA),
        ({"workers": {"resources": {"limits": {"nvidia.com/gpu": 0}}}}, Device.CPU),
        ({"podDefaults": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}, Device.CUDA),
        ({"driver": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}, Device.CPU),
        ({"device": "cpu", "workers": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}, Device.CPU),
        ({"device": "cuda"}, Device.CUDA),
    ],
)
def test_the_device_is_cuda_when_workers_ask_for_a_gpu(changes: dict[str, Any], device: Device) -> None:
    assert spec(**changes).resolved_device is device


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("16Gi", 16 * 2**30),
        ("1Ti", 2**40),
        ("1.5Ki", 1536),
        ("1k", 1000),
        ("2M", 2_000_000),
        ("128974848", 128974848),
        ("129e6", 129_000_000),
        ("1E3", 1000),
        ("1E", 10**18),
        ("1500m", 1),
        (".5Ki", 512),
    ],
)
def test_a_quantity_means_what_it_means_in_kubernetes(text: str, count: int) -> None:
    assert Quantity(text).bytes == count


@pytest.mark.parametrize("text", ["", "Gi", "16 Gi", "16GiB", "-1", "1e", "lots", "0x10", "1Gi\n"])
def test_what_kubernetes_would_not_read_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="expected a quantity"):
        Quantity(text)


def test_a_number_is_a_quantity_and_a_truth_value_is_none() -> None:
    limits = spec(workers={"resources": {"limits": {"cpu": 2, "memory": 1e9}}}).worker_limits
    assert (limits["cpu"], limits["memory"].bytes) == ("2", 10**9)
    [(where, message)] = errors_of(manifest(output={"maxBytes": True}))
    assert where == "spec.output.maxBytes"
    assert "expected a quantity" in message


@pytest.mark.parametrize(
    ("changes", "where", "part"),
    [
        ({"chunks": {"test": 0}}, "spec.chunks.test", "greater than or equal to 1"),
        (
            {"method": {"name": "Ekfac", "regularization": 0}},
            "spec.method.Ekfac.regularization",
            "greater than 0",
        ),
        (
            {"method": {"name": "Cg", "regularization": -1}},
            "spec.method.Cg.regularization",
            "greater than or equal",
        ),
        (
            {"method": {"name": "Ekfac", "regularization": "0.1"}},
            "spec.method.Ekfac.regularization",
            "number",
        ),
        (
            {"method": {"name": "Ekfac", "regularization": float("inf")}},
            "spec.method.Ekfac.regularization",
            "finite",
        ),
        ({"method": {"name": "Newton", "regularization": 1}}, "spec.method", "does not match"),
        ({"task": {"entrypoint": "module.task"}}, "spec.task.entrypoint", "pattern"),
        ({"task": {"entrypoint": "a b:c"}}, "spec.task.entrypoint", "pattern"),
        ({"output": {"url": "ftp://host/x"}}, "spec.output.url", "gs://"),
        ({"output": {"url": ""}}, "spec.output.url", "at least 1"),
        ({"output": {"url": "gs://"}}, "spec.output.url", "expected a bucket after gs://, got 'gs://'"),
        ({"output": {"url": "s3:///x"}}, "spec.output.url", "expected a bucket after s3://"),
        *(
            ({"output": {"url": url}}, "spec.output.url", f"s3:// or file://, got '{url}'")
            for url in ("gs:/b/x", "s3:b/x", "file:x", "file:/x", "memory:x", "memory://b/x", "a:gs://b/x")
        ),
        ({"output": {"topK": 0}}, "spec.output.topK", "greater than or equal to 1"),
        ({"workers": {"replicas": 1001}}, "spec.workers.replicas", "less than or equal to 1000"),
        ({"workers": {"replicas": "2"}}, "spec.workers.replicas", "integer"),
        ({"backoffLimit": True}, "spec.backoffLimit", "integer"),
        ({"workers": {"resources": {"claims": []}}}, "spec.workers.resources.claims", "Extra inputs"),
        ({"output": {"top_k": 3}}, "spec.output.top_k", "Extra inputs"),
        ({"factors": {"url": "x"}}, "spec", "only for operation InfluencesFromFactors"),
        ({"operation": "InfluencesFromFactors"}, "spec", "expected {url"),
        ({"operation": "InfluenceFactors", "mode": "Perturbation"}, "spec", "expected Up"),
        ({"gradients": {"url": "x"}}, "spec", "only for operation InfluencesFromGradients, got Influences"),
        (
            {"operation": "InfluencesFromGradients"},
            "spec",
            "expected {url: store of a TrainingGradients job}",
        ),
        *(
            (
                {"operation": operation, field: {"url": "gs://bucket/digits.zarr"}},
                "spec",
                f"expected another store than {field}.url, which the job reads and Overwrite would delete; "
                "give the result a url of its own, got gs://bucket/digits.zarr for both",
            )
            for field, operation in (
                ("factors", "InfluencesFromFactors"),
                ("gradients", "InfluencesFromGradients"),
            )
        ),
        (
            {"operation": "TrainingGradients", "method": {"name": "Cg", "regularization": 1}},
            "spec",
            "they solve by going over the training examples",
        ),
        ({"operation": "InfluenceFactors", "output": {"dense": False}}, "spec", "nothing would be stored"),
        ({"mode": "Perturbation", "output": {"dense": False}}, "spec", "nothing would be stored"),
        (
            {"method": {"name": "Cg", "regularization": 1, "blocks": "Custom"}},
            "spec.method.Cg",
            "expected block names",
        ),
        (
            {"method": {"name": "Cg", "regularization": 1, "customBlocks": {"a": ["w"]}}},
            "spec.method.Cg",
            "only for blocks: Custom",
        ),
    ],
)
def test_a_value_outside_of_its_limits_is_refused_at_its_field(
    changes: dict[str, Any], where: str, part: str
) -> None:
    [(location, message)] = errors_of(manifest(**changes))
    assert location == where
    assert part in message


@pytest.mark.parametrize("name", ["a" * 41, "a.b", "A", "1a", "a-", ""])
def test_a_name_that_children_could_not_extend_is_refused(name: str) -> None:
    [(where, _)] = errors_of({**manifest(), "metadata": {"name": name}})
    assert where == "metadata.name"


def test_metadata_that_a_cluster_adds_is_left_alone() -> None:
    metadata = {"name": "a" * 40, "uid": "1", "resourceVersion": "2", "managedFields": [{}]}
    assert InfluenceJob.model_validate({**manifest(), "metadata": metadata}).metadata.name == "a" * 40


def test_a_spec_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        spec().suspend = True  # type: ignore[misc]


def _models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """All models below `model`, by its JSON schema's definitions."""
    import influence_job.spec as package

    yield model
    for name in model.model_json_schema()["$defs"]:
        found = getattr(package, name, None)
        if isinstance(found, type) and issubclass(found, BaseModel):
            yield found


def test_every_field_says_what_it_is() -> None:
    silent = [
        f"{model.__name__}.{name}"
        for model in _models(InfluenceJob)
        for name, field in model.model_fields.items()
        if not field.description and name != "name"
    ]
    assert silent == []


def test_every_string_list_and_map_of_the_schema_is_bounded() -> None:
    """Without bounds the API server's estimate of a CEL rule's cost refuses the CRD."""
    schema = InfluenceJob.model_json_schema()
    loose = list(_unbounded(schema["$defs"]["InfluenceJobSpec"], schema["$defs"], "spec"))
    assert loose == []


def _unbounded(schema: dict[str, Any], definitions: dict[str, Any], path: str) -> Iterator[str]:
    if "$ref" in schema:
        yield from _unbounded(definitions[schema["$ref"].rpartition("/")[2]], definitions, path)
    for member in (*schema.get("anyOf", []), *schema.get("oneOf", [])):
        yield from _unbounded(member, definitions, path)
    kind = schema.get("type")
    if kind == "string" and not {"maxLength", "enum", "const"} & set(schema):
        yield path
    if kind == "array":
        if "maxItems" not in schema:
            yield path
        yield from _unbounded(schema.get("items", {}), definitions, f"{path}[]")
    if kind == "object":
        if "properties" not in schema and "maxProperties" not in schema:
            yield path
        for name, child in schema.get("properties", {}).items():
            yield from _unbounded(child, definitions, f"{path}.{name}")
        if isinstance(schema.get("additionalProperties"), dict):
            yield from _unbounded(schema["additionalProperties"], definitions, f"{path}.*")


def test_the_spec_imports_pydantic_and_the_standard_library_alone() -> None:
    """The operator's image has neither torch nor yaml."""
    code = (
        "import sys, influence_job.spec\n"
        "print(sorted({'torch', 'numpy', 'yaml', 'dask', 'zarr', 'fsspec', 'click'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
