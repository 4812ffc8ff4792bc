"""Listening in: a tap sees every named tensor of a run and hands it on, or another in its place.

What a tap returns is what the run goes on with. That makes one mechanism of three: recording, what
rounding would do at every stage, and trying a layer on somebody else's numbers.
"""

from __future__ import annotations

from collections.abc import Callable

from npvlm.model.weights import Array

Tap = Callable[[str, Array], Array]


def closed(name: str, value: Array) -> Array:
    """A tap that lets everything through unseen."""
    return value


def within(tap: Tap, module: str) -> Tap:
    """The same tap for a module's inside: names are prefixed with the module's."""
    if tap is closed:
        return tap
    return lambda name, value: tap(f"{module}.{name}", value)
