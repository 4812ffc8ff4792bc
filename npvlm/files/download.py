"""Bring a model from the Hugging Face hub into its cache, each file checked against its checksum.

What has come is kept when a transfer breaks off, and the next one goes on behind it.
huggingface_hub 2.4 keeps nothing of a file that it could not finish (1.0 did); so its transfer is
used, and the files are named, checked and put into place here. It is imported only here, and only
when it is used: npvlm runs without it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npvlm.errors import NpvlmError, why
from npvlm.files.checkpoint import INDEX, SINGLE
from npvlm.files.hub import CONFIG, Wanted, cache_folder, endpoint, storage_of
from npvlm.files.output import check_room, new_file

# What npvlm reads beside the weights.
SETTINGS = (
    CONFIG,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "added_tokens.json",
)
_TIMEOUT = 30  # seconds for the hub to say what there is
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_NO_WAY = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)

Say = Callable[[str], None]


class NotAsked(NpvlmError):
    """The hub was not asked: huggingface_hub is not installed, or told to use no network."""


class _Promised(io.BufferedWriter):
    """A file that is written behind its end, and grows no larger than was promised."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self.most = most

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.most:
            raise NpvlmError(
                f"{endpoint()} sends more than the {self.most:,} bytes that it promised, expected "
                "no more; fetch again, or from another hub."
            )
        return super().write(data)


@dataclass(frozen=True)
class RemoteFile:
    """A file of the hub: its name, its bytes, and the SHA-256 of large ones, git's id of others."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Remote:
    """What there is to fetch of a model, at one commit."""

    wanted: Wanted
    revision: str
    commit: str
    gated: bool
    files: tuple[RemoteFile, ...]

    @property
    def storage(self) -> Path:
        """Its folder in the cache."""
        return storage_of(self.wanted.repo)

    @property
    def snapshot(self) -> Path:
        """The folder that `load` opens once it is fetched."""
        return self.storage / "snapshots" / self.commit

    def blob(self, file: RemoteFile) -> Path:
        """Where the bytes of a file lie; the snapshot links to them."""
        return self.storage / "blobs" / file.digest

    def part(self, file: RemoteFile) -> Path:
        """Where they lie until all have come."""
        return self.storage / "blobs" / f"{file.digest}.incomplete"

    def is_here(self, file: RemoteFile) -> bool:
        """Whether a file of this size is there; only `fetch` looks into it."""
        places = (self.snapshot / file.name, self.blob(file))
        return any(_size_of(at) == file.size for at in places if at.is_file())

    def bytes_to_come(self) -> int:
        """Bytes that are still to be fetched."""
        missing = (file for file in self.files if not self.is_here(file))
        return sum(file.size - min(file.size, _size_of(self.part(file))) for file in missing)


def look_up(wanted: Wanted) -> Remote:
    """Ask the hub what there is of a model.

    Raises
    ------
    NotAsked
        Without huggingface_hub, and where HF_HUB_OFFLINE is set.
    NpvlmError
        Without a network, for a model that is not there or not to be had, and for one without
        files that npvlm reads.
    """
    hub = _library(wanted)
    known = wanted.published
    revision = wanted.revision or (known.revision if known else "main")
    with _refusals(wanted, revision, known is not None, begun=False):
        info = hub.HfApi(endpoint=endpoint()).model_info(
            wanted.repo, revision=revision, timeout=_TIMEOUT, files_metadata=True
        )
    files = [_remote_file(wanted, file) for file in _chosen(wanted, info.siblings or [])]
    if not _COMMIT.fullmatch(str(info.sha)):
        raise NpvlmError(
            f"{endpoint()} names no commit of {wanted.repo}; is it a Hugging Face hub?"
        )
    files.sort(key=lambda file: file.size)  # a refusal comes with the first, in no time
    return Remote(wanted, revision, info.sha, bool(info.gated), tuple(files))


def fetch(remote: Remote, begin: Callable[[RemoteFile], None], say: Say, quiet: bool) -> Path:
    """Fetch what is not here yet, and check what is.

    Parameters
    ----------
    begin : told of each file before it is fetched
    say : told what is going on otherwise
    quiet : no progress bars; else there are some where stderr is a terminal

    Returns
    -------
    Path
        The folder of the model, whole.

    Raises
    ------
    NpvlmError
        For a refusal, a broken transfer, a disk too small, and bytes other than those promised.
        What has come so far is kept; what is wrong is not.
    """
    hub = _library(remote.wanted)
    if quiet:
        hub.utils.disable_progress_bars()
        hub.utils.logging.set_verbosity_error()
    if any(remote.is_here(file) for file in remote.files):
        say("checking what is here already")
    with _writing():
        missing = [file for file in remote.files if not _is_sound(remote, file, say)]
        _check_room(remote)
        if not _reference(remote).exists():  # one that is there may name a model that is whole
            _refer(remote)
    for file in missing:
        begin(file)
        _bring(hub, remote, file)
    with _writing():
        _refer(remote)
    return remote.snapshot


def by_hand(wanted: Wanted) -> str:
    """The command that fetches a model without npvlm, and what comes before it."""
    known = wanted.published
    revision = wanted.revision or (known.revision if known else "main")
    folder = wanted.repo.rpartition("/")[2]
    terms = f" once you have accepted the terms on {wanted.page}" if known else ""
    command = f"hf download {wanted.repo} --revision {revision} --local-dir {folder}"
    return f"`{command}`{terms}, which makes the folder {folder} for --model"


def _library(wanted: Wanted) -> Any:
    """huggingface_hub, or the sentence that says how to do without."""
    try:
        import huggingface_hub.errors
        import huggingface_hub.file_download
        import huggingface_hub.utils
    except ImportError:
        raise NotAsked(
            "fetching needs huggingface_hub, which is not installed: run "
            f"`pip install huggingface_hub`, or fetch by hand with {by_hand(wanted)}."
        ) from None
    except ValueError as error:  # it reads its variables here
        raise NpvlmError(
            f"huggingface_hub does not start ({why(error)}); check HF_ENDPOINT and the other "
            "variables that begin with HF_."
        ) from None
    return huggingface_hub


def _chosen(wanted: Wanted, siblings: list[Any]) -> list[Any]:
    """The files that npvlm reads, of all that there are."""
    there = {file.rfilename: file for file in siblings}
    weights = [n for n in there if n.endswith(".safetensors") and not set(n) & set("/\\:")]
    single = SINGLE in there
    if CONFIG not in there or not (single or INDEX in there):
        lacking = CONFIG if CONFIG not in there else SINGLE
        raise NpvlmError(
            f"{wanted.repo} has no {lacking}, expected a whole model in safetensors files; see "
            f"what there is on {wanted.page}."
        )
    names = [SINGLE] if single else [INDEX, *weights]
    return [there[name] for name in (*SETTINGS, *names) if name in there]


def _remote_file(wanted: Wanted, sibling: Any) -> RemoteFile:
    """What the hub promises of a file; without that there is nothing to check it by."""
    large = sibling.lfs
    digest, size = (large.sha256, large.size) if large else (sibling.blob_id, sibling.size)
    if type(size) is not int or size < 0 or not _DIGEST.fullmatch(str(digest)):
        raise NpvlmError(
            f"{endpoint()} says neither size nor checksum of {sibling.rfilename} of {wanted.repo}, "
            "expected both; is it a Hugging Face hub?"
        )
    return RemoteFile(sibling.rfilename, size, digest)


def _is_sound(remote: Remote, file: RemoteFile, say: Say) -> bool:
    """Whether a file is here as it should be, and linked; one that is damaged is removed."""
    pointer, blob = remote.snapshot / file.name, remote.blob(file)
    found = pointer if pointer.exists() else blob
    if found.exists():
        if _digest_of(found, file.digest) == file.digest:
            _link(pointer, blob)
            return True
        say(f"{file.name} is damaged and fetched again")
        pointer.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
    return False


def _bring(hub: Any, remote: Remote, file: RemoteFile) -> None:
    """Fetch one file behind what has come of it before, check it, and put it into its place."""
    wanted, part, blob = remote.wanted, remote.part(file), remote.blob(file)
    locks = cache_folder() / ".locks" / remote.storage.name
    with _writing():
        for folder in (blob.parent, locks):
            folder.mkdir(parents=True, exist_ok=True)
    url = hub.hf_hub_url(wanted.repo, file.name, revision=remote.commit, endpoint=endpoint())
    # The lock that the hub's own tools take: two at once would write one file.
    lock = locks / f"{file.digest}.lock"
    with _refusals(wanted, remote.revision, True, begun=True), hub.utils.WeakFileLock(lock):
        if not blob.exists():
            if _size_of(part) > file.size:
                part.unlink()
            with _Promised(part, file.size) as output:
                hub.file_download.http_get(
                    url,
                    output,
                    resume_size=output.tell(),
                    headers=hub.utils.build_hf_headers(library_name="npvlm"),
                    expected_size=file.size,
                    displayed_filename=file.name,
                )
            found = _digest_of(part, file.digest)
            if found != file.digest:
                part.unlink()
                raise NpvlmError(
                    f"{file.name} of {wanted.repo} came with the checksum {found}, expected "
                    f"{file.digest}; it is deleted: fetch again."
                )
            part.replace(blob)
        _link(remote.snapshot / file.name, blob)


def _link(pointer: Path, blob: Path) -> None:
    """Let a snapshot have a file; where there are no links, the file itself."""
    if pointer.exists():
        return
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.unlink(missing_ok=True)  # a link that leads nowhere
    try:
        pointer.symlink_to(Path("..", "..", "blobs", blob.name))
    except OSError:
        blob.replace(pointer)


def _reference(remote: Remote) -> Path:
    """The file that says which commit a revision is."""
    return remote.storage / "refs" / remote.revision


def _refer(remote: Remote) -> None:
    """Note which commit a revision is; a commit is its own name."""
    reference = _reference(remote)
    if remote.revision != remote.commit:
        reference.parent.mkdir(parents=True, exist_ok=True)
        with new_file(reference) as draft:
            draft.write_text(remote.commit)


def _digest_of(path: Path, like: str) -> str:
    """The checksum of a file, of the kind that `like` is."""
    if len(like) == 64:
        summed = hashlib.sha256()
    else:  # git's id of a file
        summed = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            summed.update(block)
    return summed.hexdigest()


def _size_of(path: Path) -> int:
    """How large a file is; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def _check_room(remote: Remote) -> None:
    """Refuse what does not fit on the disk."""
    if needed := remote.bytes_to_come():
        otherwise = "make room, or set HF_HOME to a folder on another disk."
        check_room(cache_folder(), needed, otherwise)


@contextmanager
def _writing() -> Iterator[None]:
    """Say in a sentence what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> NpvlmError:
    return NpvlmError(
        f"{error.filename or cache_folder()}: {error.strerror or error}; make room or mend it, or "
        "set HF_HOME to another folder."
    )


@contextmanager
def _refusals(wanted: Wanted, revision: str, known: bool, *, begun: bool) -> Iterator[None]:
    """Say in a sentence whatever goes wrong between here and the hub.

    A model that is `known` to be there and refused is gated; of any other that may mean that there
    is none, for the hub does not tell strangers. Once files have `begun` to come, they are kept.

    The library raises errors of its HTTP client, of which different releases use different ones,
    and whatever it makes of an answer that is none of a hub's.
    """
    try:
        yield
    except NpvlmError:
        raise
    except Exception as error:
        raise _refusal(error, wanted, revision, known, begun) from error


def _refusal(
    error: Exception, wanted: Wanted, revision: str, known: bool, begun: bool
) -> NpvlmError:
    from huggingface_hub import errors

    kept = ": what has come is kept" if begun else ""
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else None
    said = getattr(error, "server_message", None) or ""
    if "Invalid credentials" in said:
        return NpvlmError(
            f"{endpoint()} does not know your token; log in again with `hf auth login`, or set "
            "HF_TOKEN to one that is valid."
        )
    if isinstance(error, errors.GatedRepoError) or status == 403 or (status == 401 and known):
        return NpvlmError(
            f"{wanted.repo} is given only to those who accept its terms{_in_brackets(said)}: "
            f"1. accept them on {wanted.page} while logged in there; 2. run `hf auth login`, or "
            "set HF_TOKEN to a token that may read gated repositories; then fetch again."
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return NpvlmError(
            f"{endpoint()} has no model {wanted.repo}, or does not show it to you; check the name "
            "(`npvlm models` lists what Google published), or log in with `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return NpvlmError(
            f"{wanted.repo} has no revision {revision}; {wanted.page}/tree/main lists those it has."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return NotAsked(
            f"{wanted.name} is not whole in {cache_folder()}, and HF_HUB_OFFLINE forbids to fetch "
            "it; unset that."
        )
    if status is not None:
        return NpvlmError(
            f"{endpoint()} answered {status} for {wanted.repo}{_in_brackets(said)}; try again "
            f"later{kept}."
        )
    if unreached := _unreached(error):
        return NpvlmError(
            f"{endpoint()} cannot be reached ({unreached}); check the network and HF_ENDPOINT"
            f"{', and fetch again' if begun else ''}{kept}."
        )
    if isinstance(error, OSError) and error.errno is not None:  # the disk; others have none
        return _unwritable(error)
    return NpvlmError(
        f"{endpoint()} gave no whole answer ({why(error)}); check the network and "
        f"HF_ENDPOINT, and fetch again{kept}."
    )


def _unreached(error: BaseException) -> str:
    """Why no connection came about, as the system says it below what the library made of it."""
    cause: BaseException | None = error
    while cause is not None:
        no_way = isinstance(cause, OSError) and cause.errno in _NO_WAY
        if no_way or isinstance(cause, ConnectionRefusedError | socket.gaierror):
            return why(getattr(cause, "strerror", None) or cause)
        cause = cause.__cause__ or cause.__context__
    return ""


def _in_brackets(said: str) -> str:
    return f" ({why(said)})" if said else ""
