"""What the watches have told, kept by job."""

from typing import Any

from influence_job.document import FILE
from influence_operator.cluster.cache import Cache, JobKey
from influence_operator.cluster.kinds import CONFIG_MAP, INFLUENCE_JOB, POD
from influence_operator.decisions.snapshot import Children
from influence_operator.manifests import names

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
    cache.forget(KEY, "uid of a")
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


def test_what_nothing_decides_by_is_not_kept():
    cache = Cache()
    cache.put(CONFIG_MAP, child("a", data={FILE: "{}", "task.py": "x" * 100_000}, binaryData={"b": "AA=="}))

    (kept,) = cache.children(KEY).config_maps
    assert kept["data"] == {FILE: "{}"}
    assert "binaryData" not in kept
    assert "managedFields" not in kept["metadata"]


def test_an_object_without_our_label_concerns_no_job():
    cache = Cache()
    pod = child("a")
    pod["metadata"]["labels"] = {"app": "theirs"}

    assert cache.put(POD, pod) is None
    assert cache.remove(POD, pod) is None
    assert cache.job_keys() == set()
