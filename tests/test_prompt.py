"""The layout of a sequence, and text that grows token by token."""

from __future__ import annotations

import pytest

from npvlm.decoding.prompt import TextStream, layout


class Bytes:
    """A tokenizer whose ids are bytes; those of ASCII are whole characters, and 0 says nothing."""

    bos_id, newline_id, image_id = 2, 10, 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def is_whole(self, token_id: int) -> bool:
        return 0 < token_id < 128

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i).decode(errors="replace")


def test_pictures_come_first_then_bos_the_prompt_and_one_newline() -> None:
    assert layout(Bytes(), "hi", 3).tolist() == [1, 1, 1, 2, 104, 105, 10]
    assert layout(Bytes(), "", 1).tolist() == [1, 2, 10]


def test_spaces_at_the_end_of_a_prompt_are_kept() -> None:
    assert layout(Bytes(), "a ", 0).tolist() == [2, 97, 32, 10]


@pytest.mark.parametrize("prompt", ["a\nb", "a\nb\n", "a\nb\n\n\n"])
def test_only_trailing_newlines_are_dropped(prompt: str) -> None:
    assert layout(Bytes(), prompt, 0).tolist() == [2, 97, 10, 98, 10]


def test_a_stream_holds_bytes_back_until_their_run_ends() -> None:
    stream = TextStream(Bytes())
    pieces = [stream.add(byte) for byte in "a€b".encode()]
    assert pieces == ["a", "", "", "", "€b"]
    assert stream.finish() == ""


def test_a_token_that_says_nothing_does_not_end_a_run_of_bytes() -> None:
    stream = TextStream(Bytes())
    assert [stream.add(byte) for byte in b"\xe2\0\x82\xacA"] == ["", "", "", "", "€A"]


def test_a_stream_gives_up_what_never_became_whole() -> None:
    stream = TextStream(Bytes())
    assert [stream.add(byte) for byte in b"x\xe2\x82"] == ["x", "", ""]
    assert stream.finish() == "\ufffd"
