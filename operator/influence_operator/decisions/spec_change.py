"""What was changed in a spec since its attempt began, and what becomes of it.

An attempt's pods are made from the spec that it began with: a change waits for the next attempt. While the
driver has not started, the attempt ends for it. Such a driver has done nothing that could be lost, and what
it lacks may be what the change mends: an image that cannot be pulled, a node selector that no node fits, a
setting that the API server refuses.
"""

from __future__ import annotations

from influence_job.spec import InfluenceJobSpec
from influence_job.status import ConditionType
from influence_operator.decisions import observed
from influence_operator.decisions.course import Course
from influence_operator.decisions.snapshot import Object
from influence_operator.decisions.view import View
from influence_operator.manifests.config_map import begun_with
from influence_operator.manifests.names import Role

_OF_PODS = ("output", "driver", "scheduler", "workers", "pod_defaults")
"""Fields that may change and that pods are made from, beside the image."""

_OF_ENDED_JOBS = ("cleanup_policy", "ttl_seconds_after_finished")
"""Fields that say what becomes of a job that has ended."""


def changed_before_start(view: View, course: Course, default_image: str) -> bool:
    """Whether this generation is new and its pods are others than those of an attempt that did not start."""
    ready = view.condition(ConditionType.READY)
    if ready is None or ready.observed_generation in (None, view.generation):
        return False
    if not all(map(_waits, view.pods(course.number, Role.DRIVER))):
        return False
    return bool(waiting_changes(view, course, default_image))


def calls_for_an_attempt(view: View, course: Course, default_image: str) -> bool:
    """Whether a failed job has another spec than its latest attempt began with, beside what counts at once
    and starts nothing: replicas, and what becomes of a job that has ended. Without a copy it has.
    """
    begun = _begun_with(view, course)
    if begun is None:
        return True
    same = {field: getattr(begun, field) for field in _OF_ENDED_JOBS}
    return view.spec.model_copy(update={"image": view.spec.image or default_image, **same}) != begun


def waiting_changes(view: View, course: Course, default_image: str) -> tuple[str, ...]:
    """Fields, as documents spell them, that are others than those that the open attempt began with.

    None for an attempt that has no copy of its spec yet.
    """
    begun = _begun_with(view, course) if course.open else None
    if begun is None:
        return ()
    image = ("image",) if begun.image != (view.spec.image or default_image) else ()
    changed = (f for f in _OF_PODS if getattr(begun, f) != getattr(view.spec, f))
    return (*image, *(type(view.spec).model_fields[f].alias or f for f in changed))


def _begun_with(view: View, course: Course) -> InfluenceJobSpec | None:
    """The spec that the present attempt began with; None: there is no copy, or one that cannot be read."""
    copies = view.of(course.number).config_maps
    begun = begun_with(copies[0], view.spec) if copies else view.spec
    return None if begun is view.spec else begun


def _waits(pod: Object) -> bool:
    return observed.text(pod, "status", "phase") in ("", "Pending")
