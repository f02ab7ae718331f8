"""What holds for every snapshot, also for those that nobody would think of.

A job's pods run users' code, its status and its children can be edited by users: whatever stands there,
a decision is made, its status can be stored, and deciding again changes nothing more.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from influence_job.progress import Progress
from influence_job.status import InfluenceJobStatus
from influence_operator.decisions.actions import Decision
from influence_operator.decisions.decide import decide, decide_orphans
from influence_operator.decisions.snapshot import Children, Conflict, DriverReport, Snapshot
from operator_objects import (
    SETTINGS,
    UID,
    World,
    base,
    child,
    computing,
    dask_parts,
    driver_ends,
    influence_job,
    pod,
    pods_end,
    problem,
    progress,
    stamp,
    started,
    terminated,
    unschedulable,
    waiting,
    words,
    worker_name,
)

MOST_BYTES = 64 * 1024
GENEROUS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "",
            "\x00",
            "\ud800",
            "x" * 70_000,
            "0001-01-01T00:00:00+14:00",
            "9999-12-31T23:59:59-12:00",
            "2026-03-01T12:00:00",
            "True",
            "Failed",
            "75",
            "٣",
            "²",
            '{"jobUid": 1}',
            "[" * 5000,
        ]
    ),
)
NUMBERS = st.one_of(st.integers(), st.sampled_from([2**63, -1, 10**400, 64, 75]), st.floats())
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=5,
)


def snapshots() -> st.SearchStrategy[Snapshot]:
    return st.builds(_walked, st.lists(st.sampled_from(EVENTS), max_size=12), st.data())


def _walked(events: list[Callable[[World, Any], None]], data: Any) -> Snapshot:
    world = data.draw(st.sampled_from([World, started, computing]))()
    for event in events:
        event(world, data.draw)
        world.step(data.draw(st.sampled_from([0, 1, 5, 10, 61, 4000])))
    event = data.draw(st.sampled_from(EVENTS))
    event(world, data.draw)
    return world.snapshot()


def _number(world: World) -> int:
    return (world.status.get("attempts") or {}).get("current", 1)


def _end(world: World, draw: Any) -> None:
    if world.find("Job"):
        code = draw(st.sampled_from([0, 1, 64, 75, 137]))
        said = words(
            attempt=_number(world),
            recorded=draw(st.integers(0, 3)),
            lastError=problem(draw(st.sampled_from(["Internal", "no word"])), "said\nlast line"),
        )
        name = world.find("Job")[-1]["metadata"]["name"]
        world.add(pod(int(name.rpartition("-")[2]), "driver", **terminated("driver", code, said, world.now)))
        if draw(st.booleans()):
            kind = "Complete" if code == 0 else "Failed"
            world.find("Job")[-1]["status"] = {"conditions": [{"type": kind, "status": "True"}]}


def _run(world: World, draw: Any) -> None:
    number = _number(world)
    world.add(pod(number, "driver"))
    world.problem = ""
    done = draw(st.integers(0, 100))
    world.report = progress(
        number,
        workersNeeded=draw(st.booleans()),
        stage=draw(st.sampled_from(["Preflight", "Loading", "Scores", "Verifying"])),
        regions={"done": done, "total": 100},
        recorded=done,
    )


def _dask(world: World, draw: Any) -> None:
    number, workers = _number(world), draw(st.integers(0, 4))
    world.add(*dask_parts(number, workers), pod(number, "scheduler"))
    world.add(*(pod(number, "worker", worker_name(number, index)) for index in range(workers)))
    for cluster in world.find("DaskCluster"):
        cluster["status"] = {"phase": draw(st.sampled_from(["Created", "Pending", "Running"]))}


def _hang(world: World, draw: Any) -> None:
    for thing in world.objects:
        if thing["kind"] in ("Pod", "DaskCluster", "Job") and draw(st.booleans()):
            thing["metadata"] |= {
                "deletionTimestamp": stamp(world.now),
                "finalizers": ["kopf.zalando.org/KopfFinalizerMarker"],
            }


def _stuck(world: World, draw: Any) -> None:
    role = draw(st.sampled_from(["driver", "scheduler", "worker"]))
    status = draw(st.sampled_from([waiting(role, "ErrImagePull", "no"), unschedulable("no", world.now)]))
    world.add(pod(_number(world), role, **status))


def _unreadable(world: World, draw: Any) -> None:
    if "attempts" in world.status:
        world.unreadable(draw(st.sampled_from(["no whole answer within 2 s", "stage: wrong"])))


def _refused_by_the_node(world: World, draw: Any) -> None:
    if world.find("Job"):
        why = {"reason": "OutOfcpu", "message": "Pod was rejected"}
        world.add(pod(_number(world), "driver", phase="Failed", conditions=[], containerStatuses=[], **why))
        world.report, world.problem = None, ""
        if draw(st.booleans()):
            failed = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded"}
            world.find("Job")[-1]["status"] = {"conditions": [failed]}


def _moved(world: World, draw: Any) -> None:
    for policy in world.find("NetworkPolicy"):
        policy["spec"] = {"podSelector": {}}


def _obstacles(world: World, draw: Any) -> None:
    world.more = {
        "conflicts": draw(st.sampled_from([(), (Conflict("Job", base(_number(world))),)])),
        "refusals": draw(st.sampled_from([(), ("Job x: exceeded quota",)])),
        "unretired": draw(st.sampled_from(["", "the scheduler chose 0 of 1 workers to retire"])),
        "dask_operator": draw(st.booleans()),
    }


def _change(world: World, draw: Any) -> None:
    change = draw(
        st.sampled_from(
            [
                {"suspend": True},
                {"suspend": False},
                {"workers": {"replicas": 1}},
                {"workers": {"replicas": 5}},
                {"image": "other:1"},
                {"backoffLimit": 0},
                {"activeDeadlineSeconds": 30},
                {"startupDeadlineSeconds": 30},
                {"progressDeadlineSeconds": 30},
                {"cleanupPolicy": "All"},
                {"ttlSecondsAfterFinished": 60},
                {"nonsense": True},
            ]
        )
    )
    world.change(**change)


def _gone(world: World, draw: Any) -> None:
    kinds = ["Pod", "Job", "DaskCluster", "Deployment", "Service", "DaskWorkerGroup", "ConfigMap"]
    world.remove(draw(st.sampled_from(kinds)))


EVENTS: list[Callable[[World, Any], None]] = [
    *(_end, _run, _run, _dask, _dask, _hang, _stuck, _obstacles, _change, _gone),
    *(_unreadable, _refused_by_the_node, _moved),
    lambda world, _: pods_end(world),
    lambda world, _: None,
]


def decided_again(snapshot: Snapshot, decision: Decision) -> Decision:
    job = {**snapshot.job, "status": json.loads(json.dumps(decision.status))}
    return decide(replace(snapshot, job=job), SETTINGS)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON document."""
    if path:
        yield path
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield from places(inner, (*path, step))


def damaged(snapshot: Snapshot, draw: Any) -> Snapshot:
    """The snapshot with hostile values in a few of its places."""
    raw = {
        "job": copy.deepcopy(snapshot.job),
        **{name: list(copy.deepcopy(things)) for name, things in vars(snapshot.children).items()},
    }
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(sorted(places(raw), key=str)))
        _put(raw, path, draw(VALUES))
    if not isinstance(raw.get("job"), dict):
        raw["job"] = {}
    # These the API server gives itself; without them there is nothing to decide about.
    given = {name: snapshot.job["metadata"][name] for name in ("name", "namespace", "uid", "generation")}
    metadata = raw["job"].get("metadata")
    raw["job"]["metadata"] = (metadata if isinstance(metadata, dict) else {}) | given
    raw["job"] |= {"apiVersion": snapshot.job["apiVersion"], "kind": snapshot.job["kind"]}
    lists = {
        name: tuple(thing for thing in things if isinstance(thing, dict))
        for name, things in raw.items()
        if name != "job" and isinstance(things, list)
    }
    return replace(snapshot, job=raw["job"], children=Children(**lists))


def _put(raw: Any, path: tuple[Any, ...], value: Any) -> None:
    for step in path[:-1]:
        raw = raw[step]
    raw[path[-1]] = value


def assert_storable(status: Any) -> None:
    InfluenceJobStatus.model_validate(status)
    text = json.dumps(status, allow_nan=False)
    assert len(text.encode("utf-8")) < MOST_BYTES
    for condition in status["conditions"]:
        assert len(condition["message"]) <= 1024
        assert condition["reason"].isalnum()


@GENEROUS
@given(snapshots())
def test_deciding_again_with_the_new_status_changes_nothing_more(snapshot: Snapshot):
    first = decide(snapshot, SETTINGS)
    second = decided_again(snapshot, first)
    assert second.status == first.status
    assert not second.urgent
    assert not second.status_first
    assert second.events == ()
    for action in second.actions:
        assert action in first.actions, "what the first did not want, the second does not want either"


@GENEROUS
@given(snapshots())
def test_every_status_can_be_stored(snapshot: Snapshot):
    decision = decide(snapshot, SETTINGS)
    assert_storable(decision.status)
    assert decision.again_after is None or decision.again_after >= 1.0


@GENEROUS
@given(snapshots(), st.data())
def test_nothing_in_job_or_children_makes_a_decision_impossible(snapshot: Snapshot, data: Any):
    hostile = damaged(snapshot, data.draw)
    decision = decide(hostile, SETTINGS)
    if decision.status is not hostile.job.get("status") and decision.status != {}:
        assert_storable(decision.status)
    decide_orphans(hostile.children, hostile.now)


@GENEROUS
@given(st.data())
def test_no_progress_document_makes_a_status_that_cannot_be_stored(data: Any):
    document = {
        "contractVersion": 1,
        "jobUid": UID,
        "attempt": 1,
        "workersNeeded": True,
        "stage": "Scores",
        "stages": [{"name": "Scores", "start": "2026-03-01T12:00:00Z"}],
        "regions": {"done": 1, "total": 2},
        "recorded": 1,
        "rate": 1.0,
        "etaSeconds": 3.0,
        "warnings": ["careful"],
        "lastError": {"reason": "Internal", "message": "m"},
        "result": {"url": "u", "shape": [1], "dtype": "float32", "bytes": 3, "digest": "d"},
    }
    for _ in range(data.draw(st.integers(1, 3))):
        _put(document, data.draw(st.sampled_from(sorted(places(document), key=str))), data.draw(VALUES))
    try:
        said = Progress.model_validate(document)
    except ValueError:
        return
    world = computing()
    snapshot = replace(world.snapshot(), driver=DriverReport(1, said))
    status = decide(replace(snapshot, now=snapshot.now + timedelta(seconds=60)), SETTINGS).status
    assert_storable(status)
    try:
        message = said.model_dump_json(by_alias=True)
    except ValueError:
        return
    driver_ends(world, 0, message)
    assert_storable(world.decide().status)


@GENEROUS
@given(message=TEXTS, code=NUMBERS, words_=TEXTS)
def test_no_termination_message_or_refusal_does_any_harm(message: str, code: Any, words_: str):
    world = computing()
    driver_ends(world, code, message)
    world.more = {"refusals": (words_,), "warnings": ({"message": words_},)}
    assert_storable(world.decide().status)
    stuck = World()
    stuck.step()
    stuck.add(pod(1, "driver", **waiting("driver", "ErrImagePull", words_)))
    stuck.more = {"missing": (words_,)}
    assert_storable(stuck.decide().status)


def test_a_decision_takes_no_longer_per_worker_when_there_are_many():
    assert _cpu_seconds(workers=1000) < 30 * _cpu_seconds(workers=100)


def _cpu_seconds(workers: int) -> float:
    """Of one decision about a job that computes with so many workers; the least of several."""
    world = computing(workers=2)
    world.job["spec"]["workers"]["replicas"] = workers
    world.add(*dask_parts(1, workers))
    (cluster,) = world.find("DaskCluster")
    cluster["spec"]["worker"]["replicas"] = workers
    pods = [pod(1, "worker", worker_name(1, index)) for index in range(workers)]
    world.objects = [o for o in world.objects if o["kind"] != "Pod"] + pods
    world.add(pod(1, "driver"), pod(1, "scheduler"))
    snapshot = world.snapshot()
    times = []
    for _ in range(5):
        began = time.process_time()
        decide(snapshot, SETTINGS)
        times.append(time.process_time() - began)
    return min(times)


@pytest.mark.parametrize("time_", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00"])
def test_times_beyond_the_calendars_ends_are_no_times(time_: str):
    world = computing()
    for thing in world.objects:
        thing["metadata"] |= {"creationTimestamp": time_, "deletionTimestamp": time_}
    stages = [{"name": "Scores", "start": time_, "end": time_}]
    world.report = progress(1, stages=stages, workersNeeded=True)
    world.job["status"] |= {"waitingSince": time_, "progressed": time_, "startTime": time_}
    world.job["status"]["attempts"] |= {"started": time_, "nextStart": time_}
    world.now += timedelta(seconds=60)
    assert_storable(world.decide().status)
    driver_ends(world, 1)
    state = world.find("Pod", "driver")[0]["status"]["containerStatuses"][0]["state"]
    state["terminated"]["finishedAt"] = time_
    assert_storable(world.decide().status)


@pytest.mark.parametrize("label", ["1000000", "-1", "1e3", "٣", "²", "", "99999999999999999999"])
def test_an_attempt_label_that_no_attempt_can_have_is_no_attempt(label: str):
    world = World(influence_job())
    thing = child("ConfigMap", "x", 1, UID)
    thing["metadata"]["labels"]["influence-operator.dev/attempt"] = label
    world.add(thing)
    world.step()
    assert world.attempt == 1
