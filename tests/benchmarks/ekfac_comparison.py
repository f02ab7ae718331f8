"""EK-FAC on one workload: ours, the peers', a plain implementation and the physical bound.

Every side fits and scores in one go; correlations with the exact expectation stand beside the times, so
that speed is compared at equal quality; with tokens, where the exact one takes a backward pass per token and
class, many draws stand for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import physical_bound
import plain_ekfac
import torch
from findings import Finding
from peer_environment import KRONFLUENCE, PYDVL, Peer
from programs import (
    CORES,
    Array,
    Effort,
    Rounds,
    Side,
    correlation,
    median_seconds,
    relative_error,
    rounds_of_peer,
)
from workload import DIGITS, IMAGES, SENTENCES, Loaded, Workload

PROGRAMS = {PYDVL: "pydvl_ekfac.py", KRONFLUENCE: "kronfluence_ekfac.py"}


@dataclass(frozen=True)
class Comparison:
    """A workload, and what its figures are held to."""

    label: str
    """What its figures begin with."""
    workload: Workload
    faster: Mapping[Peer, float]
    """Peers, and how many times faster than each ours has to be."""
    most_bound: float | None = None
    """How many times slower than the physical bound ours may be."""
    reference_draws: int | None = None
    """Draws per token of the reference; None: it sums over all outputs, and ours must agree."""
    most_repeats: int = 5
    """In one process, for what takes long."""
    plain_chunk: int | None = None
    """Examples that the plain implementation differentiates at once; None: all."""

    def run(self, folder: Path, effort: Effort) -> list[Finding]:
        """Measures everything; the sides alternate."""
        self.workload.prepare(folder)
        ours = Side("our_ekfac.py", self.workload, folder)
        peers = {peer: Side(PROGRAMS[peer], self.workload, folder, peer.ensured()) for peer in self.faster}
        rounds: Rounds = []
        of_peers: dict[Peer, Rounds] = {peer: [] for peer in peers}
        repeats = min(effort.repeats, self.most_repeats)
        for _ in range(effort.rounds):
            rounds.append(ours.seconds(repeats))
            for peer, side in peers.items():
                of_peers[peer] += rounds_of_peer(peer, side, repeats)
        seconds, first = _medians(rounds)
        loaded = self.workload.load(folder)
        plain, expected = self._plain(loaded, min(effort.plain_repeats, self.most_repeats))
        bound = self._bound(loaded)
        findings = [
            self._finding("ours", seconds, "s"),
            self._finding("ours, first use in a process", first, "s"),
        ]
        for peer, found in of_peers.items():
            findings += self._times(peer, found, seconds, first)
        findings += [
            self._finding("plain implementation in memory, 2 threads", plain, "s"),
            self._finding("physical bound, 2 cores", bound, "s"),
            self._finding("ours / plain", seconds / plain, "×"),
            self._held("ours / bound", seconds / bound, "×", most=self.most_bound),
        ]
        theirs = {
            peer: correlation(side.influences(), expected) if of_peers[peer] else None
            for peer, side in peers.items()
        }
        return findings + self._quality(ours, expected, theirs)

    def _times(self, peer: Peer, rounds: Rounds, seconds: float, first: float) -> list[Finding]:
        """A peer's times, None where it failed: then no ratio is told, and its target is not reached."""
        theirs, their_first = _medians(rounds) if rounds else (None, None)
        ratio = theirs / seconds if theirs else None
        at_first = their_first / first if their_first else None
        return [
            self._finding(peer.name, theirs, "s"),
            self._finding(f"{peer.name}, first use in a process", their_first, "s"),
            self._held(f"{peer.name} / ours", ratio, "×", least=self.faster[peer]),
            self._finding(f"{peer.name} / ours, first use", at_first, "×"),
        ]

    def _plain(self, loaded: Loaded, repeats: int) -> tuple[float, Array]:
        """Seconds of the plain implementation with one draw, and what it finds as the reference."""

        def influences(draws: int | None) -> torch.Tensor:
            return plain_ekfac.plain_ekfac(*loaded, self.workload.regularization, draws, self.plain_chunk)

        return median_seconds(lambda: influences(1), repeats), influences(self.reference_draws).numpy()

    def _bound(self, loaded: Loaded) -> float:
        workload = self.workload
        layers = physical_bound.layers(loaded.model, loaded.train[0][:1])
        sizes = workload.train, workload.test, workload.chunk
        with physical_bound.measured_rate(CORES) as rate:
            return physical_bound.physical_bound(layers, *sizes, rate, physical_bound.measured_bandwidth())

    def _quality(self, ours: Side, expected: Array, theirs: Mapping[Peer, float | None]) -> list[Finding]:
        """What our numbers are held to: a peer's correlation with the reference, the mean over repeats."""
        correlated = f"with {self._reference}"
        findings = [
            self._finding(f"correlation of {peer.name} {correlated}", value, "")
            for peer, value in theirs.items()
        ]
        best = max(value or 0.0 for value in theirs.values())
        sampled = correlation(ours.influences(), expected)
        findings.append(self._held(f"correlation of ours {correlated}", sampled, "", least=best))
        if self.reference_draws is None:
            ours.seconds(1, "--exact")
            error = relative_error(ours.influences("--exact")[-1], expected)
            findings.append(
                self._finding("error of ours, exact expectation", error, "", "≤ 1e-3", error <= 1e-3)
            )
        return findings

    @property
    def _reference(self) -> str:
        return "exact" if self.reference_draws is None else f"{self.reference_draws} draws"

    def _held(
        self,
        name: str,
        value: float | None,
        unit: str,
        least: float | None = None,
        most: float | None = None,
    ) -> Finding:
        """A figure with the target that it has, if it has one; what failed reaches none."""
        if least is not None:
            return self._finding(name, value, unit, f"≥ {least:g}", value is not None and value >= least)
        if most is not None:
            return self._finding(name, value, unit, f"≤ {most:g}", value is not None and value <= most)
        return self._finding(name, value, unit)

    def _finding(
        self, name: str, value: float | None, unit: str, target: str | None = None, reached: bool = True
    ) -> Finding:
        return Finding(f"{self.label}: {name}", value, unit, target, reached)


COMPARISONS = {
    "ekfac": Comparison("EK-FAC", DIGITS, faster={PYDVL: 25, KRONFLUENCE: 8}),
    "ekfac_conv": Comparison(
        "EK-FAC, conv net", IMAGES, faster={KRONFLUENCE: 3}, most_bound=2, plain_chunk=IMAGES.chunk
    ),
    "ekfac_transformer": Comparison(
        "EK-FAC, transformer",
        SENTENCES,
        faster={KRONFLUENCE: 1.4},
        most_bound=2,
        reference_draws=8,
        most_repeats=2,
        plain_chunk=SENTENCES.chunk,
    ),
}
"""By the names that the command line knows them by."""


def _medians(rounds: Rounds) -> tuple[float, float]:
    """Of all repeats, and of the first in each process."""
    return statistics.median(chain.from_iterable(rounds)), statistics.median(repeats[0] for repeats in rounds)
