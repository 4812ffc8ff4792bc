"""The command line as people use it: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import npvlm
from npvlm.work.demo import draw_picture

ROOT = Path(npvlm.__file__).parents[1]
CLI = [sys.executable, str(ROOT / "cli.py")]
QUESTION = "answer en how many shapes?"


def run(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    environment = os.environ | {"NPVLM_MODEL": "shapes"} | options.pop("env", {})
    return subprocess.run(
        [*CLI, *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        timeout=120,
        **options,
    )


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's picture as a file whose name has a space."""
    path = tmp_path_factory.mktemp("pictures") / "my photo.png"
    draw_picture().save(path)
    return path


@pytest.fixture(scope="session")
def other(photo: Path) -> Path:
    """A second picture, of another shape and mode."""
    path = photo.with_name("other.gif")
    draw_picture().crop((20, 20, 300, 200)).convert("P").save(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def compiled(photo: Path) -> None:
    """The first run says that it compiles kernels; the tests are about later ones."""
    run("generate", photo, "--prompt", QUESTION)


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """What stderr says, if it says it in one line, the tail line aside, and without a traceback."""
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    if len(lines) > 1:  # what is said beside it, and in a cold cache only
        lines = [line for line in lines if "compiling kernels" not in line] or lines[:1]
    if len(lines) == 2 and "peak memory" in lines[1]:
        del lines[1]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_one_picture_streams_its_answer_to_stdout_and_nothing_else(photo: Path) -> None:
    result = run("generate", photo, "--prompt", QUESTION)
    assert result.returncode == 0
    assert result.stdout.strip() and result.stdout.endswith("\n")
    assert "prompt tokens, first token after" in one_line(result)
    quiet = run("generate", photo, "--prompt", QUESTION, "-q")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")


def test_several_pictures_print_one_line_each_in_order(photo: Path, other: Path) -> None:
    result = run("generate", other, photo, other, "--prompt", QUESTION)
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [path for path, _ in lines] == [str(other), str(photo), str(other)]
    alone = run("generate", photo, "--prompt", QUESTION)
    assert lines[1][1] == alone.stdout.strip()
    assert lines[0] == lines[2]


def test_json_has_every_field_and_its_numbers_read_back(photo: Path) -> None:
    result = run("generate", photo, "--prompt", "caption en", "--json")
    [answer] = map(json.loads, result.stdout.splitlines())
    assert list(answer) == [
        "image",
        "prompt",
        "text",
        "token_ids",
        "logprobs",
        "prompt_token_ids",
        "stop",
        "model",
        "precision",
        "seed",
        "seconds",
        "logprob",
    ]
    model = npvlm.load("shapes")
    assert answer["image"] == str(photo)
    assert answer["prompt"] == "caption en"
    assert answer["model"] == "shapes"
    assert answer["seed"] is None
    assert answer["logprob"] == pytest.approx(sum(answer["logprobs"]))
    assert list(answer["seconds"]) == ["image", "prefill", "decode"]
    assert answer["stop"] == "eos" and answer["token_ids"][-1] in model.config.eos_token_ids
    assert answer["text"] == model.tokenizer.decode(answer["token_ids"])
    patches = model.config.vision_config.num_patches
    ids = answer["prompt_token_ids"]
    assert ids[:patches] == [model.tokenizer.image_id] * patches
    assert ids[patches] == model.tokenizer.bos_id and ids[-1] == model.tokenizer.newline_id
    assert ids[patches + 1 : -1] == model.tokenizer.encode("caption en")

    again = model.generate(photo, "caption en")[0]
    assert answer["logprobs"] == again.logprobs  # written so that float() gives the same number
    assert all(logprob <= 0 for logprob in answer["logprobs"])
    assert len(answer["logprobs"]) == len(answer["token_ids"])


def test_together_puts_all_pictures_before_one_prompt(photo: Path, other: Path) -> None:
    result = run("generate", photo, other, "--prompt", QUESTION, "--together", "--json")
    [answer] = map(json.loads, result.stdout.splitlines())
    assert answer["image"] == [str(photo), str(other)]
    model = npvlm.load("shapes")
    patches = model.config.vision_config.num_patches
    assert answer["prompt_token_ids"].count(model.tokenizer.image_id) == 2 * patches
    assert answer["token_ids"] == model.generate([[photo, other]], QUESTION)[0].token_ids


def test_together_with_one_picture_still_names_a_list(photo: Path) -> None:
    options = ["--prompt", QUESTION, "--together", "--json", "--max-tokens", "1"]
    assert json.loads(run("generate", photo, *options).stdout)["image"] == [str(photo)]


def test_max_tokens_ends_an_answer_and_says_so(photo: Path) -> None:
    result = run("generate", photo, "--prompt", "caption en", "--max-tokens", 2, "--json")
    answer = json.loads(result.stdout)
    assert answer["stop"] == "length" and len(answer["token_ids"]) == 2


def test_a_seed_repeats_an_answer_whatever_runs_beside_it(photo: Path, other: Path) -> None:
    options = ["--prompt", "caption en", "--temperature", 3, "--seed", 7, "--json"]
    alone = json.loads(run("generate", photo, *options).stdout)
    lines = run("generate", other, photo, *options).stdout.splitlines()
    assert json.loads(lines[1])["token_ids"] == alone["token_ids"]
    assert alone["seed"] == 7


def test_without_a_seed_one_is_drawn_told_and_repeats_the_answer(photo: Path) -> None:
    options = ["generate", photo, "--prompt", "caption en", "--top-k", 9]
    first = run(*options)
    seed = one_line(first).removeprefix("npvlm: seed ")
    assert run(*options, "--seed", seed).stdout == first.stdout


@pytest.mark.parametrize(
    "options",
    [["--temperature", "0", "--top-k", "5"], ["--do_sample", "False", "--temperature", "2"]],
)
def test_temperature_0_and_do_sample_false_are_greedy(photo: Path, options: list[str]) -> None:
    greedy = run("generate", photo, "--prompt", "caption en")
    result = run("generate", photo, "--prompt", "caption en", "-q", *options)
    assert (result.stdout, result.stderr) == (greedy.stdout, "")


def test_the_well_known_scripts_options_work_as_second_names(photo: Path) -> None:
    model = ROOT / "npvlm" / "bundled" / "shapes"
    result = run(
        *["generate", "--model_path", model, "--prompt", "this building is known as"],
        *["--image_file_path", photo, "--max_tokens_to_generate", "100"],
        *["--temperature", "0.8", "--top_p", "0.9", "--do_sample", "True"],
        *["--only_cpu", "True", "--seed", "1", "-q"],
    )
    assert (result.returncode, result.stderr) == (0, "")
    short = npvlm.load(model).generate(
        photo, "this building is known as", temperature=0.8, top_p=0.9, seed=1
    )
    assert result.stdout == short[0].text + "\n"


def test_the_model_comes_from_the_environment_unless_named(photo: Path, tmp_path: Path) -> None:
    environment = {"NPVLM_MODEL": str(tmp_path / "absent")}
    result = run("generate", photo, "--prompt", QUESTION, env=environment)
    assert result.returncode == 3 and "$NPVLM_MODEL: " in one_line(result)
    named = run("generate", photo, "--prompt", QUESTION, "--model", "shapes", env=environment)
    assert named.returncode == 0


def test_without_a_model_the_toy_answers_and_says_that_it_is_one(photo: Path) -> None:
    result = run("generate", photo, "--prompt", QUESTION, env={"NPVLM_MODEL": ""})
    assert result.returncode == 0 and "toy" in one_line(result)
    assert result.stdout == run("generate", photo, "--prompt", QUESTION).stdout


def test_an_image_mark_in_the_prompt_is_removed_and_said(photo: Path) -> None:
    marked = run("generate", photo, "--prompt", f"<image>{QUESTION}")
    assert "<image> removed" in one_line(marked)
    assert marked.stdout == run("generate", photo, "--prompt", QUESTION).stdout


def test_threads_reach_the_libraries_before_numpy_is_imported() -> None:
    code = (
        "import os, sys; from npvlm.cli.commands import npvlm\n"
        "try: npvlm.main(['generate', 'absent.png', '--prompt', 'x', '--threads', '1'],"
        " standalone_mode=False)\n"
        "except Exception: pass\n"
        "assert 'numpy' in sys.modules\n"
        "print(os.environ['OPENBLAS_NUM_THREADS'], os.environ['OMP_NUM_THREADS'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.stdout.split() == ["1", "1"], result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "IMAGE"),
        (["--temperature", "nan"], "nan"),
        (["--temperature", "inf"], "inf"),
        (["--temperature", "-1"], "-1"),
        (["--top-p", "nan"], "nan"),
        (["--top-p", "0"], "0"),
        (["--top-p", "1.5"], "1.5"),
        (["--top-k", "0"], "0"),
        (["--max-tokens", "0"], "0"),
        (["--seed", "-1"], "-1"),
        (["--threads", "0"], "0"),
        (["--do_sample", "perhaps"], "perhaps"),
        (["--ops", "torch"], "kernels"),
        (["--colour"], "--colour"),
    ],
)
def test_bad_use_exits_with_2_and_names_the_flag(options: list[str], says: str) -> None:
    pictures = ["x.png"] if options else []  # with no options, IMAGE is what is missing
    result = run("generate", *pictures, "--prompt", "caption en", *options)
    assert result.returncode == 2
    assert says in one_line(result) and "--help" in one_line(result)
    assert result.stdout == ""


def test_more_tokens_than_the_model_has_places_for_is_bad_use(photo: Path) -> None:
    result = run("generate", photo, "--prompt", "caption en", "--max-tokens", 10**30)
    assert result.returncode == 2 and "max_position_embeddings" in one_line(result)


def test_a_prompt_that_is_no_utf8_exits_with_2(photo: Path) -> None:
    result = subprocess.run(
        [*CLI, "generate", str(photo), "--prompt", b"caption \xff\xfe", "--model", "shapes"],
        capture_output=True,
        check=False,
    )
    assert result.returncode == 2
    assert b"UTF-8" in result.stderr and b"Traceback" not in result.stderr


@pytest.mark.parametrize("model", ["absent", "/", "cli.py"])
def test_a_model_that_is_none_exits_with_3(photo: Path, model: str) -> None:
    result = run("generate", photo, "--prompt", QUESTION, "--model", model, cwd=ROOT)
    assert result.returncode == 3
    assert "expected" in one_line(result) or "missing" in one_line(result)


def test_a_picture_that_is_none_exits_with_3(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    for picture in (tmp_path / "absent.png", tmp_path / "text.png", tmp_path):
        result = run("generate", picture, "--prompt", QUESTION)
        assert result.returncode == 3
        assert str(picture) in one_line(result)


def test_ctrl_c_exits_with_130_sigterm_with_143_a_closed_terminal_with_129(photo: Path) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        command = [
            *CLI,
            "generate",
            *[str(photo)] * 2000,
            "--prompt",
            "caption en",
            "--model",
            "shapes",
        ]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()  # it is at work
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("number", "code", "says"),
    [(signal.SIGINT, 130, "interrupted."), (signal.SIGTERM, 143, "terminated.")],
)
def test_signals_are_heard_while_kernels_are_compiled(
    photo: Path, tmp_path: Path, number: int, code: int, says: str
) -> None:
    process = subprocess.Popen(
        [*CLI, "generate", str(photo), "--prompt", QUESTION, "--model", "shapes"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
    )
    assert process.stderr is not None
    assert "compiling kernels for this CPU, once" in process.stderr.readline()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr.strip()) == (code, "", f"npvlm: {says}")


def test_a_signal_that_python_forgets_is_raised_all_the_same() -> None:
    code = """
import signal, time
from npvlm.cli.interruption import Stopped, listen

class Fragile:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)  # raised in here, it is printed and forgotten

listen()
try:
    Fragile()
    time.sleep(20)
except Stopped as stop:
    print(stop.number)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (result.stdout, result.stderr) == ("15\n", "")


ARRIVES = "signal.raise_signal(signal.SIGTERM)"


@pytest.mark.parametrize(
    "what",
    [
        ARRIVES,
        # Python before 3.12 makes a RuntimeError of what is raised here.
        f"type('A', (), dict(b=type('B', (), dict(__set_name__=lambda *_: {ARRIVES}))()))",
    ],
    ids=["between", "while a class is made"],
)
def test_a_signal_is_heard_while_the_commands_are_imported(what: str) -> None:
    code = f"""
import signal, sys

class Sender:
    def find_spec(self, name, *rest):
        if name == "npvlm.cli.commands":
            {what}

sys.meta_path.insert(0, Sender())
from npvlm.cli import main
main()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (result.returncode, result.stderr) == (143, "npvlm: terminated.\n")


def test_a_second_signal_does_not_break_the_clean_up() -> None:
    code = """
import signal
from npvlm.cli.interruption import Stopped, listen

listen()
try:
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        print("clean")
except Stopped as stop:
    print(stop.number)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (result.stdout, result.stderr) == ("clean\n2\n", "")


def test_the_work_goes_on_when_nobody_reads_stderr(photo: Path, tmp_path: Path) -> None:
    """Else a batch in `2>&1 | head` would end early, and say by its exit code that all is fine."""
    read, written = os.pipe()
    os.close(read)
    output = tmp_path / "out.jsonl"
    command = [*CLI, "batch", str(photo), str(photo.parent / "absent*"), "--task", "ocr"]
    (photo.parent / "absent.png").touch()
    result = subprocess.run([*command, "-o", str(output)], stderr=written, check=False)
    os.close(written)
    (photo.parent / "absent.png").unlink()
    assert result.returncode == 3  # one of the two is no picture
    assert len(output.read_text().splitlines()) == 2


def test_a_closed_pipe_ends_quietly(photo: Path) -> None:
    command = [*CLI, "generate", *[str(photo)] * 300, "--prompt", QUESTION, "--model", "shapes"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        stderr = process.stderr.read()
        assert (process.wait(timeout=60), stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_said_in_one_line(photo: Path) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [*CLI, "generate", str(photo), "--prompt", QUESTION, "--model", "shapes"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 3
    assert "No space left" in one_line(result)


def test_the_demo_answers_and_leaves_a_picture(tmp_path: Path) -> None:
    result = run("demo", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "npvlm-demo.png" in result.stderr and "caption en" in result.stdout
    names = ["npvlm-demo-boxes.png", "npvlm-demo.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    drawn, asked = (Image.open(tmp_path / name).convert("RGB") for name in names)
    plain = draw_picture()
    assert asked.tobytes() == plain.tobytes()
    assert drawn.size == plain.size and drawn.tobytes() != plain.tobytes()


def test_the_demo_says_where_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "absent" / "x.png", tmp_path / "file" / "x.png"):
        result = run("demo", "-o", output)
        assert result.returncode == 3 and str(output) in one_line(result)
    assert run("demo", "-o", tmp_path).returncode == 2
    wrong = run("demo", "-o", tmp_path / "x.jpg")
    assert wrong.returncode == 2 and ".png" in one_line(wrong)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_definitions_give_the_kernels_answer(photo: Path) -> None:
    options = ["generate", photo, "--prompt", QUESTION, "-q"]
    numpy = run(*options, "--ops", "numpy")
    assert (numpy.returncode, numpy.stderr) == (0, "")
    assert numpy.stdout == run(*options).stdout == run(*options, "--ops", "kernels").stdout


def test_a_missing_prompt_is_said_with_an_example(photo: Path) -> None:
    result = run("generate", photo, "caption en")
    assert result.returncode == 2 and '--prompt "caption en"' in one_line(result)


def test_the_bare_command_prints_its_help() -> None:
    result = run()
    assert result.returncode == 2
    assert result.stderr.startswith("Usage: ")


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes files")
@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stdout_or_stderr_is_no_error(photo: Path, closed: str) -> None:
    line = f'"$@" {closed}'
    command = [*CLI, "generate", str(photo), "--prompt", QUESTION, "--model", "shapes", "-q"]
    result = subprocess.run(["sh", "-c", line, "sh", *command], capture_output=True, check=False)
    assert result.returncode == 0
    assert result.stderr == b""
    assert bool(result.stdout) == (closed == "2>&-")


def test_a_path_that_is_no_utf8_comes_out_as_it_went_in(photo: Path) -> None:
    odd = os.fsencode(photo.parent) + b"/odd\xff.png"
    Path(os.fsdecode(odd)).write_bytes(photo.read_bytes())
    command = [*CLI, "generate", odd, photo, "--prompt", QUESTION, "--model", "shapes"]
    lines = subprocess.run(command, capture_output=True, check=True).stdout.splitlines()
    assert lines[0].startswith(odd + b"\t")
    output = subprocess.run([*command, "--json"], capture_output=True, check=True).stdout
    assert json.loads(output.splitlines()[0])["image"] == os.fsdecode(odd)


def test_help_and_version_answer_without_a_model() -> None:
    for arguments in (["--help"], ["generate", "--help"], ["demo", "-h"]):
        result = run(*arguments)
        assert result.returncode == 0 and "Usage:" in result.stdout
    assert "top-k" in run("generate", "--help").stdout
    assert npvlm.__version__ in run("--version").stdout


@pytest.mark.parametrize(
    ("error", "says"),
    [
        ("ImportError('libx.so.1: failed to map segment from shared object')", "out of memory;"),
        ("SystemError('compile returned NULL without setting an exception')", "out of memory;"),
        ("SystemError('error return without exception set')", "out of memory;"),
        ("OSError('Could not load libx.so. This may mean')", "Could not load libx.so; is there"),
    ],
)
def test_a_library_that_finds_no_room_is_said_in_a_sentence(error: str, says: str) -> None:
    code = f"""
import sys

class Full:
    def find_spec(self, name, *rest):
        if name == "numpy":
            raise {error}

sys.meta_path.insert(0, Full())
sys.argv = ["npvlm", "caption", "absent.png"]
from npvlm.cli import main
main()
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 3 and one_line(result).startswith(f"npvlm: {says}")


def test_a_python_without_what_npvlm_needs_is_said() -> None:
    """-S leaves out the packages that are installed."""
    command = [sys.executable, "-S", str(ROOT / "cli.py"), "caption", "x.png"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 3
    assert f"{sys.executable} has no module click" in one_line(result)


def test_a_python_that_is_too_old_is_said() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.version_info = (3, 10, 2)\n"
    command = [sys.executable, "-c", f"{code}from npvlm.cli import main; main()"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 3 and "expected 3.11 to 3.13; use one of these" in one_line(result)
