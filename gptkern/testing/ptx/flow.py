"""The order in which lanes that have parted go on, so that they meet again where hardware lets them.

A compiler may place the code where two ways meet before one of them. Lanes of a warp therefore go on not by
place but by a weak topological order (Bourdoncle 1993): a block comes after those that lead to it, and all of
a loop before what comes after the loop. The lanes that are first in it go on; the others wait for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Ways = dict[int, list[int]]  # where each block leads to, by the place of its first step


def blocks(count: int, ways: Ways) -> tuple[list[int], Ways]:
    """(where blocks begin, where each leads to) of ``count`` steps."""
    targets = {to for found in ways.values() for to in found}
    begins = sorted({0} | {at + 1 for at in ways if at + 1 < count} | targets)
    leads: Ways = {}
    for begin, end in zip(begins, [*begins[1:], count], strict=True):
        leads[begin] = ways.get(end - 1, [end] if end < count else [])
    return begins, leads


def _components(nodes: Sequence[int], leads: Ways) -> Iterator[list[int]]:
    """Strongly connected components, those that lead to others first; each begins with its entry (Tarjan)."""
    inside = set(nodes)
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    open_: list[int] = []
    found: list[list[int]] = []
    for root in nodes:
        if root in number:
            continue
        number[root] = low[root] = len(number)
        open_.append(root)
        path = [(root, iter(leads[root]))]
        while path:
            node, rest = path[-1]
            after = next((to for to in rest if to in inside), None)
            if after is None:
                path.pop()
                if path:
                    low[path[-1][0]] = min(low[path[-1][0]], low[node])
                if low[node] == number[node]:
                    at = open_.index(node)
                    found.append(open_[at:])
                    del open_[at:]
            elif after not in number:
                number[after] = low[after] = len(number)
                open_.append(after)
                path.append((after, iter(leads[after])))
            elif after in open_:
                low[node] = min(low[node], number[after])
    yield from reversed(found)


def _ordered(nodes: Sequence[int], leads: Ways) -> Iterator[int]:
    for component in _components(nodes, leads):
        yield component[0]
        if len(component) > 1:
            yield from _ordered(component[1:], leads)


class Order:
    """The order of a program's steps.

    Args:
        count: The number of steps.
        ways: The steps at which lanes may part or end, and where they go on.

    Attributes:
        rank: By step: lanes of the least rank go on.
        end: By step: where its block ends.
    """

    def __init__(self, count: int, ways: Ways) -> None:
        begins, leads = blocks(count, ways)
        ends = dict(zip(begins, [*begins[1:], count], strict=True))
        self.rank, self.end = np.zeros(count + 1, np.int64), np.full(count + 1, count, np.int64)
        so_far = 0
        for begin in _ordered(begins, leads):
            steps = slice(begin, ends[begin])
            self.rank[steps] = so_far + np.arange(ends[begin] - begin)
            self.end[steps] = ends[begin]
            so_far += ends[begin] - begin
