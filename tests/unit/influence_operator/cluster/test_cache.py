"""What the watches have told, kept by job."""

from typing import Any

from influence_job.document import FILE
from influence_job.spec import InfluenceJobSpec
from influence_operator.cluster.cache import Cache, JobKey
from influence_operator.cluster.kinds import CONFIG_MAP, INFLUENCE_JOB, POD
from influence_operator.decisions.snapshot import Children
from influence_operator.manifests import names
from influence_operator.manifests.attempt import attempt_manifests
from influence_operator.manifests.config_map import begun_with, copied_source
from influence_operator.settings import Defaults, Settings

KEY = JobKey("ns", "digits", "u-1")


def job(version: int = 1, **spec: Any) -> dict[str, Any]:
    metadata = {"namespace": "ns", "name": "digits", "uid": "u-1", "resourceVersion": str(version)}
    return {"metadata": metadata, "spec": spec}


def child(name: str, version: int = 1, **rest: Any) -> dict[str, Any]:
    metadata = {
        "namespace": "ns",
        "name": name,
        "uid": f"uid of {name}",
        "resourceVersion": str(version),
        "labels": names.labels("digits", "u-1", 1),
        "managedFields": [{"manager": "kubelet"}],
    }
    return {"metadata": metadata, **rest}


def test_children_are_found_by_their_job_and_in_order_of_name():
    cache = Cache()
    assert cache.put(INFLUENCE_JOB, job()) == KEY
    for name in ("c", "a", "b"):
        assert cache.put(POD, child(name)) == KEY

    assert [pod["metadata"]["name"] for pod in cache.children(KEY).pods] == ["a", "b", "c"]
    assert cache.child(KEY, POD, "b")["metadata"]["uid"] == "uid of b"
    assert cache.children(JobKey("elsewhere", "digits", "u-1")) == Children()


def test_an_older_version_never_replaces_a_newer_one():
    cache = Cache()
    cache.put(INFLUENCE_JOB, job(version=12, suspend=True))
    cache.put(INFLUENCE_JOB, job(version=9))

    assert cache.job(KEY)["spec"] == {"suspend": True}


def test_what_a_list_answers_is_taken_as_it_is_and_watched_on_from_there():
    """An API server whose storage was restored from a snapshot counts on from there."""
    cache = Cache()
    cache.put(INFLUENCE_JOB, job(version=900))
    cache.put(POD, child("a", version=901))
    cache.put(INFLUENCE_JOB, job(version=400, suspend=True), listed=True)
    cache.put(POD, child("a", version=401, status={"phase": "Pending"}), listed=True)

    assert cache.job(KEY)["spec"] == {"suspend": True}
    assert cache.child(KEY, POD, "a")["status"] == {"phase": "Pending"}
    cache.put(INFLUENCE_JOB, job(version=402, suspend=False))
    assert cache.job(KEY)["spec"] == {"suspend": False}


def test_a_list_that_was_made_before_a_write_is_followed_by_the_watch():
    cache = Cache()
    cache.put(INFLUENCE_JOB, job(version=8, suspend=True))
    cache.put(INFLUENCE_JOB, job(version=7), listed=True)
    cache.put(INFLUENCE_JOB, job(version=8, suspend=True))

    assert cache.job(KEY)["spec"] == {"suspend": True}


def test_a_list_does_not_bring_back_what_is_gone():
    cache = Cache()
    cache.put(POD, child("a"))
    cache.forget("uid of a")
    cache.put(POD, child("a"), listed=True)

    assert cache.children(KEY) == Children()


def test_a_late_answer_to_a_write_does_not_bring_back_what_is_gone():
    cache = Cache()
    cache.put(POD, child("a"))
    cache.remove(POD, child("a", version=2))
    cache.put(POD, child("a", version=3))

    assert cache.children(KEY) == Children()
    assert cache.job_keys() == set()


def test_children_outlive_their_job_until_each_is_gone():
    cache = Cache()
    cache.put(INFLUENCE_JOB, job())
    cache.put(POD, child("a"))
    cache.remove(INFLUENCE_JOB, job())

    assert cache.job(KEY) is None
    assert cache.job_keys() == {KEY}
    cache.forget("uid of a")
    assert cache.job_keys() == set()


def test_a_child_that_names_another_job_than_its_uid_does_is_nobodys():
    cache = Cache()
    cache.put(INFLUENCE_JOB, job())
    stranger = child("a")
    stranger["metadata"]["labels"][names.JOB] = "another"
    key = cache.put(POD, stranger)

    assert key == JobKey("ns", "another", "u-1")
    assert cache.job(key) is None
    assert cache.children(KEY) == Children()


def test_a_child_whose_labels_somebody_changed_is_the_other_jobs_alone():
    cache = Cache()
    cache.put(POD, child("a"))
    moved = child("a", version=2)
    moved["metadata"]["labels"] = names.labels("another", "u-2", 1)
    key = cache.put(POD, moved)

    assert key == JobKey("ns", "another", "u-2")
    assert cache.job_keys() == {key}
    cache.remove(POD, moved)
    assert cache.job_keys() == set()


def test_what_nothing_decides_by_is_not_kept():
    cache = Cache()
    made = {
        "data": {FILE: "{}", "spec.json": "{}", "task.digits.py": "x" * 100_000},
        "binaryData": {"task.weights": "AA=="},
    }
    cache.put(CONFIG_MAP, child("a", **made))

    (kept,) = cache.children(KEY).config_maps
    assert kept["data"] == {FILE: "{}", "spec.json": "{}", "task.digits.py": ""}
    assert kept["binaryData"] == {"task.weights": ""}
    assert "managedFields" not in kept["metadata"]


def test_the_cluster_of_an_attempt_is_the_same_from_a_kept_config_map_as_from_the_whole():
    spec = {
        "task": {"entrypoint": "digits:task", "source": {"configMap": {"name": "code"}}},
        "method": {"name": "Ekfac", "regularization": 0.01},
        "output": {"url": "gs://bucket/digits.zarr"},
    }
    influence_job = job(**spec) | {"apiVersion": "influence-operator.dev/v1alpha1", "kind": "InfluenceJob"}
    parsed, settings = InfluenceJobSpec.model_validate(spec), Settings(Defaults("worker:1"))
    source = {"data": {"digits.py": "x" * 100_000}, "binaryData": {"weights": "AA=="}}
    whole = attempt_manifests(influence_job, parsed, 1, settings, source)
    metadata = {"uid": "c", "namespace": "ns", "resourceVersion": "1"}
    cache = Cache()
    cache.put(CONFIG_MAP, {**whole.config_map, "metadata": {**whole.config_map["metadata"], **metadata}})

    (kept,) = cache.children(KEY).config_maps
    again = attempt_manifests(influence_job, begun_with(kept, parsed), 1, settings, copied_source(kept))

    assert again.dask_cluster == whole.dask_cluster


def test_an_object_without_our_label_concerns_no_job():
    cache = Cache()
    pod = child("a")
    pod["metadata"]["labels"] = {"app": "theirs"}

    assert cache.put(POD, pod) is None
    assert cache.remove(POD, pod) is None
    assert cache.job_keys() == set()
