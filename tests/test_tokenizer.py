"""Token ids and text: a small vocabulary trained here, and Gemma's own where it is at hand."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from npvlm.config import Config, parse_config
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.tokenizer import Tokenizer, load_tokenizer
from tests.published import paligemma, saved_by_transformers5

LOCS, SEGS = 12, 5
REAL = Path(__file__).resolve().parents[2] / "shared" / "tokenizer" / "gemma"


def trained(**changes: Any) -> bytes:
    """Train a vocabulary laid out like Gemma's: named pieces, bytes, merges of a few words."""
    draw = random.Random(4)
    words = "caption detect segment answer describe en how many red blue circles dog cat the a is"
    lines = [" ".join(draw.choices(words.split(), k=6)) for _ in range(150)]
    named = ["<mask>", "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "<b>", "</b>"]
    named += [f"<loc{i:04d}>" for i in range(LOCS)] + [f"<seg{i:03d}>" for i in range(SEGS)]
    options = {
        "model_type": "bpe",
        "vocab_size": 370,
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "user_defined_symbols": named,
        "byte_fallback": True,
        "split_digits": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "num_threads": 1,
        "minloglevel": 2,
    }
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, **(options | changes)
    )
    return out.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return trained()


def a_config(vocab_size: int = 400, image: int = 370) -> Config:
    values = saved_by_transformers5("gemma") | {"image_token_index": image}
    values["text_config"] |= {"vocab_size": vocab_size}
    return parse_config(values)


@pytest.fixture
def folder(tmp_path: Path, model: bytes) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(model)
    return tmp_path


@pytest.fixture
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder, a_config())


def ids_of(tokenizer: Tokenizer, *pieces: str) -> list[int]:
    found = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size)}
    return [found[piece] for piece in pieces]


def refusal(folder: Path, config: Config | None = None) -> str:
    with pytest.raises(NpvlmError) as caught:
        load_tokenizer(folder, config or a_config())
    said = str(caught.value)
    assert "\n" not in said
    assert caught.value.exit_code == 3
    return said


def test_ids_with_a_meaning_are_looked_up_by_piece(tokenizer: Tokenizer) -> None:
    t = tokenizer
    assert [t.pad_id, t.eos_id, t.bos_id] == ids_of(t, "<pad>", "<eos>", "<bos>")
    assert [t.newline_id] == ids_of(t, "\n")
    assert (t.image_id, t.piece(t.image_id)) == (370, "<image>")
    assert t.vocab_size == 371


def test_a_vocabulary_with_other_ids_gives_other_ids(tmp_path: Path) -> None:
    content = trained(pad_id=3, eos_id=0, bos_id=1, unk_id=2)
    (tmp_path / "tokenizer.model").write_bytes(content)
    t = load_tokenizer(tmp_path, a_config())
    assert (t.pad_id, t.eos_id, t.bos_id) == (3, 0, 1)
    assert t.encode("<unk>") == [2]


def test_locations_segments_and_the_image_are_single_ids(tokenizer: Tokenizer) -> None:
    text = "<loc0003><loc0011>cat<seg004><image>"
    ids = tokenizer.encode(text)
    assert ids[:2] == ids_of(tokenizer, "<loc0003>", "<loc0011>")
    assert ids[-2:] == [*ids_of(tokenizer, "<seg004>"), tokenizer.image_id]
    assert len(tokenizer.encode("<loc0012>")) > 5


def test_typed_ends_of_a_sequence_are_plain_text(tokenizer: Tokenizer) -> None:
    for piece in ("<bos>", "<eos>", "<pad>"):
        ids = tokenizer.encode(piece)
        assert len(ids) > 1
        assert tokenizer.decode(ids) == piece


def test_a_typed_unk_is_the_unknown_piece(tokenizer: Tokenizer) -> None:
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.encode("a<unk>b") == [*a, *ids_of(tokenizer, "<unk>"), *b]


def test_newlines_are_pieces_of_their_own(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("\n") == [tokenizer.newline_id]
    assert tokenizer.encode("\n\n") == ids_of(tokenizer, "\n\n")


def test_nothing_is_put_in_front_of_a_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("") == []
    text = "  cat  dog "
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back_as_it_went_in(model: bytes, text: str) -> None:
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(model)
    t = Tokenizer(pieces, {"<image>": 370}, a_config())
    plain = t.strip_image_marks(text)[0].replace("\u2581", " ")
    for silent in ("<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"):
        assume(silent not in plain)  # pieces that say nothing when they come back
    assert t.decode(t.encode(plain)) == plain


@pytest.mark.parametrize("text", ["a\ud800", "\udcff", "caption \udce9t\udce9"])
def test_text_that_is_no_utf8_is_bad_use(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(UsageError) as caught:
        tokenizer.encode(text)
    assert "is no UTF-8 at character" in str(caught.value)
    str(caught.value).encode()
    assert caught.value.exit_code == 2


def test_image_marks_are_taken_out_and_counted(tokenizer: Tokenizer) -> None:
    strip = tokenizer.strip_image_marks
    assert strip("caption en") == ("caption en", 0)
    assert strip("<image>caption <image>en") == ("caption en", 2)
    assert strip("<ima<image>ge>en") == ("en", 2)


def test_what_structures_a_sequence_says_nothing(tokenizer: Tokenizer) -> None:
    t = tokenizer
    silent = ids_of(t, "<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    assert t.decode([*silent, t.image_id, *t.encode("cat"), t.eos_id]) == "cat"
    boxes = "<loc0001><loc0002><loc0003><loc0004> cat<seg001>"
    assert t.decode(t.encode(boxes)) == boxes


def test_ids_without_a_piece_say_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([371, 10**9, -1, *tokenizer.encode("cat")]) == "cat"
    assert tokenizer.piece(371) == tokenizer.piece(-1) == ""


def test_a_leading_space_is_kept(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(" cat")) == " cat"


def test_bytes_in_a_row_are_one_character_or_none(tokenizer: Tokenizer) -> None:
    t = tokenizer
    euro = ids_of(t, "<0xE2>", "<0x82>", "<0xAC>")
    assert t.decode(euro) == "€"
    assert t.decode(euro[:2]) == "\ufffd\ufffd"
    assert t.decode([*euro, *euro[:1]]) == "\ufffd" * 4  # the whole run is no UTF-8
    assert t.decode([euro[0], t.eos_id, *euro[1:]]) == "€"
    tab = ids_of(t, "<0x09>")
    assert t.decode([euro[0], *tab, euro[1]]) == "\ufffd\t\ufffd"


def test_added_tokens_are_matched_longest_first(folder: Path) -> None:
    added = {"<image>": 370, "<dog>": 371, "<dog>s": 372}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    t = load_tokenizer(folder, a_config())
    assert t.encode("<dog>s<dog>") == [372, 371]
    assert t.decode([372]) == "<dog>s"
    assert t.vocab_size == 373


def test_tokens_that_tokenizer_config_adds_are_read(folder: Path) -> None:
    listed = {
        "0": {"content": "<pad>", "special": True},
        "370": {"content": "<image>", "special": True},
        "380": {"content": "<new>", "lstrip": False},
    }
    values = json.dumps({"added_tokens_decoder": listed})
    (folder / "tokenizer_config.json").write_text(values)
    t = load_tokenizer(folder, a_config())
    assert t.encode("<new>") == [380]
    assert t.encode("<pad>") != [t.pad_id]


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("added_tokens.json", {"<image>": 371}, "expected the same"),
        ("added_tokens.json", {"<new>": 400}, "expected less than 400, the vocab_size"),
        ("added_tokens.json", {"<new>": "7"}, "expected tokens with their ids"),
        ("added_tokens.json", {"<new>": -1}, "expected tokens with their ids"),
        ("added_tokens.json", {"": 399}, "expected tokens with their ids"),
        ("added_tokens.json", {"\ud800": 399}, "expected tokens with their ids"),
        ("added_tokens.json", [], "expected a JSON object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "expected tokens with"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": None}}, "expected tokens with"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"399": {"content": "<new>", "lstrip": True}}},
            "adds '<new>' with lstrip",
        ),
    ],
)
def test_added_tokens_that_cannot_be_are_refused(
    folder: Path, file: str, values: object, says: str
) -> None:
    (folder / file).write_text(json.dumps(values))
    assert says in refusal(folder)


def test_two_files_that_disagree_are_refused(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<new>": 390}')
    values = {"added_tokens_decoder": {"391": {"content": "<new>"}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    assert "gives '<new>' the id 391, expected 390" in refusal(folder)


def test_an_image_id_that_is_another_piece_is_refused(folder: Path) -> None:
    said = refusal(folder, a_config(image=20))
    assert "image_token_index of config.json is 20, expected the id of <image>" in said


def test_a_vocabulary_larger_than_the_embedding_table_is_refused(folder: Path) -> None:
    said = refusal(folder, a_config(vocab_size=369))
    assert "has 370 pieces, expected at most 369, the vocab_size" in said


def test_a_model_without_a_row_for_the_image_is_read(folder: Path) -> None:
    assert load_tokenizer(folder, a_config(vocab_size=370)).image_id == 370


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    content = trained(bos_piece="<s>", eos_piece="</s>", user_defined_symbols=["x"], vocab_size=330)
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert "has no piece for <bos>, <eos>, a newline; is it the tokenizer of" in refusal(tmp_path)


def test_gemmas_own_tokenizer_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(user_defined_symbols=["\n"], vocab_size=330))
    said = refusal(tmp_path, a_config(vocab_size=2000, image=330 + 1152))
    assert "has 330 pieces and none for the id 330" in said and "Gemma's own" in said


def test_a_missing_file_is_asked_for(tmp_path: Path) -> None:
    assert "tokenizer.model is missing" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    said = refusal(tmp_path)
    assert "has tokenizer.json and no tokenizer.model" in said
    assert "google/paligemma" in said


@pytest.mark.parametrize("content", [b"", b"{}", b"\n" * 50, b"version https://git-lfs", bytes(99)])
def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert "is no SentencePiece model" in refusal(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_model_is_refused(folder: Path, model: bytes, share: float) -> None:
    (folder / "tokenizer.model").write_bytes(model[: int(len(model) * share)])
    refusal(folder)


# Ids of Gemma's vocabulary, between <bos> and the newline that the layout adds.
GEMMA = {
    "": [],
    "caption en": [21209, 659],
    "answer en Where is the cow standing?": [13072, 659, 7890, 603, 573, 13910, 9980, 235336],
    "detect cat ; dog": [39208, 4401, 2161, 5929],
    "  two  spaces ": [139, 9721, 139, 46633, 235248],
    "<loc0001><loc1023> cat ; <loc0000>": [256001, 257023, 4401, 2161, 235248, 256000],
    "segment a dog<seg005>": [32318, 476, 5929, 257029],
    "ünïcode 🐄 x": [5268, 236370, 2564, 235248, 246873, 1141],
    "hello <image> world": [17534, 235248, 257152, 2134],
    "a <unk> b": [235250, 235248, 3, 518],
    "\u2581\u2581\u2581a \u2581\u2581 b": [140, 235250, 235248, 139, 518],
    "\t\tx\t": [255969, 235297, 226],
    "\r\n": [235316, 108],
    "  <b> x": [139, 201, 1141],
    "\x00": [217],
}


@pytest.fixture(scope="module")
def gemma() -> Tokenizer:
    if not (REAL / "tokenizer.model").is_file():
        pytest.skip("Gemma's vocabulary is not at hand")
    return load_tokenizer(REAL, parse_config(paligemma(224)))


@pytest.mark.parametrize("text", GEMMA, ids=ascii)
def test_ids_of_the_real_vocabulary(gemma: Tokenizer, text: str) -> None:
    assert gemma.encode(text) == GEMMA[text]


def test_text_of_the_real_vocabulary(gemma: Tokenizer) -> None:
    assert (gemma.pad_id, gemma.eos_id, gemma.bos_id, gemma.newline_id) == (0, 1, 2, 108)
    assert gemma.decode([8318]) == " beach"
    assert gemma.decode([54901, 1]) == "beach"
    assert gemma.decode([256000, 257151, 257152, 107, 106, 3, 2, 1, 0]) == "<loc0000><seg127>"
    assert gemma.decode([443, 226, 347]) == "\ufffd\t\ufffd"
    assert gemma.decode([300000, 257153, 235248, 5]) == " <2mass>"
    assert gemma.vocab_size == 257153


def test_a_piece_that_is_no_utf8_is_a_damaged_vocabulary(folder: Path, model: bytes) -> None:
    (folder / "tokenizer.model").write_bytes(model.replace(b"<0x41>", b"<0x4\xff>"))
    with pytest.raises(NpvlmError, match="is no SentencePiece model"):
        load_tokenizer(folder, a_config())
    (folder / "tokenizer.model").write_bytes(model.replace(b"<loc0003>", b"<loc000\xff>"))
    with pytest.raises(NpvlmError, match="is no UTF-8"):
        damaged = load_tokenizer(folder, a_config())
        damaged.decode(list(range(damaged.vocab_size)))
