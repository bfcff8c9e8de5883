"""Dependent launches: a kernel that begins while the one before it in the stream still runs.

``griddepcontrol.launch_dependents`` lets the next launch begin once all blocks have executed it or ended, and
``griddepcontrol.wait`` holds a thread until the launches before have ended and their writes are visible.
Until its wait a thread may read nothing that they write, and write nothing that they read or write. Launches
are executed one after another here, and the bytes that the earlier ones used count as in use until the wait.

Source: PTX ISA 8.8, "griddepcontrol"; CUDA programming guide, "Programmatic Dependent Launch".
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from gptkern.testing.ptx.arithmetic import Array


@dataclass(frozen=True)
class Use:
    """The bytes of one tensor that a launch has read and written.

    Attributes:
        data: The bytes themselves: as long as they are here, no other tensor comes to lie at their address.
    """

    launch: str
    begin: int
    data: Array
    read: Array
    written: Array


@dataclass
class Stream:
    """Launches one after another.

    Attributes:
        running: What launches have used that need not have ended when the next one begins.
    """

    running: list[Use] = field(default_factory=list)

    def before(self, dependent: bool) -> list[Use]:
        """The uses that a launch may meet until its wait: none if it is an ordinary one."""
        return self.running if dependent else []

    def ended(self, uses: list[Use], early: bool) -> None:
        """Note a launch's uses. ``early``: no block had waited when it let the next launch begin."""
        self.running = [*uses, *(self.running if early else [])]


class Meetings:
    """The bytes of one allocation that launches before are still using."""

    def __init__(self, begin: int, size: int, before: list[Use]) -> None:
        self.reading, self.writing = np.zeros(size, bool), np.zeros(size, bool)
        self.names: list[str] = []
        for use in before:
            first, last = max(begin, use.begin), min(begin + size, use.begin + len(use.data))
            if first < last:
                here, there = slice(first - begin, last - begin), slice(first - use.begin, last - use.begin)
                self.reading[here] |= use.read[there]
                self.writing[here] |= use.written[there]
                self.names.append(use.launch)

    def early(self, index: Array, writes: bool) -> Array:
        """(lanes): True where an access of these (lanes, size) bytes before the wait meets another launch."""
        met = self.writing[index] | self.reading[index] if writes else self.writing[index]
        return np.asarray(np.any(met, axis=1))
