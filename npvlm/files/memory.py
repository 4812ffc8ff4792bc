"""What memory this process can still have, by the machine and by the limits set for it."""

from __future__ import annotations

from pathlib import Path

from npvlm.errors import NpvlmError

_STATUS, _MACHINE = Path("/proc/self/status"), Path("/proc/meminfo")
_GROUPS, _GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Of each version of control groups: the files of the limit and of what is used, and what of that
# the system takes back when it is short: pages of files.
_GROUP_FILES = (
    ("", "memory.max", "memory.current", ("inactive_file", "active_file")),
    (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


def available_memory() -> int | None:
    """Bytes that this process can still take without swapping; None where nothing says it."""
    return _least(proc_bytes(_MACHINE).get("MemAvailable"))


def check_memory(needed: int, what: str, advice: str) -> None:
    """Refuse what would not fit, swapping included, before it ends in an out-of-memory kill.

    Raises
    ------
    NpvlmError
        Where `needed` bytes are more than this process can still take.
    """
    machine = proc_bytes(_MACHINE)
    free = machine.get("MemAvailable")
    room = _least(None if free is None else free + machine.get("SwapFree", 0))
    if room is not None and needed > room:
        raise NpvlmError(
            f"{what} takes about {said_bytes(needed)} of memory, expected at most "
            f"{said_bytes(room)}, which is what is left here; {advice}."
        )


def said_bytes(count: int) -> str:
    """A number of bytes as people say it."""
    if count >= 10**9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 10**6 else f"{count / 1e3:.0f} kB"


def proc_bytes(path: Path) -> dict[str, int]:
    """The lines `Name:   123 kB` of a file of /proc; none where there is no such file."""
    words = (line.replace(":", " ").split() for line in _lines(path))
    return {w[0]: int(w[1]) * 1024 for w in words if len(w) == 3 and w[2] == "kB"}


def _least(free: int | None) -> int | None:
    """The least of what is free and what each limit leaves; None where nothing is known."""
    known = [room for room in (free, *_process_limits(), *_group_limits()) if room is not None]
    return max(0, min(known)) if known else None


def _process_limits() -> list[int]:
    """What `ulimit -v` and `ulimit -d` leave."""
    held, left = proc_bytes(_STATUS), []
    if not held:
        return []
    import resource  # which only systems like Unix have

    for limit, counted in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY and counted in held:
            left.append(most - held[counted])
    return left


def _group_limits() -> list[int]:
    """What the control groups leave that the process is in, and those around them."""
    left = []
    for line in _lines(_GROUP):
        _, kinds, inside = line.split(":", 2)
        for kind, limit, used, reclaimed in _GROUP_FILES:
            if kind not in kinds.split(","):
                continue
            root = _GROUPS / kind
            place = root / inside.lstrip("/")
            while place.is_relative_to(root):
                # In a container its own group is the root, whatever it is called outside.
                most, held = _number(place / limit), _number(place / used)
                if most is not None and held is not None:
                    notes = (note.partition(" ") for note in _lines(place / "memory.stat"))
                    pages = sum(int(count) for name, _, count in notes if name in reclaimed)
                    left.append(most - held + pages)
                place = place.parent
    return left


def _number(path: Path) -> int | None:
    """The number that a file holds; "max" is none."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
