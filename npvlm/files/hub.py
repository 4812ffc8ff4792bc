"""Models of the Hugging Face hub by name, found in the cache that its own tools share."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from npvlm.config import read_json
from npvlm.errors import NpvlmError
from npvlm.files.checkpoint import INDEX, SINGLE, is_plain
from npvlm.files.published import OWNER, PUBLISHED, Published

CONFIG = "config.json"
_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REVISION = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}"
_NAME = re.compile(rf"(?:(?P<owner>{_WORD})/)?(?P<name>{_WORD})(?:@(?P<revision>{_REVISION}))?")
_COMMIT = re.compile(_WORD)
_ENDPOINT = "https://huggingface.co"


@dataclass(frozen=True)
class Wanted:
    """A model as it was asked for: a repository, and a revision where one was named."""

    repo: str
    revision: str | None

    @property
    def published(self) -> Published | None:
        """What is known of it, if Google published it."""
        owner, _, name = self.repo.partition("/")
        return PUBLISHED.get(name) if owner == OWNER else None

    @property
    def name(self) -> str:
        """What it is called here: published ones have no owner in front."""
        return self.published.name if self.published else self.repo

    @property
    def revisions(self) -> tuple[str, ...]:
        """The revisions that it may be taken from, the best first."""
        if self.revision:
            return (self.revision,)
        if self.published and self.published.family == 1:
            return ("bfloat16", "main", "float16")
        return ("main", "bfloat16", "float16")

    @property
    def page(self) -> str:
        """The page where its licence is accepted, on the hub that is in use."""
        return f"{endpoint()}/{self.repo}"


def parse_name(text: str) -> Wanted | None:
    """Read NAME, OWNER/NAME or either with @REVISION; None where it can be no such name."""
    found = _NAME.fullmatch(text)
    if found is None or ".." in (found["revision"] or "").split("/"):
        return None
    if found["owner"] is None:
        if found["name"] not in PUBLISHED:
            return None
        return Wanted(f"{OWNER}/{found['name']}", found["revision"])
    return Wanted(f"{found['owner']}/{found['name']}", found["revision"])


def endpoint() -> str:
    """The hub in use, without a slash at its end."""
    return os.environ.get("HF_ENDPOINT", _ENDPOINT).rstrip("/")


def cache_folder() -> Path:
    """Where the hub's tools keep models, by the variables that they read."""
    above = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{above}/huggingface"
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(named or f"{home}/hub")).expanduser()


def storage_of(repo: str) -> Path:
    """The folder of a repository in the cache."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def snapshot_of(wanted: Wanted) -> Path | None:
    """The folder of a model that is in the cache as a whole; None where there is none."""
    return next((at for at in _snapshots(wanted) if not missing_files(at)), None)


def find_cached(wanted: Wanted) -> Path | None:
    """The folder of a model in the cache; None where nothing of it is there.

    Raises
    ------
    NpvlmError
        Where only a part of it is there.
    """
    if whole := snapshot_of(wanted):
        return whole
    for partial in _snapshots(wanted):
        raise NpvlmError(
            f"{wanted.name} is not whole in {partial}: {missing_files(partial)[0]} is missing; "
            f"run `npvlm fetch {_asked(wanted)}`, which goes on where it ended."
        )
    return None


def missing_files(snapshot: Path) -> list[str]:
    """The files that a snapshot lacks: settings, or weights. A link that leads nowhere is none."""
    needed = [CONFIG]
    if (snapshot / INDEX).exists() and not (snapshot / SINGLE).exists():
        shards = read_json(snapshot / INDEX).get("weight_map")
        if isinstance(shards, dict):  # anything else is told when it is opened
            names = {name for name in shards.values() if isinstance(name, str)}
            needed += sorted(filter(is_plain, names))
    else:
        needed.append(SINGLE)
    return [name for name in needed if not (snapshot / name).exists()]


def _snapshots(wanted: Wanted) -> list[Path]:
    """The folders there are for the revisions of a model, the best first."""
    storage, found = storage_of(wanted.repo), []
    for revision in wanted.revisions:
        try:
            commit = (storage / "refs" / revision).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            commit = revision  # a commit is its own name
        folder = storage / "snapshots" / commit
        if _COMMIT.fullmatch(commit) and folder.is_dir():
            found.append(folder)
    return found


def _asked(wanted: Wanted) -> str:
    return f"{wanted.name} --revision {wanted.revision}" if wanted.revision else wanted.name
