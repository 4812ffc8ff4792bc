"""A batch on a cluster: Ray hands pictures to workers that have the model, and keeps the order.

The driver opens the model without reading its weights, and writes the records. A worker that dies
ends a pass: the next one asks those that are left for whatever is not written yet.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import re
import signal
import socket
import threading
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npvlm import __version__
from npvlm.answers.lines import json_line
from npvlm.api import Model, load
from npvlm.config import read_config
from npvlm.errors import NpvlmError, UsageError
from npvlm.opening import find_folder
from npvlm.work.batch import answer, group_of, pictures_of
from npvlm.work.batch_input import Item

if TYPE_CHECKING:
    import pyarrow as pa

TASK = 16  # pictures handed out at once: two packs, one of which is read while one is answered
DEATHS = 3  # passes in a row that end without a single record
LOCAL_STORE = 2**28  # bytes of memory for what workers hand over, on this machine alone
THREADS = "NUMBA_NUM_THREADS"  # where --threads is kept, and what numba reads
LISTENING, JOINING = 5, 60  # seconds until a cluster is given up
_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]
_ADDRESS = re.compile(r"[^/\s]+:\d+")
_INSTALL = "pip install 'npvlm[ray]'"


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Be connected to a cluster, or to one of this machine alone that ends with the block.

    Parameters
    ----------
    address : host:port of its head, "auto" for the one that this machine is part of; None for a
        new one on this machine

    Raises
    ------
    UsageError
        For an address that is none.
    NpvlmError
        Where Ray is not installed, there is no such cluster, or it runs other versions.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    if address is not None and address != "auto" and not _ADDRESS.fullmatch(address):
        raise UsageError(f"--address is {address!r}, expected host:port of the cluster's head.")
    with _quiet():
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise NpvlmError(f"--engine ray needs Ray ({error}); {_INSTALL}.") from None
        warnings.simplefilter("ignore")  # again: importing Ray has switched its own on
        try:
            with _no_stderr():
                _connect(address)
            for number in _SIGNALS:  # compiled code has set its own
                signal.signal(number, signal.getsignal(number))
            yield
        finally:
            ray.shutdown()


def open_unread(model: str, precision: str | None, adapter: Path | None) -> Model:
    """Open a model for what it is called and can be asked; nothing is packed.

    Raises
    ------
    UsageError, NpvlmError
        As `npvlm.load`.
    """
    packed = read_config(find_folder(model)).quantization
    opened = load(model, precision if packed else None, "numpy", adapter)
    return replace(opened, precision=precision or opened.precision)


def answer_on_cluster(
    model: Model, items: Sequence[Item], max_tokens: int | None = None
) -> Generator[dict[str, Any], None, None]:
    """Give the record of each item, in order, as `answer` does, from the workers of `cluster`.

    The model says which one the workers load; its own weights are not read.

    Raises
    ------
    UsageError
        Where no node has as many CPUs as a worker shall have threads.
    NpvlmError
        For a node that cannot answer, and where workers die again and again.
    """
    import ray

    done = deaths = 0
    while done < len(items):
        try:
            with closing(_pass(model, items[done:], max_tokens)) as records:
                for record in records:
                    yield record
                    done, deaths = done + 1, 0
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if cause is not None and not isinstance(cause, ray.exceptions.RayError):
                at = items[done].image
                raise NpvlmError(
                    f"no worker can make the record of {at} ({_end(error)})."
                ) from None
            reason = _short(error)
        except SystemError as error:  # what Ray's compiled code makes of a signal
            raise error.__cause__ or error from None
        else:
            continue
        gc.collect()  # workers keep their CPUs as long as something, a traceback say, names them
        deaths += 1
        if deaths == DEATHS:
            raise NpvlmError(
                f"workers died {DEATHS} times in a row before the record of {items[done].image} "
                f"({reason}); is there memory for the model on each node? --resume goes on."
            )


@dataclass(frozen=True)
class _Asked:
    """What a worker is told: the model, how to use it, and where the driver is."""

    model: str
    adapter: Path | None
    precision: str
    max_tokens: int | None
    threads: int
    folder: str
    version: str


class _Worker:
    """A process with a loaded model. What is wrong with its node is told with its first answer."""

    def __init__(self, asked: _Asked) -> None:
        self._asked = asked
        self._refusal: str | None = None
        try:
            self._model = self._load()
        except NpvlmError as error:
            self._refusal = _of_this_node(error)

    def _load(self) -> Model:
        if __version__ != self._asked.version:
            raise NpvlmError(
                f"npvlm is {__version__}, expected {self._asked.version} as on the driver; install "
                "the same."
            )
        os.environ[THREADS] = str(self._asked.threads)  # before numba is imported
        try:
            os.chdir(self._asked.folder)  # paths mean the same, and records say them as given
        except OSError as error:
            raise NpvlmError(
                f"{self._asked.folder}, where the driver runs, cannot be entered ({error.strerror})"
                "; run it in a folder that all nodes share."
            ) from None
        return load(self._asked.model, self._asked.precision, adapter=self._asked.adapter)

    def __call__(self, asked: pa.Table) -> pa.Table:
        """Answer the items of each row: their records as JSON, a line each."""
        rows = asked.to_pylist()
        refusal = self._refusal or next((r["refusal"] for r in rows if r["refusal"]), None)
        if refusal:
            return _table(refusal=[refusal])
        try:
            return _table(records=[self._answer(row) for row in rows])
        except NpvlmError as error:
            return _table(refusal=[_of_this_node(error)])

    def _answer(self, row: dict[str, Any]) -> bytes:
        items, pictures = pickle.loads(row["items"]), row["pictures"]
        records = answer(self._model, items, self._asked.max_tokens, pictures)
        return "\n".join(map(json_line, records)).encode()


def _pass(model: Model, items: Sequence[Item], max_tokens: int | None) -> Generator[dict[str, Any]]:
    """The records of items, until a worker dies."""
    import ray.data

    threads, workers = _size()
    adapter = model.adapter.folder if model.adapter else None
    how = model.precision, max_tokens, threads
    asked = _Asked(model.name, adapter, *how, str(Path.cwd()), __version__)
    options = ray.data.DataContext.get_current()
    options.enable_progress_bars = options.print_on_execution_start = False
    options.execution_options.preserve_order = True
    options.target_max_block_size = 1  # a row of pictures each: blocks are what is handed out
    in_parquet = any(item.stored for item in items)
    # A reader of Parquet is in no folder of ours.
    items = [replace(item, path=item.path.absolute()) if item.stored else item for item in items]
    tasks = list(_by_group(items) if in_parquet else _by_count(items))
    data = ray.data.from_arrow([_table(items=[pickle.dumps(some)]) for some in tasks])
    if in_parquet:
        # Reading is waiting: it reserves no CPU, for workers may have reserved all there are.
        data = data.map_batches(_read, batch_format="pyarrow", batch_size=1, num_cpus=0)
    data = data.map_batches(
        _Worker,
        fn_constructor_args=(asked,),
        batch_format="pyarrow",
        batch_size=1,
        num_cpus=threads,
        compute=ray.data.ActorPoolStrategy(size=workers),
        # Ray would wait for a dead node to come back, and give it a deadly picture for ever.
        ray_remote_args_fn=lambda: {"max_restarts": 0, "max_task_retries": 0},
    )
    for row in data.iter_rows():
        if row["refusal"]:
            raise NpvlmError(row["refusal"])
        yield from map(json.loads, row["records"].split(b"\n"))


def _size() -> tuple[int, int]:
    """Threads of a worker, and how many workers the nodes have CPUs for."""
    import ray

    given = os.environ.get(THREADS, "")
    nodes = [int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"]]
    cpus = [count for count in nodes if count > 0]
    if not cpus:
        raise NpvlmError("no node of the cluster has a CPU for work; start one that has.")
    threads = int(given) if given.isdecimal() and int(given) else min(cpus)
    if threads > max(cpus):
        raise UsageError(f"--threads is {threads}, but no node has more than {max(cpus)} CPUs.")
    return threads, sum(count // threads for count in cpus)


def _by_count(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    for first in range(0, len(items), TASK):
        yield items[first : first + TASK]


def _by_group(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Items that lie in one row group of one file, which is read once; or a few with paths."""
    for group, some in groupby(items, lambda item: group_of(item) if item.stored else None):
        together = list(some)
        yield from [together] if group else _by_count(together)


def _read(asked: pa.Table) -> Iterator[pa.Table]:
    """Put the pictures to the items of a row group, a few in each row."""
    for row in asked.to_pylist():
        items = pickle.loads(row["items"])
        if not items[0].stored:  # workers open paths themselves
            yield _table(items=[row["items"]])
            continue
        try:
            pictures = pictures_of([item for item in items if item.error is None])
            for some in _by_count(items):
                count = sum(item.error is None for item in some)
                given = list(islice(pictures, count))
                yield _table(items=[pickle.dumps(some)], pictures=[given])
        except NpvlmError as error:
            yield _table(refusal=[_of_this_node(error)])
            return


def _table(**columns: list[Any]) -> pa.Table:
    """Rows of what goes between processes; what is not given is empty."""
    import pyarrow as pa

    types = {
        "items": pa.large_binary(),
        "pictures": pa.list_(pa.large_binary()),
        "records": pa.large_binary(),
        "refusal": pa.string(),
    }
    count = len(next(iter(columns.values())))
    arrays = [pa.array(columns.get(name, [None] * count), kind) for name, kind in types.items()]
    return pa.table(arrays, names=list(types))


def _of_this_node(error: NpvlmError) -> str:
    import ray.util

    return f"on node {ray.util.get_node_ip_address()}: {error}"


def _connect(address: str | None) -> None:
    """Start Ray, or join the cluster that runs."""
    import ray

    def start(**options: Any) -> None:
        ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL)

    if address is None:
        try:
            with _held_signals():
                start(address="local", include_dashboard=False, object_store_memory=LOCAL_STORE)
        except Exception as error:
            raise NpvlmError(f"Ray does not start on this machine ({_short(error)}).") from None
        return
    if address != "auto":
        _check_listening(address)
    # Ray would wait for minutes, and longer for what is no Ray; a thread can be left alone.
    outcome = Future[None]()

    def join() -> None:
        try:
            start(address=address)
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=join, daemon=True).start()
    try:
        outcome.result(JOINING)
    except TimeoutError:
        raise NpvlmError(_why(address, f"no answer in {JOINING} s")) from None
    except Exception as error:
        raise NpvlmError(_why(address, _short(error))) from None


def _check_listening(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), LISTENING).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise NpvlmError(_why(address, str(error))) from None


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Lead nowhere what compiled code says on stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _held_signals() -> Iterator[None]:
    """Let signals wait until Ray has started: of half a cluster, parts would be left running.

    Ray sets handlers of its own meanwhile, which is why nobody can.
    """
    came: list[int] = []
    setter = signal.signal
    own = {number: setter(number, lambda number, frame: came.append(number)) for number in _SIGNALS}
    signal.signal = lambda number, handler: signal.getsignal(number)  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = setter
        for number, handler in own.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def _why(address: str, reason: str) -> str:
    """Why there is no connection, and what to do."""
    if "ersion mismatch" in reason:
        return f"the cluster at {address} has other versions ({reason}); use the same."
    return (
        f"no Ray cluster can be joined at {address} ({reason}); start one with `ray start`, and "
        "set RAY_AUTH_MODE=token if it has a token."
    )


def _end(error: Exception) -> str:
    """The last line of an error that quotes a traceback."""
    return str(error).rstrip().rpartition("\n")[2].strip()[:300]


def _short(error: Exception) -> str:
    """The beginning of an error, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Ray from saying anything: what matters is said in our sentences."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a thread that lost Ray would start it once more
    disabled = logging.root.manager.disable
    logging.disable()
    try:
        with (
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(nowhere),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        logging.disable(disabled)
