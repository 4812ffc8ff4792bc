"""Fetching from the hub, end to end against a double of it; finding models in its cache."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import npvlm
from npvlm.errors import NpvlmError
from npvlm.files import hub as names
from npvlm.opening import find_folder
from tests.hub_double import COMMIT, REPO, Hub, digest, serve
from tests.test_cli import CLI, ROOT, one_line, photo, run  # noqa: F401

SHAPES = Path(npvlm.__file__).parent / "bundled" / "shapes"
READ = (
    "added_tokens.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.model",
)
WEIGHTS = "model.safetensors"
KEPT = 10 * 2**20  # bytes that huggingface_hub writes at a time
UNREAD = {
    "pt_224.npz": b"\0" * 10,
    "model.gguf": b"\0",
    "tokenizer.json": b"{}",
    "onnx/a.json": b"",
}


def the_files() -> dict[str, bytes]:
    """What the repository holds: the bundled model, and files that npvlm does not read."""
    return {path.name: path.read_bytes() for path in SHAPES.iterdir()} | UNREAD


def large_files() -> dict[str, bytes]:
    """The same with weights of 25 MB, so that a transfer can break off in the middle."""
    return the_files() | {WEIGHTS: random.Random(0).randbytes(25_000_000)}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub(the_files())) as double:
        yield double


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for the hub's tools, and none of their variables but this."""
    for variable in [name for name in os.environ if name.startswith(("HF_", "HUGGINGFACE_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


def fetch(hub: Hub, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `npvlm fetch` against the double."""
    environment = {"HF_ENDPOINT": hub.address, **variables}
    return run("fetch", *(arguments or (REPO,)), env=environment)


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    """The error that a fetch ended with; nothing but progress stands before it."""
    assert result.returncode == 3 and result.stdout == "", result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]


def storage(home: Path, repo: str = REPO) -> Path:
    return home / "hub" / f"models--{repo.replace('/', '--')}"


def test_what_is_fetched_is_what_npvlm_reads_and_runs_by_name(hub: Hub, photo: Path) -> None:  # noqa: F811
    result = fetch(hub)
    assert result.returncode == 0, result.stderr
    folder = Path(result.stdout.removesuffix("\n"))
    assert sorted(path.name for path in folder.iterdir()) == sorted(READ)
    assert all((folder / name).read_bytes() == (SHAPES / name).read_bytes() for name in READ)
    assert "3.83 MB of it to come" in result.stderr

    asked = len(hub.asked)
    question = ("--prompt", "answer en how many shapes?", "-q")
    expected = run("generate", photo, *question, "--model", "shapes").stdout
    answer = run("generate", photo, *question, "--model", REPO, env={"HF_ENDPOINT": hub.address})
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout == expected
    assert find_folder(f"{REPO}@main") == find_folder(f"{REPO}@{COMMIT}") == folder
    assert len(hub.asked) == asked

    # The hub's own tools see what was fetched.
    code = (
        "from huggingface_hub import scan_cache_dir, snapshot_download\n"
        f"print(snapshot_download('{REPO}', local_files_only=True))\n"
        "found = scan_cache_dir()\n"
        "print(len(found.warnings), [r.size_on_disk for r in found.repos])"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    size = sum((SHAPES / name).stat().st_size for name in READ)
    assert seen.stdout.splitlines() == [str(folder), f"0 [{size}]"]


def test_a_dry_run_lists_files_and_bytes_and_fetches_nothing(hub: Hub, home: Path) -> None:
    result = fetch(hub, REPO, "--dry-run")
    assert (result.returncode, result.stderr) == (0, "")
    *lines, last = result.stdout.splitlines()
    sizes = {name: f"{(SHAPES / name).stat().st_size:,}" for name in READ}
    assert {line.split()[1]: line.split()[0] for line in lines} == sizes
    total = f"{sum((SHAPES / name).stat().st_size for name in READ):,}"
    assert last.split()[0] == total and f"{total} to come" in last
    assert not any("/resolve/" in path for path, _ in hub.asked)
    assert not storage(home).exists()


def test_a_broken_transfer_goes_on_behind_what_has_come(home: Path) -> None:
    with serve(Hub(large_files(), break_after=12_000_000, breaks=1)) as hub:
        first = fetch(hub)
        if first.returncode:  # releases of huggingface_hub that do not try again by themselves
            assert "what has come is kept" in last_line(first)
            assert fetch(hub).returncode == 0
        assert hub.ranges(WEIGHTS) == [None, f"bytes={KEPT}-"]
        assert (find_folder(REPO) / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_an_interrupted_fetch_is_run_again_and_goes_on(home: Path) -> None:
    with serve(Hub(large_files(), stall_after=12_000_000)) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.address}
        process = subprocess.Popen(
            [*CLI, "fetch", REPO], stdout=-1, stderr=-1, text=True, env=environment
        )
        part = storage(home) / "blobs" / f"{digest(hub.files[WEIGHTS])}.incomplete"
        assert hub.stalled.wait(60)
        while process.poll() is None and not (part.exists() and part.stat().st_size == KEPT):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, said = process.communicate(timeout=60)
        assert (process.returncode, output) == (130, "")
        assert "run the same again to go on" in said and said.endswith("npvlm: interrupted.\n")

        with pytest.raises(NpvlmError, match=f"{WEIGHTS} is missing; run `npvlm fetch {REPO}`"):
            find_folder(REPO)
        assert (home / "hub").exists()
        again = fetch(hub)
        assert again.returncode == 0 and "14.51 MB of it to come" in again.stderr
        assert hub.ranges(WEIGHTS) == [None, f"bytes={KEPT}-"]
        assert (find_folder(REPO) / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])  # in LFS, and in git
def test_bytes_that_fail_their_checksum_are_deleted_and_said(
    hub: Hub, home: Path, name: str
) -> None:
    hub.damage = name
    said = last_line(fetch(hub, REPO, "-q"))
    assert name in said and digest(hub.files[name]) in said
    assert not list((storage(home) / "blobs").glob(f"{digest(hub.files[name])}*"))
    assert names.snapshot_of(names.Wanted(REPO, None)) is None


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_no_more_bytes_are_taken_than_were_promised(hub: Hub, home: Path, name: str) -> None:
    hub.more = name
    said = last_line(fetch(hub, REPO, "-q"))
    assert f"more than the {len(hub.files[name]):,} bytes that it promised" in said
    blobs = storage(home) / "blobs"
    assert all(
        p.stat().st_size <= len(hub.files[name]) for p in blobs.glob(f"{digest(hub.files[name])}*")
    )


def test_a_hub_that_leads_to_a_file_of_this_machine_gets_none(hub: Hub, home: Path) -> None:
    hub.redirect = "file:///etc/hostname"
    assert last_line(fetch(hub, REPO, "-q")).startswith("npvlm: ")
    assert not any(path.stat().st_size for path in (storage(home) / "blobs").iterdir())


@pytest.mark.parametrize(
    "name", ["../../evil.safetensors", "/tmp/evil.safetensors", "a:b.safetensors"]
)
def test_names_of_a_hub_lead_nowhere_but_into_the_cache(hub: Hub, home: Path, name: str) -> None:
    hub.files = {n: c for n, c in hub.files.items() if n != WEIGHTS}
    hub.files |= {"model.safetensors.index.json": b"{}", name: b"0", "model-1.safetensors": b"1"}
    folder = Path(fetch(hub, REPO, "-q").stdout.strip())
    assert "model-1.safetensors" in {path.name for path in folder.iterdir()}
    asked = [path for path, _ in hub.asked]
    assert not any("evil" in path or ":b" in path for path in asked)


def test_fetching_again_checks_what_is_here_and_mends_it(hub: Hub, home: Path) -> None:
    assert fetch(hub).returncode == 0
    blob = storage(home) / "blobs" / digest(hub.files[WEIGHTS])
    blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    link = find_folder(REPO) / "tokenizer.model"
    link.resolve().unlink()
    hub.asked.clear()
    mended = fetch(hub)
    assert mended.returncode == 0 and f"{WEIGHTS} is damaged" in mended.stderr
    asked = [path.rpartition("/")[2] for path, _ in hub.asked if "/resolve/" in path]
    assert asked == ["tokenizer.model", WEIGHTS]
    assert all((find_folder(REPO) / n).read_bytes() == hub.files[n] for n in READ)


@pytest.mark.parametrize(("status", "code"), [(401, None), (403, "GatedRepo")])
def test_a_gated_answer_names_the_page_and_the_two_steps(hub: Hub, status: int, code: str) -> None:
    hub.gate, hub.error = status, code
    said = last_line(fetch(hub, REPO, "-q"))
    page = f"{hub.address}/{REPO}"
    assert f"1. accept them on {page} " in said and "2. run `hf auth login`" in said
    assert "HF_TOKEN" in said


def test_a_token_opens_a_gated_model(hub: Hub) -> None:
    hub.gate, hub.token = 401, "hf_secret"
    result = fetch(hub, REPO, HF_TOKEN="hf_secret")
    assert result.returncode == 0
    assert f"terms must be accepted on {hub.address}/{REPO}" in result.stderr
    assert "hf_secret" not in result.stderr


def test_a_published_model_that_the_hub_hides_is_gated_any_other_is_unknown(hub: Hub) -> None:
    said = last_line(fetch(hub, "paligemma-3b-mix-224"))
    assert f"{hub.address}/google/paligemma-3b-mix-224" in said and "hf auth login" in said
    assert "/api/models/google/paligemma-3b-mix-224/revision/bfloat16" in [p for p, _ in hub.asked]
    assert "has no model no/such" in last_line(fetch(hub, "no/such", HF_TOKEN="hf_x"))


def test_a_missing_revision_is_named_and_another_one_is_fetched(hub: Hub) -> None:
    hub.revisions["v2"] = "f" * 40
    said = last_line(fetch(hub, REPO, "--revision", "v3"))
    assert f"{REPO} has no revision v3" in said
    result = fetch(hub, REPO, "--revision", "v2", "-q")
    assert result.stderr == "" and find_folder(f"{REPO}@v2") == Path(result.stdout.strip())
    with pytest.raises(NpvlmError, match="is no model"):
        find_folder(REPO)


def test_no_network_and_no_hub_are_said_in_a_sentence(hub: Hub) -> None:
    for endpoint in ("http://127.0.0.1:9", "http://[x"):
        said = one_line(fetch(hub, HF_ENDPOINT=endpoint))
        assert "HF_ENDPOINT" in said


def test_offline_takes_what_is_whole_and_refuses_the_rest(hub: Hub) -> None:
    assert "HF_HUB_OFFLINE" in last_line(fetch(hub, HF_HUB_OFFLINE="1"))
    folder = fetch(hub).stdout
    hub.asked.clear()
    assert fetch(hub, HF_HUB_OFFLINE="1").stdout == folder
    assert hub.asked == []


def altered(change: str, hub: Hub, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a Python in which something was changed first."""
    code = f"import sys\n{change}\nfrom npvlm.cli import main\nsys.argv[1:] = {arguments}\nmain()"
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_ENDPOINT": hub.address},
        check=False,
    )


def test_a_disk_without_room_is_refused_before_anything_is_fetched(hub: Hub, home: Path) -> None:
    small = "import shutil\nshutil.disk_usage = lambda at: shutil._ntuple_diskusage(10, 9, 1)"
    result = altered(small, hub, "fetch", REPO, "-q")
    assert "expected 0.0 GB" in last_line(result) and "HF_HOME" in result.stderr
    assert not any("/resolve/" in path for path, _ in hub.asked)


def test_without_the_extra_the_commands_are_printed_and_what_is_here_still_opens(
    hub: Hub,
    photo: Path,  # noqa: F811
) -> None:
    hidden = "sys.modules['huggingface_hub'] = None"
    said = last_line(altered(hidden, hub, "fetch", "paligemma-3b-mix-224"))
    assert "`pip install huggingface_hub`" in said
    by_hand = "`hf download google/paligemma-3b-mix-224 --revision bfloat16 --local-dir "
    assert f"{by_hand}paligemma-3b-mix-224`" in said
    assert f"{hub.address}/google/paligemma-3b-mix-224" in said

    folder = fetch(hub).stdout
    arguments = ("generate", str(photo), "--prompt", "caption en", "--model", REPO)
    assert altered(hidden, hub, *arguments).returncode == 0
    assert altered(hidden, hub, "fetch", REPO, "-q").stdout == folder


def test_a_bundled_model_needs_no_fetching(hub: Hub) -> None:
    for options in ((), ("--dry-run",)):
        result = fetch(hub, "shapes", *options)
        assert (result.returncode, result.stdout) == (0, f"{SHAPES}\n")
        assert result.stderr == "npvlm: shapes is in the box; nothing to fetch\n"
    assert hub.asked == []


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "http://hub.invalid"])
def test_a_hub_that_cannot_be_reached_is_said_with_the_reason(address: str) -> None:
    for options in ((), ("--dry-run",)):
        result = run("fetch", REPO, *options, env={"HF_ENDPOINT": address})
        said = last_line(result)
        assert said.startswith(f"npvlm: {address} cannot be reached (")
        assert said.endswith("); check the network and HF_ENDPOINT.")


def test_a_connection_refused_midway_says_that_what_has_come_is_kept(hub: Hub) -> None:
    gone = (
        "import huggingface_hub.file_download as d\n"
        "def get(*_, **__): raise RuntimeError from ConnectionRefusedError(111, 'refused')\n"
        "d.http_get = get"
    )
    said = last_line(altered(gone, hub, "fetch", REPO, "-q"))
    assert said.endswith(
        "cannot be reached (refused); check the network and HF_ENDPOINT, and fetch again: "
        "what has come is kept."
    )


def test_two_fetches_at_once_share_the_work(home: Path) -> None:
    with serve(Hub(large_files())) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.address}
        both = [
            subprocess.Popen([*CLI, "fetch", REPO, "-q"], stdout=-1, stderr=-1, env=environment)
            for _ in range(2)
        ]
        outputs = {process.communicate(timeout=60) for process in both}
        assert len(outputs) == 1 and not outputs.pop()[1]
        assert hub.ranges(WEIGHTS) == [None]


@pytest.mark.parametrize(
    ("gone", "says"), [("config.json", "no config.json"), (WEIGHTS, "no model.safetensors")]
)
def test_a_repository_without_a_whole_model_is_refused(hub: Hub, gone: str, says: str) -> None:
    del hub.files[gone]
    hub.files["adapter_model.safetensors"] = b"\0"
    assert says in last_line(fetch(hub))


def test_a_name_that_is_none_is_bad_use_and_near_ones_are_named(hub: Hub) -> None:
    result = fetch(hub, "paligemma-3b-mix-225")
    assert result.returncode == 2 and "did you mean paligemma-3b-mix-224" in one_line(result)
    assert fetch(hub, REPO, "--revision", "../../../x").returncode == 2


def save(home: Path, repo: str, revision: str | None, commit: str, files: dict[str, bytes]) -> Path:
    """Write a snapshot as the hub's tools do: a reference, and links to blobs."""
    place = storage(home, repo)
    if revision:
        (place / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        (place / "refs" / revision).write_text(commit)
    snapshot = place / "snapshots" / commit
    (place / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for name, content in files.items():
        (place / "blobs" / digest(content)).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{digest(content)}")
    return snapshot


WHOLE = {"config.json": b"{}", WEIGHTS: b"weights"}
INDEX = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
SHARDS = {
    "config.json": b"{}",
    "model.safetensors.index.json": INDEX,
    "model-1.safetensors": b"1",
    "model-2.safetensors": b"2",
}
ONE = "google/paligemma-3b-mix-224"


@pytest.mark.parametrize("files", [WHOLE, SHARDS], ids=["one file", "shards"])
def test_a_cached_model_is_found_by_its_short_name_and_by_its_repository(home, files) -> None:
    folder = save(home, ONE, "bfloat16", COMMIT, files)
    for name in (ONE, "paligemma-3b-mix-224", "paligemma-3b-mix-224@bfloat16", f"{ONE}@{COMMIT}"):
        assert find_folder(name) == folder


def test_bfloat16_is_preferred_then_main_then_float16_and_whole_ones_come_first(home) -> None:
    half = save(home, ONE, "float16", "c" * 40, WHOLE)
    assert find_folder(ONE) == half
    main = save(home, ONE, "main", "a" * 40, WHOLE)
    assert find_folder(ONE) == main
    partial = {name: content for name, content in SHARDS.items() if name != "model-2.safetensors"}
    preferred = save(home, ONE, "bfloat16", "b" * 40, partial)
    assert find_folder(ONE) == main
    (preferred / "model-2.safetensors").write_bytes(b"2")
    assert find_folder(ONE) == preferred
    second = save(home, "google/paligemma2-3b-mix-224", "main", "d" * 40, WHOLE)
    assert find_folder("paligemma2-3b-mix-224") == second


@pytest.mark.parametrize("gone", sorted(set(SHARDS) - {"model.safetensors.index.json"}))
def test_what_is_not_whole_names_what_is_missing_and_the_command(home, gone: str) -> None:
    folder = save(home, ONE, "bfloat16", COMMIT, SHARDS)
    (folder / gone).resolve().unlink()  # the link is left, and leads nowhere
    with pytest.raises(NpvlmError) as caught:
        find_folder("paligemma-3b-mix-224")
    assert f"{gone} is missing" in str(caught.value)
    assert "`npvlm fetch paligemma-3b-mix-224`" in str(caught.value)


def test_weights_that_are_a_broken_link_are_missing_although_there_is_an_index(home) -> None:
    folder = save(home, ONE, "main", COMMIT, WHOLE)
    (folder / WEIGHTS).resolve().unlink()
    with pytest.raises(NpvlmError, match=f"{WEIGHTS} is missing"):
        find_folder(ONE)


def test_a_published_model_that_is_not_here_names_the_command_and_its_size(home) -> None:
    with pytest.raises(NpvlmError, match=r"`npvlm fetch paligemma-3b-mix-224` .*\(5\.8 GB\)"):
        find_folder("paligemma-3b-mix-224")


@pytest.mark.parametrize(
    "name", ["someone/other", "someone/other@x", "a/b/c", "../x", "paligemma-3b-mix-225", "", "a@b"]
)
def test_what_is_nowhere_is_no_model(home, name: str) -> None:
    with pytest.raises(NpvlmError, match="is no model"):
        find_folder(name)


@pytest.mark.parametrize("revision", ["../../../../secret", "/etc", "a/../../b"])
def test_no_revision_leads_out_of_the_cache(home, revision: str) -> None:
    assert names.parse_name(f"{ONE}@{revision}") is None
    place = storage(home, ONE)
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("../../../outside")
    (home / "outside").mkdir(parents=True)
    assert names.find_cached(names.Wanted(ONE, None)) is None


def test_a_folder_of_the_name_comes_before_the_cache(home, tmp_path, monkeypatch) -> None:
    save(home, ONE, "bfloat16", COMMIT, WHOLE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paligemma-3b-mix-224").mkdir()
    assert find_folder("paligemma-3b-mix-224") == Path("paligemma-3b-mix-224")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"HF_HOME": "~/elsewhere"},
        {"HF_HUB_CACHE": "$HOME/models"},
        {"HUGGINGFACE_HUB_CACHE": "/old"},
        {"XDG_CACHE_HOME": "/xdg"},
    ],
    ids=lambda variables: next(iter(variables), "none"),
)
def test_the_cache_is_where_the_hubs_own_tools_have_it(variables, monkeypatch, tmp_path) -> None:
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    code = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    command = [sys.executable, "-c", code]
    theirs = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert str(names.cache_folder()) == theirs.strip()
