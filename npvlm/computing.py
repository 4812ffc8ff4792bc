"""Whose turn it is to compute: one thread at a time, and no process that lost its threads."""

from __future__ import annotations

import os
import sys
import threading
from types import ModuleType

from npvlm.errors import NpvlmError


class Turns:
    """Several Python threads may not start kernels at once, and a child that was forked after some
    ran may start none: the threads of the kernels are not in it.

    with turns.take(ops):
        ...
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lost: ModuleType | None = None  # the namespace that cannot be computed with
        if hasattr(os, "register_at_fork"):
            # Nothing computes meanwhile: OpenBLAS would wait for ever, in parent or child.
            os.register_at_fork(
                before=self._lock.acquire,
                after_in_parent=self._lock.release,
                after_in_child=self._after_fork,
            )

    def take(self, ops: ModuleType) -> threading.Lock:
        """The lock to hold while computing with a namespace.

        Raises
        ------
        NpvlmError
            For kernels in a forked child of a process that had used them.
        """
        if ops is self._lost:
            raise NpvlmError(
                "this process was forked from one that had computed with kernels, whose threads "
                "it does not have; start it by spawn (multiprocessing.get_context('spawn')), or "
                "compute nothing before the fork."
            )
        return self._lock

    def _after_fork(self) -> None:
        self._lock.release()
        compiling = sys.modules.get("npvlm.kernels.compiling")
        if compiling is not None and compiling.threads_end_at_fork():
            self._lost = sys.modules["npvlm.kernels"]


TURNS = Turns()
