"""Jobs that are right, and ways to make them wrong: what a schema is tested with.

`VALID` sets every field of the spec somewhere. `broken` walks a job beside the CRD's schema and yields the
same job with one thing wrong: another type, a value out of range, a field too many or too few.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from influence_job.spec import API_VERSION, KIND

Json = Any
Path = tuple[str | int, ...]

POD: dict[str, Json] = {
    "resources": {"limits": {"cpu": 1, "memory": "2Gi"}, "requests": {"cpu": "500m"}},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "affinity": {
        "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}
    },
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "priorityClassName": "batch",
    "labels": {"team": "research", "kueue.x-k8s.io/queue-name": "gpus"},
    "annotations": {"example.org/note": "any text: ü {{ }} \n"},
    "env": [{"name": "HF_HOME", "value": "/cache"}],
    "envFrom": [{"configMapRef": {"name": "settings"}}],
    "volumes": [{"name": "cache", "emptyDir": {}}],
    "volumeMounts": [{"name": "cache", "mountPath": "/cache"}],
    "fsGroup": 1000,
    "serviceAccountName": "research",
    "imagePullSecrets": [{"name": "registry"}],
    "imagePullPolicy": "Always",
    "runtimeClassName": "nvidia",
    "terminationGracePeriodSeconds": 60,
}
TASK = {"entrypoint": "package.module:task"}
OUTPUT = {"url": "gs://bucket/digits.zarr"}
EKFAC = {"name": "Ekfac", "regularization": 0.01}


def job(spec: Json, name: str = "sample") -> dict[str, Json]:
    """A whole manifest."""
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": copy.deepcopy(spec)}


_SPECS: dict[str, dict[str, Json]] = {
    "shortest": {"task": TASK, "method": EKFAC, "output": OUTPUT},
    "ekfac": {
        "task": {
            **TASK,
            "arguments": {"deep": {"list": [1, 1.5, None, "x", {"a": [None]}]}, "flag": True},
            "source": {"configMap": {"name": "task-source"}},
        },
        "operation": "Influences",
        "mode": "Up",
        "method": {
            **EKFAC,
            "updateDiagonal": False,
            "expectation": "Exact",
            "samples": 2,
            "seed": 2**53,
            "unsupported": "Exclude",
        },
        "device": "cuda",
        "precision": "TF32",
        "factorDtype": "BFloat16",
        "chunks": {"test": 64, "train": 256},
        "output": {
            **OUTPUT,
            "onExisting": "Fail",
            "dense": False,
            "topK": 10,
            "verify": "All",
            "maxBytes": 1_000_000,
            "allowMixedHardware": True,
            "storageOptions": {"project": "research", "deep": {"a": [1, {"b": 1e-3}]}},
            "credentialsSecretRef": {"name": "bucket.credentials"},
        },
        "image": "registry.example.org:5000/team/worker@sha256:" + 64 * "a",
        "workers": {**POD, "replicas": 4, "deviceMemory": "16Gi"},
        "driver": POD,
        "scheduler": {"resources": {"limits": {"memory": "1e9"}}},
        "podDefaults": {"labels": {"team": ""}},
        "suspend": True,
        "backoffLimit": 0,
        "activeDeadlineSeconds": 3600,
        "startupDeadlineSeconds": 60,
        "progressDeadlineSeconds": 2**31 - 1,
        "cleanupPolicy": "None",
        "ttlSecondsAfterFinished": 0,
        "managedBy": "kueue.x-k8s.io/multikueue",
    },
    "direct": {
        "task": TASK,
        "mode": "Perturbation",
        "method": {
            "name": "Direct",
            "regularization": 0,
            "relative": True,
            "blocks": "Custom",
            "customBlocks": {"head": ["2.weight", "2.bias"], "body": ["0.weight"]},
            "secondOrder": "GeneralizedGaussNewton",
        },
        "output": {"url": "results/digits.zarr"},
    },
    "cg": {
        "task": TASK,
        "operation": "InfluenceFactors",
        "method": {
            "name": "Cg",
            "regularization": 1e-6,
            "regularizationByBlock": {"0": 0.1, "2": 1},
            "blocks": "LayerWise",
            "secondOrder": "EmpiricalFisher",
            "rtol": 0.5,
            "atol": 0,
            "maxiter": 1_000_000,
            "simultaneous": False,
            "preconditioner": {"name": "Nystroem", "rank": 10},
        },
        "output": OUTPUT,
    },
    "cg of all workers": {
        "task": TASK,
        "method": {"name": "Cg", "regularization": 0.1, "products": "Distributed", "simultaneous": True},
        "output": OUTPUT,
    },
    "arnoldi": {
        "task": TASK,
        "method": {
            "name": "Arnoldi",
            "regularization": 0,
            "rank": 20,
            "krylovDimension": 21,
            "tol": 1e-4,
            "maxIter": 0,
            "complement": False,
            "seed": 2**53,
            "blocks": "ParameterWise",
        },
        "output": OUTPUT,
    },
    "nystroem": {
        "task": TASK,
        "method": {
            "name": "NystroemSketch",
            "regularization": 1e-6,
            "regularizationByBlock": {"": 0.1},
            "rank": 100_000,
            "seed": 3,
        },
        "output": OUTPUT,
    },
    "jacobi": {
        "task": TASK,
        "operation": "InfluencesFromFactors",
        "method": {
            "name": "Cg",
            "regularization": 1,
            "preconditioner": {"name": "Jacobi", "samples": 10_000},
        },
        "factors": {"url": "s3://bucket/factors.zarr"},
        "output": OUTPUT,
    },
    "lissa": {
        "task": TASK,
        "method": {
            "name": "Lissa",
            "regularization": 0,
            "rtol": 1e-10,
            "atol": 0.5,
            "maxiter": 1,
            "scale": 1e-3,
            "dampen": 0,
            "batchSize": 1,
            "seed": 2**53,
            "secondOrder": "GeneralizedGaussNewton",
        },
        "output": OUTPUT,
    },
    "inverse harmonic mean": {
        "task": TASK,
        "mode": "Perturbation",
        "method": {
            "name": "InverseHarmonicMean",
            "regularization": 0.1,
            "regularizationByBlock": {"head": 1e-9},
            "blocks": "Custom",
            "customBlocks": {"head": ["2.weight"]},
        },
        "output": OUTPUT,
    },
    "grad-dot": {"task": TASK, "mode": "Perturbation", "method": {"name": "GradDot"}, "output": OUTPUT},
    "trak": {
        "task": TASK,
        "method": {"name": "Trak", "regularization": 0, "rank": 100_000, "seed": 2**53},
        "output": OUTPUT,
    },
    "logra": {
        "task": TASK,
        "operation": "InfluencesByBlock",
        "method": {"name": "Logra", "regularization": 0, "relative": True, "rank": 1000, "seed": 2**53},
        "output": OUTPUT,
    },
    "tracin": {"task": TASK, "method": {"name": "TracIn"}, "output": OUTPUT},
    "self-influence": {
        "task": TASK,
        "operation": "SelfInfluence",
        "method": EKFAC,
        "chunks": {"train": 100},
        "output": OUTPUT,
    },
    "gradients": {
        "task": TASK,
        "operation": "TrainingGradients",
        "method": {"name": "Trak", "regularization": 0.1, "rank": 512},
        "chunks": {"train": 100},
        "output": OUTPUT,
    },
    "from gradients": {
        "task": TASK,
        "operation": "InfluencesFromGradients",
        "method": {"name": "Logra", "regularization": 0.1, "rank": 8},
        "gradients": {"url": "s3://bucket/gradients.zarr"},
        "chunks": {"test": 10, "train": 100},
        "output": {**OUTPUT, "dense": False},
    },
    "by block": {
        "task": TASK,
        "operation": "InfluencesByBlock",
        "method": {"name": "Direct", "regularization": 0.1, "blocks": "LayerWise"},
        "output": OUTPUT,
    },
    "by token": {
        "task": TASK,
        "operation": "InfluencesByToken",
        "method": {"name": "GradDot"},
        "output": OUTPUT,
    },
    "by layer": {"task": TASK, "operation": "InfluencesByBlock", "method": EKFAC, "output": OUTPUT},
    "perturbations by layer": {
        "task": TASK,
        "operation": "InfluencesByBlock",
        "mode": "Perturbation",
        "method": EKFAC,
        "output": OUTPUT,
    },
}
VALID: dict[str, dict[str, Json]] = {name: job(spec) for name, spec in _SPECS.items()}

_HOSTILE = (
    "a\x1b[2Jb",
    "line\nbreak",
    "\x00",
    "{{ .Values.secret }}",
    "$(rm -rf /)",
    "../../etc/passwd",
    "' || true || '",
    "x" * 70_000,
    "\u202egnp.exe",
    "!!python/object/apply:os.system [id]",
    "-",
    "",
    "🦆" * 3000,
)
_OTHER_TYPES: dict[str, tuple[Json, ...]] = {
    "object": ("text", 1, [], True),
    "array": ("text", 1, {}, True),
    "string": (1, True, {}, []),
    "integer": ("1", 1.5, True, {}),
    "number": ("0.1", True, [], {}),
    "boolean": ("true", 1, {}, []),
}


@dataclass(frozen=True)
class Broken:
    """A job with one thing wrong."""

    what: str
    """In words, for a test's output."""
    path: Path
    """Where: the nearest field that a message must name."""
    document: dict[str, Json]


def broken(document: dict[str, Json], schema: dict[str, Json]) -> Iterator[Broken]:
    """Every way to break the spec of `document` that its schema (that of `spec`) tells of."""
    for path, value, part in _walk(document["spec"], schema, ()):
        for what, wrong in _wrong(value, part):
            if json.dumps(wrong) != json.dumps(value):
                yield _replaced(document, path, f"{_name(path)}: {what}", wrong)
        if isinstance(value, dict):
            yield from _fields_too_many_or_few(document, path, value, part)


def _wrong(value: Json, part: dict[str, Json]) -> Iterator[tuple[str, Json]]:
    for other in _OTHER_TYPES.get(part.get("type", ""), ()):
        yield f"another type, {other!r}", other
    if part.get("x-kubernetes-int-or-string"):
        for other in (True, {}, -1, "lots", "1 Gi", "-1Gi", "1" * 40, *_HOSTILE):
            yield f"no quantity, {str(other)[:20]!r}", other
    if "enum" in part:
        for other in (value.lower(), f" {value}", *_HOSTILE):
            yield f"no choice, {other[:20]!r}", other
    elif part.get("type") == "string":
        yield from _wrong_text(part)
    if "minimum" in part and "type" in part:
        yield "too small", part["minimum"] - (0 if part.get("exclusiveMinimum") else 1)
    if "maximum" in part:
        yield "too large", part["maximum"] + (0 if part.get("exclusiveMaximum") else 1)
    if "maxItems" in part:
        yield "too many items", [value[0] if value else {}] * (part["maxItems"] + 1)
    if "maxProperties" in part:
        some = next(iter(value.values()), {})
        yield "too many keys", {f"key{i}": some for i in range(part["maxProperties"] + 1)}
    if isinstance(part.get("additionalProperties"), dict) and "x-kubernetes-validations" in part:
        yield "a key too long", {"k" * 400: next(iter(value.values()), {})}
    if part.get("minItems") or part.get("minProperties"):
        yield "empty", type(value)()


def _wrong_text(part: dict[str, Json]) -> Iterator[tuple[str, Json]]:
    yield "too long", "x" * (part["maxLength"] + 1)
    if part.get("minLength"):
        yield "empty", ""
    if "pattern" in part:
        for text in _HOSTILE[:3]:
            yield f"hostile, {text!r}", text


def _fields_too_many_or_few(
    document: dict[str, Json], path: Path, value: dict[str, Json], part: dict[str, Json]
) -> Iterator[Broken]:
    for field in part.get("required", []):
        rest = {name: item for name, item in value.items() if name != field}
        yield _replaced(document, (*path,), f"{_name((*path, field))}: absent", rest, named=(*path, field))
    if "properties" in part:
        for field in ("claims", "priviliged", "__proto__", "onExisting_", "über"):
            if field not in part["properties"]:
                extended = {**value, field: {}}
                yield _replaced(
                    document, path, f"{_name(path)}: unknown {field}", extended, named=(*path, field)
                )


def broken_rules() -> Iterator[Broken]:
    """What the schema's rules forbid between fields."""
    factors = {"url": "gs://bucket/factors.zarr"}
    solver = {"name": "Direct", "regularization": 0.1}
    harmonic = {"name": "InverseHarmonicMean", "regularization": 0.1}
    blocks = {"all": ["0.weight"]}
    changes: list[tuple[str, Path, Json]] = [
        ("factors without need", ("factors",), {"factors": factors}),
        ("factors missing", ("factors",), {"operation": "InfluencesFromFactors"}),
        (
            "an output that is the factors",
            ("output", "url"),
            {"operation": "InfluencesFromFactors", "factors": factors, "output": factors},
        ),
        (
            "an output that is the gradients",
            ("output", "url"),
            {"operation": "InfluencesFromGradients", "gradients": factors, "output": factors},
        ),
        ("a mode for factors", ("mode",), {"operation": "InfluenceFactors", "mode": "Perturbation"}),
        ("gradients without need", ("gradients",), {"gradients": {"url": "gs://bucket/gradients.zarr"}}),
        ("gradients missing", ("gradients",), {"operation": "InfluencesFromGradients"}),
        ("a mode for gradients", ("mode",), {"operation": "TrainingGradients", "mode": "Perturbation"}),
        (
            "a mode for scores of gradients",
            ("mode",),
            {
                "operation": "InfluencesFromGradients",
                "gradients": {"url": "gs://bucket/gradients.zarr"},
                "mode": "Perturbation",
            },
        ),
        (
            "test examples of gradients",
            ("chunks", "test"),
            {"operation": "TrainingGradients", "chunks": {"test": 3, "train": 3}},
        ),
        (
            "no gradients stored",
            ("output", "dense"),
            {"operation": "TrainingGradients", "output": {**OUTPUT, "dense": False}},
        ),
        *(
            (
                f"stored gradients for {name}",
                ("method",),
                {"operation": "TrainingGradients", "method": {"name": name, "regularization": 0.1}},
            )
            for name in ("Cg", "Lissa", "InverseHarmonicMean")
        ),
        (
            "nothing stored",
            ("output", "dense"),
            {"mode": "Perturbation", "output": {**OUTPUT, "dense": False}},
        ),
        (
            "no factors stored",
            ("output", "dense"),
            {"operation": "InfluenceFactors", "output": {**OUTPUT, "dense": False}},
        ),
        ("a mode for one example", ("mode",), {"operation": "SelfInfluence", "mode": "Perturbation"}),
        (
            "test examples of none",
            ("chunks", "test"),
            {"operation": "SelfInfluence", "chunks": {"test": 3, "train": 3}},
        ),
        (
            "no self-influences stored",
            ("output", "dense"),
            {"operation": "SelfInfluence", "output": {**OUTPUT, "dense": False}},
        ),
        ("one block", ("method",), {"operation": "InfluencesByBlock", "method": solver}),
        (
            "one block by name",
            ("method",),
            {"operation": "InfluencesByBlock", "method": {**solver, "blocks": "Full"}},
        ),
        ("no blocks at all", ("method",), {"operation": "InfluencesByBlock", "method": {"name": "GradDot"}}),
        (
            "no parts stored",
            ("output", "dense"),
            {"operation": "InfluencesByBlock", "output": {**OUTPUT, "dense": False}},
        ),
        (
            "a mode for parts of tokens",
            ("mode",),
            {"operation": "InfluencesByToken", "mode": "Perturbation"},
        ),
        (
            "no parts of tokens stored",
            ("output", "dense"),
            {"operation": "InfluencesByToken", "output": {**OUTPUT, "dense": False}},
        ),
        ("a scheme", ("output", "url"), {"output": {"url": "ftp://host/x"}}),
        ("a scheme in capitals", ("output", "url"), {"output": {"url": "GS://bucket/x"}}),
        ("no bucket", ("output", "url"), {"output": {"url": "s3:///x"}}),
        ("one slash", ("output", "url"), {"output": {"url": "gs:/bucket/x"}}),
        ("each process's own memory", ("output", "url"), {"output": {"url": "memory://bucket/x"}}),
        (
            "a scheme of the factors",
            ("factors", "url"),
            {"operation": "InfluencesFromFactors", "factors": {"url": "javascript://x"}},
        ),
        (
            "a scheme of the gradients",
            ("gradients", "url"),
            {"operation": "InfluencesFromGradients", "gradients": {"url": "ftp://host/x"}},
        ),
        ("λ of 0 for EK-FAC", ("method", "regularization"), {"method": {**EKFAC, "regularization": 0}}),
        (
            "λ of 0 for the complement",
            ("method", "regularization"),
            {"method": {"name": "Arnoldi", "regularization": 0}},
        ),
        (
            "λ of 0 for the complement of a block",
            ("method", "regularizationByBlock"),
            {"method": {"name": "Arnoldi", "regularization": 1, "regularizationByBlock": {"0": 0}}},
        ),
        (
            "no room for the search",
            ("method", "krylovDimension"),
            {"method": {"name": "Arnoldi", "regularization": 1, "krylovDimension": 10}},
        ),
        (
            "λ of 0 for Nyström",
            ("method", "regularization"),
            {"method": {"name": "NystroemSketch", "regularization": 0, "rank": 3}},
        ),
        (
            "λ of 0 for Nyström in a block",
            ("method", "regularizationByBlock"),
            {
                "method": {
                    "name": "NystroemSketch",
                    "regularization": 1,
                    "rank": 3,
                    "regularizationByBlock": {"0": 0},
                }
            },
        ),
        ("λ of 0 for DataInf", ("method", "regularization"), {"method": {**harmonic, "regularization": 0}}),
        (
            "λ of 0 for a block of DataInf",
            ("method", "regularizationByBlock"),
            {"method": {**harmonic, "regularizationByBlock": {"0": 0.1, "2": 0}}},
        ),
        (
            "a scale of 0",
            ("method", "scale"),
            {"method": {"name": "Lissa", "regularization": 0.1, "scale": 0}},
        ),
        ("λ that is missing", ("method", "regularization"), {"method": {"name": "Direct"}}),
        ("λ that EK-FAC misses", ("method", "regularization"), {"method": {"name": "Ekfac"}}),
        (
            "λ without a curvature",
            ("method", "regularization"),
            {"method": {"name": "GradDot", "regularization": 1}},
        ),
        ("a seed of TracIn", ("method", "seed"), {"method": {"name": "TracIn", "seed": 1}}),
        ("no blocks", ("method", "customBlocks"), {"method": {**solver, "blocks": "Custom"}}),
        ("blocks without need", ("method", "customBlocks"), {"method": {**solver, "customBlocks": blocks}}),
        (
            "two kinds of λ",
            ("method", "relative"),
            {"method": {**solver, "relative": True, "regularizationByBlock": {"0": 1}}},
        ),
        (
            "shared row by row",
            ("method", "simultaneous"),
            {"method": {**solver, "name": "Cg", "products": "Distributed", "simultaneous": False}},
        ),
        (
            "unknown products",
            ("method", "products"),
            {"method": {**solver, "name": "Cg", "products": "Shared"}},
        ),
        (
            "no rank",
            ("method", "preconditioner", "rank"),
            {"method": {"name": "Cg", "regularization": 1, "preconditioner": {"name": "Nystroem"}}},
        ),
        (
            "rank of Jacobi",
            ("method", "preconditioner", "rank"),
            {"method": {"name": "Cg", "regularization": 1, "preconditioner": {"name": "Jacobi", "rank": 1}}},
        ),
        ("a null argument", ("task", "arguments", "seed"), {"task": {**TASK, "arguments": {"seed": None}}}),
        (
            "a deep null",
            ("output", "storageOptions"),
            {"output": {**OUTPUT, "storageOptions": {"a": [{"b": None}]}}},
        ),
        ("a token for the API server", ("workers", "volumes"), {"workers": {"volumes": [_TOKEN]}}),
    ]
    for what, path, change in changes:
        yield Broken(what, path, job({**_SPECS["shortest"], **change}))
    for name, foreign in (
        ("Ekfac", {"rtol": 0.1}),
        ("Ekfac", {"blocks": "Full"}),
        ("Ekfac", {"preconditioner": {"name": "Jacobi"}}),
        ("Direct", {"simultaneous": True}),
        ("Direct", {"samples": 3}),
        ("Cg", {"updateDiagonal": True}),
        ("Cg", {"seed": 1}),
        ("Arnoldi", {"samples": 1}),
        ("Direct", {"complement": True}),
        ("Cg", {"scale": 2}),
        ("Lissa", {"products": "Distributed"}),
        ("Lissa", {"simultaneous": True}),
        ("InverseHarmonicMean", {"secondOrder": "Hessian"}),
        ("InverseHarmonicMean", {"rtol": 0.1}),
    ):
        [field] = foreign
        method = {"name": name, "regularization": 0.1, **foreign}
        yield Broken(f"{field} of {name}", ("method", field), job({**_SPECS["shortest"], "method": method}))


_TOKEN = {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "token"}}]}}

CHANGES: dict[str, tuple[Json, ...]] = {
    "task": ({"entrypoint": "package.module:other"}, {**TASK, "arguments": {"deep": {"list": [2]}}}),
    "operation": (
        "InfluenceFactors",
        "TrainingGradients",
        "SelfInfluence",
        "InfluencesByBlock",
        "InfluencesByToken",
    ),
    "mode": ("Perturbation",),
    "method": (
        {**EKFAC, "regularization": 0.02},
        {**EKFAC, "seed": 0},
        {"name": "Direct", "regularization": 0.01},
    ),
    "device": ("cpu", "cuda"),
    "precision": ("TF32",),
    "factorDtype": ("Float32", "BFloat16"),
    "chunks": ({"test": 1}, {}),
    "output.url": ("gs://bucket/other.zarr",),
    "output.onExisting": ("Overwrite",),
    "output.dense": (False,),
    "output.topK": (7,),
    "output.verify": ("None",),
    "output.maxBytes": ("2Ti",),
}
"""Immutable field -> values of which at least one is another than a job's own."""


def without_options(document: dict[str, Json], chance: random.Random) -> dict[str, Json]:
    """The job with some fields left out, at random; not all of these are right."""

    def thinned(value: Json) -> Json:
        if not isinstance(value, dict):
            return value
        return {name: thinned(item) for name, item in value.items() if chance.random() < 0.8}

    return {**document, "spec": thinned(document["spec"])}


def _walk(value: Json, part: dict[str, Json], path: Path) -> Iterator[tuple[Path, Json, dict[str, Json]]]:
    if path:
        yield path, value, part
    if isinstance(value, dict):
        for name, item in value.items():
            below = part.get("properties", {}).get(name) or part.get("additionalProperties")
            if isinstance(below, dict):
                yield from _walk(item, below, (*path, name))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk(item, part["items"], (*path, index))


def _replaced(
    document: dict[str, Json], path: Path, what: str, value: Json, named: Path | None = None
) -> Broken:
    changed = copy.deepcopy(document)
    place = changed["spec"]
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return Broken(what, path if named is None else named, changed)


def _name(path: Path) -> str:
    return ".".join(map(str, path))
