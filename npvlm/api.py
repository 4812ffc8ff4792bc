"""The public face: load a model, then ask it about pictures.

Axis letters: T tokens of a sequence · P patches of a picture · D width of the decoder ·
V vocabulary.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from npvlm.answers.attention import AttentionTap
from npvlm.answers.explaining import words_of
from npvlm.answers.explanation import METHODS, Explanation
from npvlm.answers.occlusion import occlude
from npvlm.answers.reading import read_answer
from npvlm.config import PRECISIONS, Config, read_config
from npvlm.decoding.generate import Token, generate, logits
from npvlm.decoding.prompt import TextStream, layout
from npvlm.decoding.sampling import Chooser, Sampling, draw_seed
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.checkpoint import open_checkpoint
from npvlm.files.packed import at_precision
from npvlm.files.pictures import Preprocessor, open_picture, pixel_values, read_preprocessor
from npvlm.files.tokenizer import Tokenizer, load_tokenizer
from npvlm.model import ops as definitions
from npvlm.model import paligemma
from npvlm.model.ops import Index
from npvlm.model.tap import Tap, closed
from npvlm.model.weights import PACKERS, Array, Packer, Weights

Picture = str | Path | BinaryIO | Image.Image

BUNDLED = Path(__file__).parent / "bundled"
# Sequences answered together, and prefix tokens read together: more would be faster still, but the
# first answer is there only when all are, and a prefill takes memory for every token.
PACKED_SEQUENCES, PACKED_TOKENS = 8, 4096


# One computation at a time: several Python threads may not start parallel kernels at once.
_COMPUTING = threading.Lock()


def load(model: str | Path = "shapes", precision: str | None = None, ops: str = "kernels") -> Model:
    """Open a model. Weights are memory-mapped: nothing is read before it is needed.

    Parameters
    ----------
    model : the name of a bundled model ("shapes") or a checkpoint folder with config.json,
        *.safetensors, tokenizer.model and preprocessor_config.json as published
    precision : "float32" (float32 arithmetic on weights as stored), "bfloat16", "int8" or "int4";
        by default what `npvlm convert` packed the folder for, float32 for any other. Weights that
        are not stored so are rounded or packed in memory, which takes time and room
    ops : "kernels", or "numpy" for the definitions in plain NumPy

    Raises
    ------
    UsageError
        For a precision or ops that there is not, or a precision the folder was not packed for.
    NpvlmError
        In one sentence: what is missing or wrong in the folder.
    """
    folder = find_folder(model)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config)
    if not config.eos_token_ids:
        config = replace(config, eos_token_ids=(tokenizer.eos_id,))
    preprocessor = read_preprocessor(folder, config)
    weights, precision, namespace = open_weights(folder, config, precision, ops)
    return Model(str(model), config, weights, tokenizer, preprocessor, precision, namespace)


def open_weights(
    folder: Path, config: Config, precision: str | None, ops: str
) -> tuple[Weights, str, ModuleType]:
    """The weights of a folder as a precision computes with them, its name, and what computes.

    Parameters and errors are those of `load`.
    """
    precision = _precision(folder, config, precision)
    namespace, packers = _namespace(ops)
    stored = open_checkpoint(folder, config)
    weights = stored if config.quantization else at_precision(stored, precision, packers)
    return Weights(weights), precision, namespace


def _namespace(ops: str) -> tuple[ModuleType, Mapping[str, Packer]]:
    """What to compute with and what to pack with; numba is imported only by those who use it."""
    if ops == "numpy":
        return definitions, PACKERS
    if ops == "kernels":
        from npvlm import kernels
        from npvlm.kernels import packing

        return kernels, packing.PACKERS
    raise UsageError(f'ops is {ops!r}, expected "kernels" or "numpy".')


def find_folder(model: str | Path) -> Path:
    """The folder of a model: a bundled one by its name, else the checkpoint folder itself."""
    bundled = sorted(path.name for path in BUNDLED.iterdir() if (path / "config.json").is_file())
    folder = BUNDLED / model if str(model) in bundled else Path(model).expanduser()
    try:
        found = folder.is_dir() and str(model) != ""
    except OSError:  # a name too long for a file
        found = False
    if not found:
        raise NpvlmError(
            f"{str(model)!r} is no model; expected a checkpoint folder (npvlm downloads nothing) "
            f"or one of the bundled models ({', '.join(bundled)})."
        )
    return folder


def _precision(folder: Path, config: Config, asked: str | None) -> str:
    """What a folder is computed with: what is asked for, if there is that and it fits."""
    if asked is not None and asked not in PRECISIONS:
        raise UsageError(f"precision is {asked!r}, expected one of {', '.join(PRECISIONS)}.")
    packed = config.quantization
    if packed and asked not in (packed, None):
        raise UsageError(
            f"{folder} is packed for {packed}, expected {asked}; name the original checkpoint."
        )
    return packed or asked or "float32"


@dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds of the packed call that gave an answer, by part."""

    image: float
    prefill: float
    decode: float


@dataclass(frozen=True)
class Answer:
    """What the model says about a picture (or several at once), and how sure it was.

    image : the picture as it was given, a list where one was given
    prompt : as it was given
    text : the answer without special tokens
    token_ids : every generated id, an eos that ended it included
    logprobs : for each of them the natural logarithm of the model's own probability, after the
        soft-cap and before temperature and filters
    prompt_token_ids : everything the decoder read, image ids included
    stop : "eos" or "length"
    model : the model as it was named
    precision : "float32", "bfloat16", "int8" or "int4"
    seed : of the random draws; None where the answer is greedy
    seconds : of the packed call that this answer was part of
    """

    image: str | list[str]
    prompt: str
    text: str
    token_ids: list[int]
    logprobs: list[float]
    prompt_token_ids: list[int]
    stop: str
    model: str
    precision: str
    seed: int | None
    seconds: Seconds

    def to_json(self) -> str:
        """One line of JSON with these fields, from which every number reads back the same."""
        text = json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8", "backslashreplace").decode()  # as JSON escapes such bytes


@dataclass(frozen=True)
class Piece:
    """Text that an answer has grown by; `index` counts the answers of the call."""

    index: int
    text: str


@dataclass
class _Sequence:
    """One answer in the making."""

    index: int
    image: str | list[str]
    pictures: list[Picture]
    prompt: str
    ids: Index
    chooser: Chooser
    text: TextStream
    tokens: list[Token] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Model:
    """An opened checkpoint: its config, memory-mapped weights, tokenizer and picture settings."""

    name: str
    config: Config
    weights: Weights = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    preprocessor: Preprocessor
    precision: str
    ops: ModuleType = field(repr=False)

    def generate(
        self,
        images: Picture | Sequence[Picture | Sequence[Picture]],
        prompts: str | Sequence[str],
        *,
        max_tokens: int = 100,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> list[Answer]:
        """Answer prompts about pictures, several sequences packed into one call.

        Parameters
        ----------
        images : one picture, or one per answer; a list in its place puts several pictures in front
            of one prompt. A picture is a path, an open binary file or a PIL image
        prompts : one for all pictures, or one for each
        max_tokens : most tokens of an answer, 1 or more
        temperature, top_k, top_p : greedy unless one is given; temperature 0 is greedy always
        seed : of every answer's own random generator; drawn where none is given

        Returns
        -------
        One Answer for each, in order.

        Raises
        ------
        UsageError
            For numbers out of range, or prompts and pictures whose counts differ.
        NpvlmError
            For a picture that cannot be read.
        """
        sampling = Sampling(temperature, top_k, top_p)
        events = self.events(images, prompts, sampling, max_tokens=max_tokens, seed=seed)
        return [event for event in events if isinstance(event, Answer)]

    def stream(
        self,
        image: Picture | Sequence[Picture],
        prompt: str,
        *,
        max_tokens: int = 100,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Yield one answer as it is written, in pieces that join to its text.

        Parameters are those of `generate`, for one picture, or several in front of one prompt.
        """
        sampling = Sampling(temperature, top_k, top_p)
        for event in self.events([image], prompt, sampling, max_tokens=max_tokens, seed=seed):
            if isinstance(event, Piece):
                yield event.text

    def logits(
        self, images: Picture | Sequence[Picture], prompt: str, answer_ids: Sequence[int]
    ) -> NDArray[np.float32]:
        """Score a whole sequence in one pass: row t says what may follow token t.

        Parameters
        ----------
        images : a picture, or several in front of the one prompt
        answer_ids : tokens behind the prompt, possibly none

        Returns
        -------
        logits [T, V], float32, after the soft-cap, for image tokens, prompt and answer
        """
        answer = np.array(answer_ids, np.int64)
        vocabulary = self.config.text_config.vocab_size
        if answer.ndim != 1 or np.any((answer < 0) | (answer >= vocabulary)):
            raise UsageError(f"answer_ids must be a list of ids from 0 to {vocabulary - 1}.")
        pictures = _as_list(images)
        ids = self._layout(prompt, len(pictures), len(answer))
        features = self._features(pictures).reshape(-1, self.config.text_config.hidden_size)
        w, config = self.weights, self.config
        with _COMPUTING:
            return logits(ids, answer, features, w, config, ops=self.ops, tap=closed)

    def explain(
        self,
        image: Picture,
        prompt: str,
        *,
        answer: str | None = None,
        method: str = "attention",
        max_tokens: int = 100,
        tell: Callable[[int, int], None] = lambda done, of: None,
    ) -> Explanation:
        """Say for each word of an answer which parts of the picture it has to do with.

        Parameters
        ----------
        answer : the words to explain; by default what the model says by itself, greedily
        method : "attention", where the model looked; or "occlusion", what it needs: one run for
            each of 64 parts of the picture that are covered in turn
        max_tokens : most tokens of the model's own answer
        tell : is told how many runs of "occlusion" are done, and of how many

        Raises
        ------
        UsageError
            For a method that there is not, or an answer that is no text to explain.
        NpvlmError
            For a picture that cannot be read, or a model that answers nothing.
        """
        if method not in METHODS:
            raise UsageError(f"method is {method!r}, expected one of {', '.join(METHODS)}.")
        picture = open_picture(image)
        ids = self._explained_ids(picture, prompt, answer, max_tokens)
        prefix, pixels = self._layout(prompt, 1, len(ids)), pixel_values(picture, self.preprocessor)

        def read(pixels: Array, tap: Tap = closed) -> NDArray[np.float64]:
            w, config = self.weights, self.config
            with _COMPUTING:
                seen = paligemma.image_features(pixels[None], w, config, ops=self.ops, tap=closed)
                return read_answer(prefix, np.array(ids), seen[0], w, config, ops=self.ops, tap=tap)

        patches, layers = self.config.vision_config.num_patches, []
        if method == "attention":
            watch = AttentionTap(self.config.text_config, len(prefix), len(ids), patches)
            logprobs = read(pixels, watch)
            heats, layers = watch.mean(), list(watch.layers)
        else:
            logprobs = read(pixels)
            heats = occlude(pixels, math.isqrt(patches), read, logprobs, tell)
        return Explanation(
            image=_name(image),
            picture=picture,
            prompt=prompt,
            answer=self.tokenizer.decode(ids),
            own=answer is None,
            model=self.name,
            precision=self.precision,
            method=method,
            layers=layers,
            words=words_of(self.tokenizer, ids, logprobs, heats, method),
        )

    def _explained_ids(
        self, picture: Image.Image, prompt: str, answer: str | None, max_tokens: int
    ) -> list[int]:
        """The ids of the words to explain: given ones, or the model's own without its eos."""
        if answer is not None:
            ids = self.tokenizer.encode(answer)
            if self.tokenizer.image_id in ids or not answer.strip():
                raise UsageError(f"answer is {answer!r}, expected words without <image>.")
            return ids
        own = self.generate(picture, prompt, max_tokens=max_tokens)[0]
        ids = own.token_ids[:-1] if own.stop == "eos" else own.token_ids
        if not own.text.strip():
            raise NpvlmError(
                f"the model answers nothing to {prompt!r}; give the words to explain, or another "
                "prompt."
            )
        return ids

    def events(
        self,
        images: Picture | Sequence[Picture | Sequence[Picture]],
        prompts: str | Sequence[str],
        sampling: Sampling,
        *,
        max_tokens: int = 100,
        seed: int | None = None,
    ) -> Iterator[Piece | Answer]:
        """Everything `generate` does, as it happens: pieces of text, then the answers in order.

        Pictures are read when their turn comes, so any number of them fits in memory.
        """
        for name, number in (("max_tokens", max_tokens), ("seed", seed)):
            if type(number) is not int and (name, number) != ("seed", None):
                raise UsageError(f"{name} is {number!r}, expected a whole number.")
        if max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}, expected 1 or more.")
        if seed is not None and seed < 0:
            raise UsageError(f"seed is {seed}, expected 0 or a larger whole number.")
        if sampling.greedy:
            seed = None
        elif seed is None:
            seed = draw_seed()
        entries = _as_list(images)
        prompts = [prompts] * len(entries) if isinstance(prompts, str) else list(prompts)
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise UsageError("prompts hold something that is no text, expected one or several.")
        if len(prompts) != len(entries):
            raise UsageError(
                f"{len(prompts)} prompts for {len(entries)} pictures; expected one prompt for "
                "all, or one for each."
            )
        sequences = []
        for index, (entry, prompt) in enumerate(zip(entries, prompts, strict=True)):
            pictures = _as_list(entry)
            sequence = _Sequence(
                index=index,
                image=_name(entry) if _is_one(entry) else [_name(p) for p in pictures],
                pictures=pictures,
                prompt=prompt,
                ids=self._layout(prompt, len(pictures), max_tokens),
                chooser=Chooser(sampling, seed, ops=self.ops),
                text=TextStream(self.tokenizer),
            )
            sequences.append(sequence)
        for pack in _packs(sequences):
            yield from self._answer(pack, max_tokens, seed)

    def _answer(
        self, pack: list[_Sequence], max_tokens: int, seed: int | None
    ) -> Iterator[Piece | Answer]:
        """Run one packed call."""
        began = time.perf_counter()
        features = self._features([picture for s in pack for picture in s.pictures])
        features = features.reshape(-1, self.config.text_config.hidden_size)
        seen = time.perf_counter()

        steps = generate(
            [s.ids for s in pack],
            features,
            self.weights,
            self.config,
            [s.chooser for s in pack],
            max_tokens,
            ops=self.ops,
            tap=closed,
        )
        prefilled = None
        while True:
            with _COMPUTING:
                tokens = next(steps, None)
            if tokens is None:
                break
            prefilled = prefilled or time.perf_counter()
            for token in tokens:
                sequence = pack[token.sequence]
                sequence.tokens.append(token)
                if text := sequence.text.add(token.id):
                    yield Piece(sequence.index, text)
        done = time.perf_counter()

        seconds = Seconds(seen - began, (prefilled or done) - seen, done - (prefilled or done))
        for sequence in pack:
            if text := sequence.text.finish():
                yield Piece(sequence.index, text)
            yield self._finished(sequence, seed, seconds)

    def _finished(self, sequence: _Sequence, seed: int | None, seconds: Seconds) -> Answer:
        ids = [token.id for token in sequence.tokens]
        return Answer(
            image=sequence.image,
            prompt=sequence.prompt,
            text=self.tokenizer.decode(ids),
            token_ids=ids,
            logprobs=[token.logprob for token in sequence.tokens],
            prompt_token_ids=sequence.ids.tolist(),
            stop="eos" if ids[-1] in self.config.eos_token_ids else "length",
            model=self.name,
            precision=self.precision,
            seed=seed,
            seconds=seconds,
        )

    def _features(self, pictures: Sequence[Picture]) -> Array:
        """Image features [N, P, D]; a picture that comes several times is looked at once."""
        distinct = {_key(picture): picture for picture in pictures}
        pixels = np.stack([self._pixels(picture) for picture in distinct.values()])
        with _COMPUTING:
            features = paligemma.image_features(
                pixels, self.weights, self.config, ops=self.ops, tap=closed
            )
        place = {key: i for i, key in enumerate(distinct)}
        return features[[place[_key(picture)] for picture in pictures]]

    def _pixels(self, picture: Picture) -> NDArray[np.float32]:
        rgb = open_picture(picture)
        return pixel_values(rgb, self.preprocessor)

    def _layout(self, prompt: str, pictures: int, answer: int) -> Index:
        """The ids of one sequence; a typed `<image>` is dropped, the pictures come first anyway."""
        if pictures == 0:
            raise UsageError("PaliGemma needs a picture for every prompt; none was given.")
        text, _ = self.tokenizer.strip_image_marks(prompt)
        ids = layout(self.tokenizer, text, pictures * self.config.vision_config.num_patches)
        most = self.config.text_config.max_position_embeddings
        if len(ids) + answer > most:
            raise UsageError(
                f"{len(ids)} tokens of pictures and prompt and {answer} of the answer are too "
                f"many, expected at most {most} together (max_position_embeddings of config.json)."
            )
        return ids


def _is_one(value: Any) -> bool:
    """Whether this is one picture, not several."""
    return isinstance(value, (str, Path, Image.Image)) or hasattr(value, "read")


def _as_list(value: Any) -> list[Any]:
    """One picture or several, as a list."""
    if _is_one(value):
        return [value]
    if isinstance(value, Iterable) and not hasattr(value, "__array__"):
        return list(value)
    kind = type(value).__name__
    raise UsageError(f"a picture is of type {kind}, expected a path, an open file or a PIL image.")


def _key(picture: Picture) -> str | int:
    """The same for the same picture: its path, or the identity of one in memory."""
    return str(picture) if isinstance(picture, (str, Path)) else id(picture)


def _name(picture: Picture) -> str:
    """How an answer calls its picture."""
    if isinstance(picture, (str, Path)):
        return str(picture)
    return str(getattr(picture, "filename", "") or getattr(picture, "name", ""))


def _packs(sequences: list[_Sequence]) -> Iterator[list[_Sequence]]:
    """Neighbours that are few enough and fit together; one alone may be longer."""
    pack: list[_Sequence] = []
    for sequence in sequences:
        tokens = sum(len(s.ids) for s in [*pack, sequence])
        if pack and (len(pack) == PACKED_SEQUENCES or tokens > PACKED_TOKENS):
            yield pack
            pack = []
        pack.append(sequence)
    if pack:
        yield pack
