"""What a forward pass stores in its modules is taken out of them again.

A model may keep what it computed: its last hidden states, an auxiliary loss, a first state. Of a traced pass
these are tensors that nobody can use or pickle afterwards, of a recorded one they hold its whole graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

_OF_TORCH = frozenset(nn.Module().__dict__) - {"_buffers"}
"""What modules keep hooks, parameters and submodules in, which passes change for a while."""


class Attributes:
    """Of some modules, as they are now, with what stands in those that are a list or a dict."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        for module in modules:
            attributes = module.__dict__
            self._dicts.append((attributes, attributes.copy()))
            for name, value in attributes.items():
                if type(value) is dict and name not in _OF_TORCH:
                    self._dicts.append((value, value.copy()))
                elif type(value) is list:
                    self._lists.append((value, value.copy()))

    def put_back(self) -> None:
        """Whatever was set, changed, added or removed since."""
        for now, then in self._dicts:
            if not _are_same(now.values(), then.values()):
                for added in now.keys() - then.keys():
                    del now[added]
                now.update(then)
        for values, before in self._lists:
            if not _are_same(values, before):
                values[:] = before


def _are_same(some: Any, others: Any) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


@contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """What is stored in these modules inside is gone outside."""
    attributes = Attributes(modules)
    try:
        yield
    finally:
        attributes.put_back()


_call: ContextVar[dict[int, tuple[nn.Module, Attributes]] | None] = ContextVar("_call", default=None)


@contextmanager
def one_call() -> Iterator[None]:
    """At its end every model is as it was before its first pass inside: losses may read what a pass stored.

    Of calls inside one another the outermost counts.
    """
    if _call.get() is not None:
        yield
        return
    token = _call.set({})
    try:
        yield
    finally:
        for _, attributes in (_call.get() or {}).values():
            attributes.put_back()
        _call.reset(token)


def keep_for_this_call(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Says that a pass of `model` begins, which may store something in these modules."""
    known = _call.get()
    if known is not None and id(model) not in known:
        known[id(model)] = (model, Attributes(modules))
