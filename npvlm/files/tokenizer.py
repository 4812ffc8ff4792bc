"""Text to token ids and back: a SentencePiece vocabulary and the tokens added to it.

Ids are looked up by piece, never written as numbers: another vocabulary has others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from npvlm.config import Config, read_json, read_small
from npvlm.errors import NpvlmError, UsageError

IMAGE = "<image>"

# Pieces that structure a sequence and are no part of what it says.
_SILENT = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>", IMAGE)
_NEEDED = {"bos_id": "<bos>", "eos_id": "<eos>", "pad_id": "<pad>", "newline_id": "\n"}
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_HALVES = re.compile("[\ud800-\udfff]")  # of characters: JSON can write one alone
_TAB = "<0x09>"
_SPACE = "\u2581"
_LONGEST_RUN = 31
_LARGEST = 2**25  # bytes of a vocabulary; Gemma's has 4.2 million
_PLACES = (*(f"<loc{i:04d}>" for i in range(1024)), *(f"<seg{i:03d}>" for i in range(128)))


class Tokenizer:
    """A vocabulary: `encode` text, `decode` ids, and the ids that have a meaning of their own.

    Attributes
    ----------
    bos_id, eos_id, pad_id, newline_id, image_id : int
    vocab_size : int
        One more than the highest id that has a piece.
    """

    def __init__(
        self, pieces: SentencePieceProcessor, added: dict[str, int], config: Config
    ) -> None:
        self._pieces = pieces
        self._count = len(pieces)
        self._added = added
        self._added_pieces = {token_id: piece for piece, token_id in added.items()}
        self._cut = re.compile(f"({'|'.join(re.escape(p) for p in _longest_first(added))})")
        self.bos_id = self._id_of("<bos>")
        self.eos_id = self._id_of("<eos>")
        self.pad_id = self._id_of("<pad>")
        self.newline_id = self._id_of("\n")
        self.image_id = config.image_token_index
        self.vocab_size = max(self._count, *(i + 1 for i in added.values()))
        self._silent = {self._id_of(piece) for piece in _SILENT if self._has(piece)}

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids, with nothing put in front or behind.

        `<loc0000>`, `<seg000>`, `<image>` and `<unk>` are single ids; a typed `<bos>`, `<eos>` or
        `<pad>` is plain text, so that a prompt cannot end the sequence it stands in. More than 31
        spaces in a row go as SentencePiece has them, the longest run first.

        Raises
        ------
        UsageError
            The text holds something that is no character, as arguments that are no UTF-8 do.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UsageError(
                f"the text is no UTF-8 at character {error.start + 1}, "
                f"after {text[: error.start][-20:]!r}; type it in UTF-8"
            ) from None
        ids: list[int] = []
        for i, part in enumerate(self._cut.split(text)):  # plain, added, plain, added, ..., plain
            if i % 2:
                ids.append(self._added[part])
            elif part:
                ids.extend(self._pieces.encode(part))
        return ids

    def decode(self, ids: list[int]) -> str:
        """Turn token ids into text, a leading space included.

        Ids without a piece and those that only structure a sequence (`<eos>`, `<image>`, ...) say
        nothing. Byte pieces in a row are one piece of UTF-8; where they are none, each is a
        replacement character.
        """
        text = []
        held = bytearray()
        for token_id in ids:
            piece = self._said(token_id)
            if not piece:
                continue
            if _is_byte(piece):
                held.append(int(piece[3:5], 16))
                continue
            text.append(_characters(held))
            held.clear()
            text.append("\t" if piece == _TAB else piece.replace(_SPACE, " "))
        return "".join(text) + _characters(held)

    def is_whole(self, token_id: int) -> bool:
        """Tell whether an id says whole characters: neither one byte of one, nor nothing."""
        piece = self._said(token_id)
        return bool(piece) and not _is_byte(piece)

    def piece(self, token_id: int) -> str:
        """Return the piece of an id as the vocabulary spells it, or "" where it has none."""
        if token_id in self._added_pieces:
            return self._added_pieces[token_id]
        if 0 <= token_id < self._count:
            return _piece(self._pieces, int(token_id))
        return ""

    def strip_image_marks(self, text: str) -> tuple[str, int]:
        """Take every `<image>` out of a text and count them: where pictures go is fixed."""
        count = 0
        while IMAGE in text:  # taking one out may join the halves of another
            count += text.count(IMAGE)
            text = text.replace(IMAGE, "")
        return text, count

    def _said(self, token_id: int) -> str:
        """The piece of an id, or "" where it says nothing."""
        return "" if token_id in self._silent else self.piece(token_id)

    def _has(self, piece: str) -> bool:
        return piece in self._added or _piece_id(self._pieces, piece) is not None

    def _id_of(self, piece: str) -> int:
        found = self._added.get(piece, _piece_id(self._pieces, piece))
        assert found is not None  # load_tokenizer saw to it
        return found


def load_tokenizer(folder: Path, config: Config) -> Tokenizer:
    """Read a model's vocabulary: tokenizer.model, and the tokens that other files add to it.

    Parameters
    ----------
    folder : Path
        Holds tokenizer.model; added_tokens.json and tokenizer_config.json where there are any.
    config : Config
        Says which id `<image>` has and how many rows the embedding table has.

    Returns
    -------
    Tokenizer

    Raises
    ------
    NpvlmError
        No vocabulary, none of SentencePiece, or one that does not belong to the model.
    """
    pieces = _read_pieces(folder)
    added = _read_added(folder, pieces)
    return _fitted(folder / "tokenizer.model", pieces, added, config, folder)


def complete_tokenizer(path: Path, config: Config) -> Tokenizer:
    """Read a vocabulary that lies alone, with what `tokens_to_add` says that it lacks.

    Raises
    ------
    NpvlmError
        As `load_tokenizer` does.
    """
    pieces, added = _parse(path), dict[str, int]()
    for piece, token_id in tokens_to_add(path, config).items():
        _add(added, pieces, piece, token_id, path)
    return _fitted(path, pieces, added, config, path)


def _fitted(
    path: Path,
    pieces: SentencePieceProcessor,
    added: dict[str, int],
    config: Config,
    place: Path,
) -> Tokenizer:
    """A tokenizer whose ids are those of the model; `place` is where all its files are."""
    rows = config.text_config.vocab_size
    if len(pieces) > rows:
        raise NpvlmError(
            f"{path} has {len(pieces)} pieces, expected at most {rows}, the vocab_size of "
            "config.json; is it the tokenizer of another model?"
        )
    missing = [piece for piece in _NEEDED.values() if _piece_id(pieces, piece) is None]
    if missing:
        named = ", ".join("a newline" if piece == "\n" else piece for piece in missing)
        raise NpvlmError(f"{path} has no piece for {named}; is it the tokenizer of another model?")

    image_id = config.image_token_index
    known = set(added.values())
    unknown = next((i for i in range(len(pieces), image_id) if i not in known), None)
    if unknown is not None:
        raise NpvlmError(
            f"{path} has {len(pieces)} pieces and none for the id {unknown}, expected one for "
            f"each below {image_id}, the image_token_index of config.json; take the "
            "tokenizer.model that was published with this PaliGemma (Gemma's own has fewer)"
        )
    return Tokenizer(pieces, _with_own(added, pieces, config, place), config)


def piece_ids(
    folder: Path, pieces: Iterable[str], name: str = "tokenizer.model"
) -> tuple[int, dict[str, int | None]]:
    """Count the pieces of a vocabulary and look some up, whatever model they are for.

    Tokens that other files add are found too; what no file names has None.

    Raises
    ------
    NpvlmError
        No vocabulary, or none of SentencePiece.
    """
    own = _read_pieces(folder, name)
    added = _read_added(folder, own)
    return len(own), {piece: added.get(piece, _piece_id(own, piece)) for piece in pieces}


def tokens_to_add(path: Path, config: Config) -> dict[str, int]:
    """Which tokens a vocabulary lacks that a model has, and their ids.

    `<image>` is in no published vocabulary. Gemma's own has no locations and segments either; they
    follow its pieces in the order of their numbers.

    Raises
    ------
    NpvlmError
        No such file, or no vocabulary.
    """
    if not path.is_file():
        raise NpvlmError(f"{path} is no file, expected a SentencePiece model")
    pieces, added = _parse(path), {IMAGE: config.image_token_index}
    if len(pieces) + len(_PLACES) == config.image_token_index:
        added |= {piece: len(pieces) + i for i, piece in enumerate(_PLACES)}
    return added


def _read_pieces(folder: Path, name: str = "tokenizer.model") -> SentencePieceProcessor:
    path = folder / name
    if not path.is_file():
        if (folder / "tokenizer.json").is_file():
            raise NpvlmError(
                f"{folder} has tokenizer.json and no tokenizer.model, which npvlm reads; it is "
                "published beside the other files of every google/paligemma repository"
            )
        raise NpvlmError(f"{path} is missing; copy it from where the model was published")
    return _parse(path)


def _parse(path: Path) -> SentencePieceProcessor:
    content = read_small(path, _LARGEST)
    pieces = SentencePieceProcessor()
    try:
        if not content or not pieces.LoadFromSerializedProto(content):
            raise RuntimeError
    except (RuntimeError, UnicodeDecodeError):  # its own reasons may quote what is no UTF-8
        raise NpvlmError(f"{path} is no SentencePiece model; copy it again") from None
    return pieces


def _read_added(folder: Path, pieces: SentencePieceProcessor) -> dict[str, int]:
    """Collect the tokens that files beside tokenizer.model add to it."""
    added: dict[str, int] = {}
    path = folder / "added_tokens.json"
    if path.exists():
        for piece, token_id in read_json(path).items():
            _add(added, pieces, piece, token_id, path)
    path = folder / "tokenizer_config.json"
    listed = read_json(path).get("added_tokens_decoder") if path.exists() else None
    if isinstance(listed, dict):
        for key, entry in listed.items():
            token_id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else None
            entry = entry if isinstance(entry, dict) else {}
            new = _add(added, pieces, entry.get("content"), token_id, path)
            if new and any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
                raise NpvlmError(
                    f"{path} adds {entry['content']!r} with lstrip, rstrip or single_word, "
                    "expected none of them: npvlm matches added tokens exactly as they are spelled"
                )
    return added


def _add(
    added: dict[str, int], pieces: SentencePieceProcessor, piece: Any, token_id: Any, path: Path
) -> bool:
    """Note an added token, and tell whether it is anything that the pieces do not have."""
    fine = isinstance(piece, str) and piece and not _HALVES.search(piece)
    if not fine or type(token_id) is not int or token_id < 0:
        raise NpvlmError(f"{path} lists {str(piece)[:40]!r}, expected tokens with their ids")
    if _piece_id(pieces, piece) == token_id:
        return False
    if added.setdefault(piece, token_id) != token_id:
        raise NpvlmError(
            f"{path} gives {piece!r} the id {token_id}, expected {added[piece]}, "
            "its id in added_tokens.json"
        )
    return True


def _with_own(
    added: dict[str, int], pieces: SentencePieceProcessor, config: Config, place: Path
) -> dict[str, int]:
    """Check the added tokens against the model, and add those that go by rule."""
    image_id, rows = config.image_token_index, config.text_config.vocab_size
    known = added.get(IMAGE, _piece_id(pieces, IMAGE))
    if known is not None and known != image_id:
        raise NpvlmError(
            f"{place}: {IMAGE} has the id {known} in the tokenizer's files and {image_id} as "
            "image_token_index of config.json, expected the same; which model is each from?"
        )
    if known is None and image_id < len(pieces):
        raise NpvlmError(
            f"{place}: image_token_index of config.json is {image_id}, expected the id of "
            f"{IMAGE}, but tokenizer.model has {_piece(pieces, image_id)!r} there; "
            "is it the tokenizer of another model?"
        )
    beyond = sorted(piece for piece, i in added.items() if i >= rows and piece != IMAGE)
    if beyond:
        raise NpvlmError(
            f"{place}: the id of the added token {beyond[0]!r} is {added[beyond[0]]}, expected "
            f"less than {rows}, the vocab_size of config.json"
        )
    own = {IMAGE: image_id}
    if pieces.unk_id() >= 0:
        own[_piece(pieces, pieces.unk_id())] = pieces.unk_id()
    # Typed marks of a space are matched as they stand; spaces become marks later and merge.
    for run in range(2, _LONGEST_RUN + 1):
        if (found := _piece_id(pieces, _SPACE * run)) is not None:
            own[_SPACE * run] = found
    return own | added


def _piece_id(pieces: SentencePieceProcessor, piece: str) -> int | None:
    """Return a piece's id, or None where the vocabulary has no such piece."""
    found = int(pieces.piece_to_id(piece))
    return found if found >= 0 and _piece(pieces, found) == piece else None


def _piece(pieces: SentencePieceProcessor, token_id: int) -> str:
    """The piece of an id; one that is no UTF-8 is a damaged vocabulary's."""
    try:
        return str(pieces.id_to_piece(token_id))
    except UnicodeDecodeError:
        raise NpvlmError(
            f"the piece of the id {token_id} in tokenizer.model is no UTF-8; copy the file again"
        ) from None


def _is_byte(piece: str) -> bool:
    """Tell whether a piece is one byte of a character.

    The tab is not, although it is spelled so: in the published vocabularies it is the character
    itself, and ends a run of bytes.
    """
    return piece != _TAB and _BYTE.fullmatch(piece) is not None


def _characters(held: bytearray) -> str:
    """Read bytes as UTF-8, or as one replacement character each where they are none."""
    try:
        return held.decode("utf-8")
    except UnicodeDecodeError:
        return "\ufffd" * len(held)


def _longest_first(added: dict[str, int]) -> list[str]:
    return sorted(added, key=len, reverse=True)
