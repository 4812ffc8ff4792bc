"""`npvlm bench`: what it measures is what was run, and nothing of it stays behind."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import npvlm
from npvlm.cli.bench import SYNTHETIC
from npvlm.config import PRECISIONS, parse_config
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.checkpoint import open_checkpoint
from npvlm.files.names import EMBED_TOKENS, expected_shapes
from npvlm.kernels import bandwidth
from npvlm.model import ops as definitions
from npvlm.model.weights import unpack
from npvlm.work import bench as benching
from npvlm.work import limits, synthetic
from npvlm.work.bench import Plan, Report, bench, bench_synthetic
from npvlm.work.limits import LinearClock, stored_bytes
from npvlm.work.memory import Memory, PeakMemory, memory_now
from npvlm.work.peers.gguf import KINDS, Q6_K, Q8_0, gguf_bytes, write_gguf
from npvlm.work.peers.process import Round, worker
from npvlm.work.peers.start import Peer
from npvlm.work.rounds import open_model, random_inputs, run_round, write
from npvlm.work.synthetic import save_checkpoint, synthetic_checkpoint, synthetic_config
from npvlm.work.table import table

ROOT = Path(npvlm.__file__).parents[1]
PLAN = Plan(batch=2, prompt_tokens=3, new_tokens=4, repeat=2)


def tiny_values(family: str = "paligemma") -> dict[str, Any]:
    """The config.json of a model whose sizes are tiny and all different."""
    values = synthetic_config(f"{family}-3b-224")
    text = values["text_config"] | {
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 320,
    }
    vision = values["vision_config"] | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "projection_dim": 96,
    }
    return values | {
        "text_config": text,
        "vision_config": vision,
        "projection_dim": 96,
        "image_token_index": 310,
    }


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a tiny checkpoint and no tokenizer."""
    save_checkpoint(tiny_values(), tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No reading of gigabytes and no rest between rounds."""
    monkeypatch.setattr(limits, "read_bandwidth", lambda times: 1e9)
    monkeypatch.setattr(benching, "REST", 0.0)


def silent(what: str) -> None:
    """Nobody wants to know."""


def decoder_matrices(weights: dict[str, Any]) -> list[Any]:
    """What every decoding step has to read: the decoder's matrices, the table once."""
    return [w for n, w in weights.items() if n.startswith("language_model") and len(w.shape) == 2]


# What is run


def test_a_prompt_is_image_tokens_and_then_text_that_means_no_picture() -> None:
    config = parse_config(tiny_values())
    inputs = random_inputs(config, 3, 50)
    P = config.vision_config.num_patches
    assert inputs.ids.shape == (3, P + 50) and inputs.pixels.shape == (3, 3, 28, 28)
    assert np.all((inputs.ids == config.image_token_index) == (np.arange(P + 50) < P))
    assert np.all(inputs.ids[:, P:] < config.text_config.vocab_size)
    assert -1 <= inputs.pixels.min() < -0.9 and 0.9 < inputs.pixels.max() <= 1


def test_no_token_ends_an_answer_before_its_length(tiny: Path) -> None:
    model = open_model(tiny, None)
    every_id = tuple(range(model.config.text_config.vocab_size))
    model = replace(model, config=replace(model.config, eos_token_ids=every_id))
    inputs = random_inputs(model.config, 2, 3)
    steps = list(write(model, inputs, np.zeros((8, 96), np.float32), 6))
    assert [len(step) for step in steps] == [2] * 6


def test_the_parts_of_a_round_add_up(tiny: Path) -> None:
    model = open_model(tiny, None)
    done = run_round(model, random_inputs(model.config, 2, 3), 4)
    assert done.image > 0 and done.prefill > 0 and done.decode > 0
    assert math.isclose(done.image + done.prefill, done.first_token)
    assert len(done.tokens) == 2


# What is counted


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_decoding_step_is_charged_with_every_weight_it_reads(
    tiny: Path, precision: str, quick: None
) -> None:
    model = open_model(tiny, precision)
    inputs = random_inputs(model.config, 2, 3)
    measured = limits.measure_limits(model, inputs, 3, 1)
    expected = sum(map(stored_bytes, decoder_matrices(model.weights)))
    assert measured.decode_bytes == expected
    assert 0 < measured.decode_rate < measured.decode_linear_rate
    assert measured.decode_fraction == measured.decode_rate / 1e9


def test_the_clock_counts_operations_and_changes_no_result(rng: np.random.Generator) -> None:
    clock = LinearClock(definitions)
    x, w, bias = rng.random((5, 7)), rng.random((3, 7)), rng.random(3)
    assert np.array_equal(clock.ops.linear(x, w, bias), definitions.linear(x, w, bias))
    assert (clock.operations, clock.bytes) == (2 * 5 * 7 * 3, w.nbytes)
    assert clock.seconds > 0
    assert clock.ops.rms_norm is definitions.rms_norm
    assert definitions.linear is not clock.ops.linear


def test_reading_for_the_bandwidth_reads_every_word(rng: np.random.Generator) -> None:
    rows = rng.integers(0, 2**64, (6, 40), np.uint64)
    assert bandwidth._sum_rows(rows) == rows.sum()
    assert bandwidth.threads() >= 1


def test_the_peak_of_memory_is_seen_though_it_has_passed() -> None:
    before = memory_now()
    if before is None:
        pytest.skip("this system does not say")
    with PeakMemory() as peak:
        held = np.ones(2**23)  # 64 MB
        peak._look()
        del held
    assert peak.memory.anonymous - before.anonymous > 0.9 * 2**26
    assert peak.memory.resident > peak.memory.anonymous


# What is written


@pytest.mark.parametrize("name", SYNTHETIC)
def test_synthetic_models_have_the_sizes_of_published_ones(name: str) -> None:
    config = parse_config(synthetic_config(name))
    parameters = sum(map(math.prod, expected_shapes(config).values()))
    family, _, size = name.split("-")
    patches = (int(size) // 14) ** 2
    assert config.vision_config.num_patches == patches
    # The published files hold 2,923,466,480 and 3,032,242,416 numbers at 224 px.
    published = {"paligemma": 2_923_466_480, "paligemma2": 3_032_242_416}[family]
    assert parameters == published + (patches - 256) * 1152


@pytest.mark.parametrize("family", ["paligemma", "paligemma2"])
def test_a_synthetic_checkpoint_opens_and_no_two_rows_are_alike(family: str) -> None:
    values = tiny_values(family)
    with synthetic_checkpoint(values) as folder:
        weights = open_checkpoint(folder, parse_config(values))
        rows = unpack(weights[EMBED_TOKENS], np.float32)
        assert len(np.unique(rows, axis=0)) == len(rows)
        assert np.std(rows) == pytest.approx(0.02, rel=0.05)
        assert sum(map(stored_bytes, weights.values())) == synthetic.weight_bytes(values)
    assert not folder.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), NpvlmError("it ends")])
def test_whatever_ends_a_bench_its_checkpoint_is_removed(error: BaseException) -> None:
    with pytest.raises(type(error)), synthetic_checkpoint(tiny_values()) as folder:
        raise error
    assert not folder.exists()


def test_a_saved_checkpoint_stays_and_is_never_written_over(tmp_path: Path, quick: None) -> None:
    folder = tmp_path / "kept"
    report = bench_synthetic("tiny", tiny_values(), folder, None, PLAN, None, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    again = bench("tiny", folder, None, PLAN, None, silent)
    assert again.npvlm.rounds[0].tokens == report.npvlm.rounds[0].tokens
    with pytest.raises(UsageError, match="there already, expected a new or an empty folder"):
        save_checkpoint(tiny_values(), folder)
    with pytest.raises(UsageError, match="make it first"):
        save_checkpoint(tiny_values(), tmp_path / "absent" / "kept")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_writing_that_is_cut_short_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def full(handle: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises((KeyboardInterrupt, NpvlmError)):
        save_checkpoint(tiny_values(), tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_or_memory_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = synthetic_config("paligemma-3b-224")

    def attempt() -> str:
        with pytest.raises(NpvlmError) as caught:
            bench_synthetic("3b", values, tmp_path / "new", None, PLAN, None, silent)
        assert list(tmp_path.iterdir()) == []
        return str(caught.value)

    monkeypatch.setattr(benching, "available_memory", lambda: 7 * 10**9)
    assert "7.0 GB of memory are free, expected 7.3 GB" in attempt()
    monkeypatch.setattr(benching, "available_memory", lambda: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert "has 1.0 GB left, expected 5.8 GB" in attempt()


def test_more_tokens_than_the_model_has_places_for_are_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"expected at most 8192 .max_position_embeddings"):
        bench("tiny", tiny, None, Plan(new_tokens=8190), None, silent)


# What is said


def test_the_report_holds_medians_of_the_rounds_and_reads_back_from_json(
    tiny: Path, quick: None
) -> None:
    report = bench("tiny", tiny, "bfloat16", PLAN, None, silent)
    ours = report.npvlm
    assert len(ours.rounds) == 2 and report.ratios == {} and report.against is None
    assert ours.prefill == np.median([done.prefill for done in ours.rounds])
    assert ours.decode == pytest.approx(np.median([2 * 3 / done.decode for done in ours.rounds]))
    read = json.loads(json.dumps(report.to_dict()))
    assert read["precision"] == "bfloat16" and read["plan"]["batch"] == 2
    assert read["npvlm"]["rounds"][0]["tokens"] == ours.rounds[0].tokens
    assert set(read["machine"]) == {"cpu", "threads", "python", "numpy", "numba"}
    assert read["limits"]["product"] == [288, 96, 320]


@pytest.fixture
def compared(tiny: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> Report:
    """A report with a second side, whose rounds take 3 and 4 seconds."""

    @contextmanager
    def start(*anything: object) -> Iterator[SimpleNamespace]:
        done = Round(1.0, 2.0, 3.0, 4.0, [5, 6])
        memory = Memory(7 * 10**6, 8 * 10**6)
        yield SimpleNamespace(name="other", load=9.0, before=memory, round=lambda: (done, memory))

    monkeypatch.setattr(Peer, "check", lambda *anything: None)
    monkeypatch.setattr(Peer, "start", start)
    return bench("tiny", tiny, None, PLAN, "transformers", silent)


def test_ratios_say_how_many_times_as_fast_npvlm_is(compared: Report) -> None:
    ours = compared.npvlm
    assert compared.ratios == {
        "image": 1.0 / ours.image,
        "prefill": 2.0 / ours.prefill,
        "first_token": 3.0 / ours.first_token,
        "decode": ours.decode / (2 * 3 / 4.0),
    }


def test_the_table_is_aligned_and_shows_both_sides(compared: Report) -> None:
    blocks = [block.splitlines() for block in table(compared).split("\n\n")]
    assert len(blocks) == 3 and blocks[0][0] == "tiny, float32"
    for lines in blocks[1:]:
        assert len({len(line) for line in lines}) == 1
        assert len({line.count("|") for line in lines}) == 1
    cells = {r[0]: r[1:] for r in ([c.strip() for c in x.split("|")[1:-1]] for x in blocks[1])}
    assert cells[""] == ["npvlm", "other", "times as fast"]
    assert cells["first token"][1:] == ["3.000 s", f"{compared.ratios['first_token']:.2f}"]
    assert cells["decode, tokens/s"][1] == "1.50"
    assert cells["peak anonymous memory"][1] == "7 MB"
    assert cells["first token's id"][1] == "5, 6"


# The other programs


def test_a_worker_answers_whatever_its_libraries_print(tmp_path: Path) -> None:
    with worker("tests.peer", "peer", {"fails": False}, 1, tmp_path) as peer:
        assert peer.name == "a test's own program" and peer.load >= 0
        assert [peer.round()[0] for _ in range(3)] == [Round(1.0, 2.0, 3.0, 4.0, [5])] * 3
        assert memory_now() is None or peer.round()[1].resident > 10**6
    assert peer._process.returncode is not None


def test_a_worker_that_fails_is_quoted_in_one_sentence(tmp_path: Path) -> None:
    reason = "program ended early .RuntimeError: this worker fails when it is told to.; leave out"
    with (
        pytest.raises(NpvlmError, match=reason),
        worker("tests.peer", "peer", {"fails": True}, 1, tmp_path) as p,
    ):
        p.round()
    assert p._process.returncode is not None


def test_a_worker_ends_when_nobody_talks_to_it_any_more(tmp_path: Path) -> None:
    with worker("tests.peer", "peer", {"fails": False}, 1, tmp_path) as peer:
        peer._process.stdin.close()
        assert peer._process.wait(timeout=30) == 0
        peer._process.stdin = None


@pytest.mark.parametrize(
    ("program", "package"), [("transformers", "torch"), ("llama.cpp", "llama")]
)
def test_a_program_that_is_not_installed_is_named_with_the_remedy(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, program: str, package: str
) -> None:
    monkeypatch.setattr("npvlm.work.peers.start.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"pip install {package}"):
        bench("tiny", tiny, None, PLAN, program, silent)


def test_what_another_program_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npvlm.work.peers.start.find_spec", lambda name: True)
    with pytest.raises(UsageError, match="expected --batch 1"):
        Peer("llama.cpp", "int4").check(tiny_values(), 2)
    with pytest.raises(UsageError, match="the model it was made from, with --precision int8"):
        Peer("transformers", "int8").check(tiny_values() | {"quantization": {}}, 1)


def test_transformers_computes_in_what_is_nearest_unless_told() -> None:
    assert [Peer("transformers", p).dtype for p in PRECISIONS] == ["float32"] + ["bfloat16"] * 3
    assert Peer("transformers:bfloat16", "float32").dtype == "bfloat16"
    assert Peer("transformers:float32", "int4").dtype == "float32"


@pytest.mark.skipif(
    find_spec("torch") is None or find_spec("transformers") is None,
    reason="torch and transformers are not installed",
)
def test_transformers_says_the_same_first_tokens(tiny: Path, quick: None) -> None:
    report = bench("tiny", tiny, None, PLAN, "transformers", silent)
    assert report.against.name.startswith("transformers ")
    assert report.against.name.endswith(" float32")
    for ours, theirs in zip(report.npvlm.rounds, report.against.rounds, strict=True):
        assert ours.tokens == theirs.tokens


@pytest.mark.parametrize("family", ["paligemma", "paligemma2"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [96, 256])
def test_the_file_for_llama_cpp_has_every_tensor_where_its_header_says(
    tmp_path: Path, family: str, precision: str, width: int
) -> None:
    values, kind = tiny_values(family), KINDS[precision]
    sizes = {"text_config": values["text_config"] | {"hidden_size": width}}
    config = parse_config(values | sizes | {"projection_dim": width}).text_config
    table = kind if precision != "int4" else Q6_K if width == 256 else Q8_0
    write_gguf(tmp_path / "x.gguf", config, kind)
    data = (tmp_path / "x.gguf").read_bytes()
    at = 0

    def take(pattern: str) -> Any:
        nonlocal at
        values = struct.unpack_from("<" + pattern, data, at)
        at += struct.calcsize("<" + pattern)
        return values if len(values) > 1 else values[0]

    def text() -> str:
        nonlocal at
        length = take("Q")
        at += length
        return data[at - length : at].decode()

    assert take("4s") == b"GGUF" and take("I") == 3
    tensors, entries = take("QQ")
    read = {}
    for _ in range(entries):
        name, type_ = text(), take("I")
        read[name] = text() if type_ == 8 else take({4: "I", 6: "f"}[type_])
    assert read["general.architecture"] == config.model_type
    assert read[f"{config.model_type}.block_count"] == 3
    assert (f"{config.model_type}.attn_logit_softcapping" in read) == (family == "paligemma2")

    end = total = 0
    for _ in range(tensors):
        name, axes = text(), take("I")
        shape = take(f"{axes}Q")
        number, offset = take("I"), take("Q")
        assert offset == end
        count = math.prod(shape) if axes > 1 else shape
        own = table if name == "token_embd.weight" else kind
        assert number == (own.number if axes > 1 else 0)
        size = count // own.weights * own.bytes if axes > 1 else 4 * count
        total += size
        end += -(-size // 32) * 32
    assert -(-at // 32) * 32 + end == len(data)
    assert total == gguf_bytes(config, kind)


def test_widths_that_fill_no_blocks_are_refused(tmp_path: Path) -> None:
    values = tiny_values()
    text = values["text_config"] | {"hidden_size": 90}
    config = parse_config(values | {"text_config": text, "projection_dim": 90}).text_config
    with pytest.raises(UsageError, match=r"Q8_0 of llama\.cpp takes 32 weights at a time"):
        write_gguf(tmp_path / "x.gguf", config, KINDS["int4"])


# The command


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), "bench", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_command_prints_the_report_on_stdout_alone() -> None:
    result = run(
        "--model", "shapes", "--repeat", "1", "--new-tokens", "2", "--json", "--threads", "1"
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert (report["model"], report["machine"]["threads"]) == ("shapes", 1)
    assert report["limits"]["bandwidth"] > 1e8
    assert all(line.startswith("npvlm: ") for line in result.stderr.splitlines())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "shapes", "--synthetic", SYNTHETIC[0]], "--model and --synthetic"),
        (["--save", "x"], "--save keeps what --synthetic writes"),
        (["--synthetic", SYNTHETIC[0], "--save", str(ROOT)], "there already"),
        (["--against", "gemma"], "llama.cpp"),
        (["--new-tokens", "1"], "x>=2"),
    ],
)
def test_bad_use_is_said_in_one_line(arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert says in result.stderr and result.stderr.count("\n") == 1


def test_ctrl_c_leaves_no_file_and_no_process(tmp_path: Path) -> None:
    code = (
        "import sys, npvlm.work.bench as b, tests.test_bench as t\n"
        "from npvlm.work.peers.process import worker\n"
        "b.Peer.check = lambda *a: None\n"
        "b.Peer.start = lambda *a: worker('tests.peer', 'peer', {'fails': False}, 1, t.ROOT)\n"
        "def say(what): print(what, flush=True)\n"
        "b.bench_synthetic('tiny', t.tiny_values(), None, None, b.Plan(repeat=9999),"
        " 'transformers', say)"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as process:
        for line in process.stdout:
            if line.startswith("round 1"):
                break
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nobody of its session is left


def test_neither_torch_nor_its_libraries_are_imported_by_an_answer() -> None:
    code = (
        "import sys, npvlm\n"
        "from PIL import Image\n"
        "npvlm.load('shapes').generate(Image.new('RGB', (9, 9)), 'caption en', max_tokens=1)\n"
        "from npvlm.work import bench, table\n"
        "sys.exit(bool({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert result.returncode == 0
