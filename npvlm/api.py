"""The public face: load a model, then ask it about pictures.

Axis letters: T tokens of a sequence · P patches of a picture · D width of the decoder ·
V vocabulary.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from npvlm.answers import states, tasks
from npvlm.answers.answer import Answer, Seconds
from npvlm.answers.attention import AttentionTap
from npvlm.answers.boxes import BINS, Box
from npvlm.answers.confidence import PlaceWatch, locations
from npvlm.answers.detection import Detection, read_detection
from npvlm.answers.explaining import words_of
from npvlm.answers.explanation import METHODS, Explanation
from npvlm.answers.occlusion import occlude
from npvlm.answers.reading import read_answer
from npvlm.answers.scores import Scores, candidates
from npvlm.asked import (
    Failed,
    Seen,
    Shown,
    as_list,
    check_picture,
    check_text,
    check_whole,
    key_of,
    layers_of,
    name_of,
    names_of,
    pairs_of,
    texts_of,
)
from npvlm.computing import TURNS
from npvlm.config import Config
from npvlm.decoding.beams import beam_search
from npvlm.decoding.generate import generate, logits
from npvlm.decoding.prompt import TextStream, layout
from npvlm.decoding.sampling import Chooser, Sampling, draw_seed
from npvlm.decoding.score import score
from npvlm.errors import NpvlmError, UsageError
from npvlm.files.adapters import Adapter, open_adapter
from npvlm.files.checkpoint import fit_rows
from npvlm.files.masks import find_mask_decoder, open_mask_decoder
from npvlm.files.memory import check_memory
from npvlm.files.needs import run_bytes
from npvlm.files.pictures import (
    Preprocessor,
    open_picture,
    pixel_values,
)
from npvlm.files.tokenizer import Tokenizer, load_tokenizer
from npvlm.model import paligemma, vqvae
from npvlm.model.ops import Index
from npvlm.model.tap import Tap, closed
from npvlm.model.weights import Array, Weights
from npvlm.opening import find_place, open_weights, read_picture_settings, read_vocabulary
from npvlm.packs import PACKED_TOKENS, Prepared, Started, UntilError, packs_of, read_ahead

MOST_BEAMS = 100  # each has keys and values of its own, and a row of scores

__all__ = [
    "Answer",
    "Box",
    "Detection",
    "Explanation",
    "Failed",
    "Model",
    "Piece",
    "Scores",
    "Seconds",
    "Seen",
    "load",
]


def load(
    model: str | Path = "shapes",
    precision: str | None = None,
    ops: str = "kernels",
    adapter: str | Path | None = None,
) -> Model:
    """Open a model. Weights are memory-mapped: nothing is read before it is needed.

    Parameters
    ----------
    model : the name of a bundled model ("shapes"), a checkpoint folder with config.json,
        *.safetensors, tokenizer.model and preprocessor_config.json as published, what
        `npvlm fetch` has brought, by its name ("paligemma-3b-mix-224", "OWNER/NAME@REVISION"), or
        an .npz file of big_vision beside a tokenizer.model, whose weights go into memory
    precision : "float32" (float32 arithmetic on weights as stored), "bfloat16", "int8" or "int4";
        by default what `npvlm convert` packed the folder for, float32 for any other. Weights that
        are not stored so are rounded or packed in memory, which takes time and room
    ops : "kernels", or "numpy" for the definitions in plain NumPy
    adapter : a folder with a LoRA as PEFT saves it. It stays beside the weights, which may be
        packed, and answers name it behind the model: "MODEL+ADAPTER"

    Raises
    ------
    UsageError
        For a precision or ops that there is not, or a precision the folder was not packed for.
    NpvlmError
        In one sentence: what is missing or wrong in the folder, a link in it that leads out of it
        (the hub's cache is no elsewhere), or that packing and one picture take more memory than
        there is. Mapped weights need not fit: they are read again when they are used again.
        A ColPali writes no text: `load_retriever` opens it.
    """
    opened = open_model(model, precision, ops, adapter)
    if opened.config.embedding_dim is not None:
        raise NpvlmError(
            f"{model} is a ColPali, which finds pages and writes no text, expected a PaliGemma; "
            "`npvlm embed` and `npvlm search` take it."
        )
    return opened


def open_model(
    model: str | Path, precision: str | None, ops: str, adapter: str | Path | None = None
) -> Model:
    """Open a PaliGemma, or the PaliGemma that a ColPali is.

    Parameters and errors are those of `load`.
    """
    place = find_place(model)
    config, tokenizer = read_vocabulary(place)
    if not config.eos_token_ids:
        config = replace(config, eos_token_ids=(tokenizer.eos_id,))
    preprocessor = read_picture_settings(place, config)
    opened = open_adapter(Path(adapter).expanduser()) if adapter is not None else None
    weights, precision, namespace = open_weights(place, config, precision, ops, opened)
    fitted = fit_rows(config, weights)
    if fitted != config:
        config, tokenizer = fitted, load_tokenizer(place, fitted)
    read, folder = (tokenizer, preprocessor), place if place.is_dir() else place.parent
    return Model(str(model), folder, config, weights, *read, precision, namespace, opened)


@dataclass(frozen=True)
class Piece:
    """Text that an answer has grown by; `index` counts the answers of the call."""

    index: int
    text: str


@dataclass(frozen=True, eq=False)
class Model:
    """An opened checkpoint: its config, memory-mapped weights, tokenizer and picture settings.

    Any number of threads may ask it at once: they take turns, and each gets the bits that it would
    get alone. Other processes load their own, which costs little: weights that are mapped are in
    memory once. A child that was forked after kernels ran cannot run them, and says so; start
    processes by spawn.
    """

    name: str
    folder: Path
    config: Config
    weights: Weights = field(repr=False)
    tokenizer: Tokenizer = field(repr=False)
    preprocessor: Preprocessor
    precision: str
    ops: ModuleType = field(repr=False)
    adapter: Adapter | None = field(default=None, repr=False)

    @property
    def called(self) -> str:
        """How answers call the model: its name, and that of its adapter."""
        return f"{self.name}+{self.adapter.folder}" if self.adapter else self.name

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied: gigabytes would go from process to process."""
        raise UsageError(
            "a model is not sent to another process, nor copied; call npvlm.load there, with the "
            f"same name ({self.name})."
        )

    def generate(
        self,
        images: Shown | Sequence[Shown | Sequence[Shown]],
        prompts: str | Sequence[str],
        *,
        max_tokens: int = 100,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        beams: int = 1,
    ) -> list[Answer]:
        """Answer prompts about pictures, several sequences packed into one call.

        Parameters
        ----------
        images : one picture, or one per answer; a list in its place puts several pictures in front
            of one prompt. A picture is a path, an open binary file, the bytes of a file, a PIL
            image, a uint8 array (height, width, 3), or what `look` gives
        prompts : one for all pictures, or one for each
        max_tokens : most tokens of an answer, 1 or more
        temperature, top_k, top_p : greedy unless one is given; temperature 0 is greedy always
        seed : of every answer's own random generator, the same for all, so that each can be drawn
            again alone; drawn where none is given. Several draws about one picture need as many
            calls, each with its own seed
        beams : answers that are written side by side, of which the one with the highest mean
            log-probability is given (transformers' num_beams); more than 1 excludes drawing

        Returns
        -------
        One Answer for each, in order.

        Raises
        ------
        UsageError
            For numbers out of range, or prompts and pictures whose counts differ.
        NpvlmError
            For a picture that cannot be read.

        Examples
        --------
        >>> [answer.text for answer in model.generate([picture] * 2, ["caption en", "ocr"])]
        ['a red circle and a blue square and an orange star', '']
        """
        sampling = Sampling(temperature, top_k, top_p)
        events = self.events(
            images, prompts, sampling, max_tokens=max_tokens, seed=seed, beams=beams
        )
        return [event for event in events if isinstance(event, Answer)]

    def stream(
        self,
        image: Shown | Sequence[Shown],
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

        >>> "".join(model.stream(picture, "answer en what color is the star?"))
        'orange'
        """
        sampling = Sampling(temperature, top_k, top_p)
        for event in self.events([image], prompt, sampling, max_tokens=max_tokens, seed=seed):
            if isinstance(event, Piece):
                yield event.text

    def caption(self, image: Shown, lang: str = "en", *, max_tokens: int | None = None) -> Answer:
        """Say what is on a picture. `lang` is a language's code, if the model knows others.

        >>> model.caption(picture).text
        'a red circle and a blue square and an orange star'
        """
        return self._one(image, tasks.caption_prompt(lang), max_tokens)

    def ask(
        self, image: Shown, question: str, lang: str = "en", *, max_tokens: int | None = None
    ) -> Answer:
        """Answer a question about a picture, in the language of `lang`.

        >>> model.ask(picture, "how many circles?").text
        '1'
        """
        return self._one(image, tasks.ask_prompt(question, lang), max_tokens)

    def ocr(self, image: Shown, *, max_tokens: int | None = None) -> Answer:
        """Read the text on a picture.

        >>> model.ocr(picture).text  # nothing is written on this one
        ''
        """
        return self._one(image, tasks.ocr_prompt(), max_tokens)

    def detect(
        self,
        image: Shown,
        labels: str | Sequence[str],
        *,
        max_tokens: int | None = None,
        bins: int = BINS,
    ) -> Detection:
        """Find things on a picture.

        Parameters
        ----------
        labels : what to find: "cat", "cat ; dog", or a list
        max_tokens : most tokens of the answer
        bins : what locations count up to; 1023 for models trained with big_vision's convention

        Examples
        --------
        >>> found = model.detect(picture, "red circle ; orange star")
        >>> [box.label for box in found.boxes]
        ['red circle', 'orange star']
        >>> found.boxes[0].confidence > 0.5
        True
        >>> found.draw("boxes.png")
        """
        return self._find(image, tasks.detect_prompt(labels), max_tokens, bins)

    def segment(
        self,
        image: Shown,
        labels: str | Sequence[str],
        *,
        max_tokens: int | None = None,
        bins: int = BINS,
    ) -> Detection:
        """Find things on a picture, each with its mask. Parameters as `detect`.

        Raises
        ------
        NpvlmError
            Where the model comes without a mask decoder.

        Examples
        --------
        >>> found = model.segment(picture, "red circle")
        >>> found.mask(found.boxes[0]).shape  # of booleans: height, width
        (448, 448)
        >>> found.cut_out(found.boxes[0]).mode
        'RGBA'
        """
        self.mask_decoder  # noqa: B018 (where it is missing, that is said before the work)
        return self._find(image, tasks.segment_prompt(labels), max_tokens, bins)

    def batch(
        self,
        images: Shown | Iterable[Shown],
        prompts: str | Iterable[str],
        *,
        max_tokens: int | None = None,
        bins: int = BINS,
    ) -> Iterator[Answer | Detection | Failed]:
        """Answer about any number of pictures, in their order, as soon as each answer is there.

        Several are answered together, and files are read while the model works: up to two packs of
        eight pictures are taken before the first of them is answered. A picture that is no path is
        read before the next one is asked for, so a buffer may be used again and a file closed. A
        picture that cannot be read gives a Failed in its place, and the rest goes on. Where
        `images` or `prompts` raise something, what came before is answered first.

        Prompts that begin with `detect` or `segment` give a Detection, all others an Answer; each
        is what the picture alone would give, with kernels bit for bit, without them up to rounding.

        Parameters
        ----------
        images : one picture for each answer, or a single one
        prompts : one for all pictures, or one for each
        max_tokens : most tokens of an answer; by default what its task needs
        bins : as in `detect`

        Raises
        ------
        UsageError
            At once for numbers out of range; where it is come to for what is no picture or no text,
            or more prompts than pictures, or fewer.
        NpvlmError
            Where a mask is asked for and the model has no mask decoder.

        Examples
        --------
        >>> for result in model.batch([picture, "absent.png"], "answer en how many stars?"):
        ...     print(getattr(result, "text", None) or result.error)
        1
        absent.png cannot be opened: No such file or directory
        """
        _check_bins(bins)
        if max_tokens is not None:
            check_whole("max_tokens", max_tokens, 1)
            self.ids_of("", 1, max_tokens)  # more than fits behind any prompt
        return self._batch(pairs_of(images, prompts), max_tokens, bins)

    def _batch(
        self, pairs: Iterable[tuple[Shown, str]], max_tokens: int | None, bins: int
    ) -> Iterator[Answer | Detection | Failed]:
        """Answer pack by pack; what ends the pairs early is raised when the rest is answered."""

        def prepare(image: Shown, prompt: str) -> Prepared:
            try:
                self.ids_of(prompt, 1, _limit(max_tokens, prompt))
                if tasks.task_of(prompt) in ("detect", "segment"):
                    tasks.labels_of(prompt)  # that there is none is found before the work
                return self.prepare(image), prompt
            except NpvlmError as error:
                return Failed(name_of(image), prompt, str(error))

        asked = UntilError(self._possible(pairs))
        for pack in read_ahead(asked, prepare):
            yield from self._answer_pack(pack, max_tokens, bins)
        if asked.error:
            raise asked.error

    def _possible(self, pairs: Iterable[tuple[Shown, str]]) -> Iterator[tuple[Shown, str]]:
        """The pairs up to one that is none, or asks for what the model has not."""
        for image, prompt in pairs:
            check_picture(image)
            check_text("a prompt", prompt)
            if tasks.task_of(prompt) == "segment":
                self.mask_decoder  # noqa: B018 (where it is missing, that is said before the work)
            yield image, prompt

    def _answer_pack(
        self, pack: Sequence[Prepared], max_tokens: int | None, bins: int
    ) -> Iterator[Answer | Detection | Failed]:
        """Answer those of a pack that can be answered, and hand on all in their order."""
        asked = [entry for entry in pack if not isinstance(entry, Failed)]
        limits = [_limit(max_tokens, prompt) for _, prompt in asked]
        images, prompts = [seen for seen, _ in asked], [prompt for _, prompt in asked]
        events = self.events(images, prompts, Sampling(), max_tokens=limits)
        answers = (event for event in events if isinstance(event, Answer))
        for entry in pack:
            if isinstance(entry, Failed):
                yield entry
                continue
            seen, prompt = entry
            answer = next(answers)
            finds = tasks.task_of(prompt) in ("detect", "segment")
            yield self.detection(answer, seen, bins) if finds else answer

    def _one(self, image: Shown, prompt: str, max_tokens: int | None) -> Answer:
        """One answer about one picture."""
        check_picture(image)
        return self.generate(image, prompt, max_tokens=_limit(max_tokens, prompt))[0]

    def _find(self, image: Shown, prompt: str, max_tokens: int | None, bins: int) -> Detection:
        """The things that a prompt asks for on one picture."""
        _check_bins(bins)
        seen = self.prepare(image)
        return self.detection(self._one(seen, prompt, max_tokens), seen, bins)

    def detection(self, answer: Answer, seen: Seen, bins: int = BINS) -> Detection:
        """Read the boxes and masks of an answer to a `detect` or `segment` prompt."""
        _check_bins(bins)
        paint = self._paint if tasks.task_of(answer.prompt) == "segment" else None
        size = seen.width, seen.height
        return read_detection(answer, seen.source, size, self.tokenizer, paint, bins)

    def _paint(self, codes: Index) -> NDArray[np.float32]:
        """Masks from their codes. codes [N, 16] -> [N, 64, 64]"""
        with TURNS.take(self.ops):
            return vqvae.decode_masks(codes, self.mask_decoder, np.float32, ops=self.ops)

    @cached_property
    def mask_decoder(self) -> Weights:
        """The weights that turn `<seg...>` tokens into masks."""
        return open_mask_decoder(find_mask_decoder(self.folder))

    def logits(
        self, images: Shown | Sequence[Shown], prompt: str, answer_ids: Sequence[int]
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
        answer = self._known_ids(answer_ids)
        pictures = as_list(images)
        ids = self.ids_of(prompt, len(pictures), len(answer))
        tokens = len(ids) + len(answer)
        self._check_memory(tokens, tokens, len(pictures), scored=tokens)
        features = self._features(pictures).reshape(-1, self.config.text_config.hidden_size)
        w, config = self.weights, self.config
        with TURNS.take(self.ops):
            return logits(ids, answer, features, w, config, ops=self.ops, tap=closed)

    def _check_memory(self, tokens: int, rows: int, pictures: int, scored: int = 1) -> None:
        """Refuse a call that would not fit into memory, before it begins."""
        needed = run_bytes(self.config, tokens, rows, pictures, scored)
        what = f"reading {tokens:,} tokens with {rows:,} rows of cache"
        check_memory(needed, what, "ask for fewer tokens, beams or pictures at once")

    def features(self, image: Shown, *, projected: bool = True) -> NDArray[np.float32]:
        """What the model sees on a picture, as numbers: a row for each patch, row by row.

        Parameters
        ----------
        projected : as the decoder reads them, at its width; False: as the image tower gives them,
            before the projector (SigLIP's last_hidden_state)

        Returns
        -------
        features [P, D], float32

        Examples
        --------
        >>> model.features(picture).shape, model.features(picture, projected=False).shape
        ((64, 128), (64, 128))
        """
        seen = self.prepare(image)
        if projected:
            return self._features([seen])[0]
        with TURNS.take(self.ops):
            return states.tower_features(seen.pixels, self.weights, self.config, ops=self.ops)

    def hidden_states(
        self, images: Shown | Sequence[Shown], prompt: str, layers: int | Sequence[int] = -1
    ) -> NDArray[np.float32]:
        """What the decoder makes of pictures and prompt, after the layers asked for.

        Layers are numbered as in transformers' `output_hidden_states`: 0 is what enters the first
        layer, n what leaves the n-th; the last is what leaves the norm behind the last layer. Those
        behind the ones asked for are not run.

        Parameters
        ----------
        images : a picture, or several in front of the one prompt
        layers : one number, or several; negative ones count from the end

        Returns
        -------
        [T, D], float32, for one number, and [L, T, D] for several. Rows are image tokens first,
        then `<bos>`, the prompt and a newline

        Examples
        --------
        >>> model.hidden_states(picture, "caption en").shape
        (68, 128)
        >>> model.hidden_states(picture, "caption en", [0, 2, -1]).shape
        (3, 68, 128)
        """
        return self._inside(states.hidden_states, 1, images, prompt, layers)

    def attention(
        self, images: Shown | Sequence[Shown], prompt: str, layers: int | Sequence[int] = -1
    ) -> NDArray[np.float32]:
        """How much each token of pictures and prompt looks at each other one.

        Parameters are those of `hidden_states`, but layers are counted from 0 for the first. At 448
        pixels a layer takes 34 MB, at 896 half a GB.

        Returns
        -------
        [H, T, T], float32, for one number, and [L, H, T, T] for several; rows sum to one

        Examples
        --------
        >>> model.attention(picture, "caption en", 0).shape
        (4, 68, 68)
        """
        return self._inside(states.attention, 0, images, prompt, layers)

    def _inside(
        self,
        look: Callable[..., Array],
        more: int,
        images: Shown | Sequence[Shown],
        prompt: str,
        layers: int | Sequence[int],
    ) -> Array:
        """What `look` finds in the layers asked for, of which it counts `more` than there are."""
        numbers = layers_of(layers, self.config.text_config.num_hidden_layers + more)
        pictures = as_list(images)
        ids = self.ids_of(prompt, len(pictures), 0)
        features = self._features(pictures).reshape(-1, self.config.text_config.hidden_size)
        with TURNS.take(self.ops):
            found = look(ids, features, numbers, self.weights, self.config, ops=self.ops)
        return found if isinstance(layers, Iterable) else found[0]

    def look_all(self, images: Iterable[Shown]) -> Iterator[Seen | Failed]:
        """`look` at any number of pictures, in their order; files are read while the model works.

        A picture that cannot be read gives a Failed in its place, and the rest goes on.
        """

        def prepare(image: Shown, prompt: str) -> Prepared:
            try:
                return self.prepare(image), prompt
            except UsageError:
                raise
            except NpvlmError as error:
                return Failed(name_of(image), prompt, str(error))

        together = max(1, PACKED_TOKENS // self.config.vision_config.num_patches)
        for pack in read_ahead(((image, "") for image in images), prepare):
            for start in range(0, len(pack), together):
                part = pack[start : start + together]
                readable = [entry[0] for entry in part if not isinstance(entry, Failed)]
                features = iter(self._features(readable) if readable else ())
                for entry in part:
                    if isinstance(entry, Failed):
                        yield entry
                    else:
                        yield replace(entry[0], features=next(features))

    def _known_ids(self, ids: Sequence[int]) -> Index:
        """Ids as an array, if all of them are in the vocabulary."""
        most = self.config.text_config.vocab_size - 1
        try:
            whole = [operator.index(i) for i in ids]
        except TypeError:  # fractions, texts, or no list at all
            whole = [-1]
        if any(not 0 <= i <= most for i in whole):
            raise UsageError(f"answer_ids must be a list of ids from 0 to {most}.")
        return np.array(whole, np.int64)

    def score(
        self, images: Shown | Sequence[Shown], prompt: str, answers: str | Sequence[str]
    ) -> Scores:
        """Say how probable each of the given answers is.

        An answer counts as complete: its tokens and the `<eos>` behind them.

        Parameters
        ----------
        images : a picture, or several in front of the one prompt
        answers : one or more texts; "" is the answer that ends at once

        Returns
        -------
        Scores, with the answers in the order given

        Raises
        ------
        UsageError
            For no answers, something that is no text, or too long a text.
        NpvlmError
            For a picture that cannot be read.
        """
        texts = texts_of("answers", answers)
        if not texts:
            raise UsageError("there is no answer to score, expected one or more.")
        if any(self.tokenizer.strip_image_marks(text)[1] for text in texts):
            raise UsageError("an answer holds <image>, expected text alone.")
        ids = [np.array([*self.tokenizer.encode(text), self.tokenizer.eos_id]) for text in texts]
        pictures = as_list(images)
        prefix = self.ids_of(prompt, len(pictures), max(map(len, ids)))
        self._check_memory(len(prefix), len(prefix) + sum(map(len, ids)), len(pictures))
        features = self._features(pictures).reshape(-1, self.config.text_config.hidden_size)
        with TURNS.take(self.ops):
            logprobs = score(
                prefix, ids, features, self.weights, self.config, ops=self.ops, tap=closed
            )
        return Scores(
            image=names_of(images, pictures),
            prompt=prompt,
            candidates=candidates(
                texts, [own.tolist() for own in ids], [own.tolist() for own in logprobs]
            ),
            prompt_token_ids=prefix.tolist(),
            model=self.called,
            precision=self.precision,
        )

    def explain(
        self,
        image: Shown,
        prompt: str,
        *,
        answer: str | None = None,
        method: str = "attention",
        max_tokens: int | None = None,
        tell: Callable[[int, int], None] = lambda done, of: None,
    ) -> Explanation:
        """Say for each word of an answer which parts of the picture it has to do with.

        Parameters
        ----------
        answer : the words to explain; by default what the model says by itself, greedily
        method : "attention", where the model looked; or "occlusion", what it needs: one run for
            each of 64 parts of the picture that are covered in turn
        max_tokens : most tokens of the model's own answer; by default what its task needs
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
        check_text("prompt", prompt)
        if answer is not None:
            check_text("answer", answer)
        shown = self.prepare(image)
        ids = self._explained_ids(shown, prompt, answer, _limit(max_tokens, prompt))
        prefix, pixels = self.ids_of(prompt, 1, len(ids)), shown.pixels
        places = locations(self.tokenizer)

        def read(pixels: Array, tap: Tap = closed) -> NDArray[np.float64]:
            w, config = self.weights, self.config
            with TURNS.take(self.ops):
                seen = paligemma.image_features(pixels[None], w, config, ops=self.ops, tap=closed)
                given = prefix, np.array(ids), seen[0], w, config, places
                return read_answer(*given, ops=self.ops, tap=tap)

        patches, layers = self.config.vision_config.num_patches, []
        if method == "attention":
            watch = AttentionTap(self.config.text_config, len(prefix), len(ids), patches)
            logprobs = read(pixels, watch)
            heats, layers = watch.mean(), list(watch.layers)
        else:
            logprobs = read(pixels)
            heats = occlude(pixels, math.isqrt(patches), read, logprobs, tell)
        return Explanation(
            image=shown.name,
            picture=open_picture(shown.source),
            prompt=prompt,
            answer=self.tokenizer.decode(ids),
            own=answer is None,
            model=self.called,
            precision=self.precision,
            method=method,
            layers=layers,
            words=words_of(self.tokenizer, ids, logprobs, heats, method),
        )

    def _explained_ids(
        self, picture: Seen, prompt: str, answer: str | None, max_tokens: int
    ) -> list[int]:
        """The ids of the words to explain: given ones, or the model's own without its eos."""
        if answer is not None:
            ids = self.tokenizer.encode(answer)
            if self.tokenizer.image_id in ids or not answer.strip():
                raise UsageError(f"answer is {answer[:60]!r}, expected words without <image>.")
            return ids
        own = self.generate(picture, prompt, max_tokens=max_tokens)[0]
        ids = own.token_ids[:-1] if own.stop == "eos" else own.token_ids
        if not own.text.strip():
            raise NpvlmError(
                f"the model answers nothing to {prompt!r}; give the words to explain (answer), or "
                "another prompt."
            )
        return ids

    def events(
        self,
        images: Shown | Sequence[Shown | Sequence[Shown]],
        prompts: str | Sequence[str],
        sampling: Sampling,
        *,
        max_tokens: int | Sequence[int] = 100,
        seed: int | None = None,
        beams: int = 1,
    ) -> Iterator[Piece | Answer]:
        """Everything `generate` does, as it happens: pieces of text, then the answers in order.

        Pictures are read when their turn comes, so any number of them fits in memory. max_tokens is
        one number for all, or one for each. Beams have no text before the search is over.
        """
        limits = [*max_tokens] if isinstance(max_tokens, Sequence) else [max_tokens]
        for limit in limits:
            check_whole("max_tokens", limit, 1)
        check_whole("beams", beams, 1)
        if beams > MOST_BEAMS:
            raise UsageError(f"beams is {beams}, expected at most {MOST_BEAMS}.")
        if seed is not None:
            check_whole("seed", seed, 0)
        if beams > 1 and not sampling.greedy:
            raise UsageError(
                "beams draw nothing: leave out temperature, top-k and top-p, or beams."
            )
        if sampling.greedy:
            seed = None
        elif seed is None:
            seed = draw_seed()
        entries = as_list(images)
        single = isinstance(prompts, str)
        prompts = texts_of("prompts", prompts) * (len(entries) if single else 1)
        if len(prompts) != len(entries):
            raise UsageError(
                f"{len(prompts)} prompts for {len(entries)} pictures; expected one prompt for "
                "all, or one for each."
            )
        if not isinstance(max_tokens, Sequence):
            limits *= len(entries)
        if len(limits) != len(entries):
            raise UsageError(
                f"{len(limits)} numbers of max_tokens for {len(entries)} pictures; expected one "
                "for all, or one for each."
            )
        sequences = []
        for index, (entry, prompt, limit) in enumerate(zip(entries, prompts, limits, strict=True)):
            pictures = as_list(entry)
            sequence = Started(
                index=index,
                image=names_of(entry, pictures),
                pictures=pictures,
                prompt=prompt,
                ids=self.ids_of(prompt, len(pictures), limit),
                max_tokens=limit,
                chooser=PlaceWatch(Chooser(sampling, seed, ops=self.ops), self.tokenizer),
                text=TextStream(self.tokenizer),
            )
            sequences.append(sequence)
        for pack in packs_of(sequences, beams):
            yield from self._answer(pack, seed, beams)

    def _answer(
        self, pack: list[Started], seed: int | None, beams: int
    ) -> Iterator[Piece | Answer]:
        """Run one packed call."""
        self._check_memory(
            tokens=sum(len(s.ids) for s in pack),
            rows=beams * sum(len(s.ids) + s.max_tokens for s in pack),
            pictures=sum(len(s.pictures) for s in pack),
            scored=beams * len(pack),
        )
        began = time.perf_counter()
        features = self._features([picture for s in pack for picture in s.pictures])
        features = features.reshape(-1, self.config.text_config.hidden_size)
        seen = time.perf_counter()

        given = [s.ids for s in pack], features, self.weights, self.config
        limits = [s.max_tokens for s in pack]
        if beams > 1:
            steps = beam_search(*given, beams, limits, ops=self.ops, tap=closed)
        else:
            choosers = [s.chooser for s in pack]
            steps = generate(*given, choosers, limits, ops=self.ops, tap=closed)
        prefilled = None
        while True:
            with TURNS.take(self.ops):
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

    def _finished(self, sequence: Started, seed: int | None, seconds: Seconds) -> Answer:
        ids = [token.id for token in sequence.tokens]
        logprobs = [token.logprob for token in sequence.tokens]
        gains = sequence.chooser.gains or [0.0] * len(ids)  # beams are not chosen by it
        return Answer(
            image=sequence.image,
            prompt=sequence.prompt,
            text=self.tokenizer.decode(ids),
            token_ids=ids,
            logprobs=logprobs,
            nearby=[p + gain for p, gain in zip(logprobs, gains, strict=True)],
            prompt_token_ids=sequence.ids.tolist(),
            stop="eos" if ids[-1] in self.config.eos_token_ids else "length",
            model=self.called,
            precision=self.precision,
            seed=seed,
            seconds=seconds,
        )

    def _features(self, pictures: Sequence[Shown]) -> Array:
        """Image features [N, P, D]; a picture that comes several times is looked at once."""
        distinct = {key_of(picture): picture for picture in pictures}
        seen = [self.prepare(picture) for picture in distinct.values()]
        found = {key: s.features for key, s in zip(distinct, seen, strict=True)}
        new = [key for key, features in found.items() if features is None]
        if new:
            pixels = np.stack([s.pixels for s in seen if s.features is None])
            with TURNS.take(self.ops):
                features = paligemma.image_features(
                    pixels, self.weights, self.config, ops=self.ops, tap=closed
                )
            found.update(zip(new, features, strict=True))
        return np.stack([found[key_of(picture)] for picture in pictures])  # type: ignore[misc]

    def prepare(self, picture: Shown) -> Seen:
        """Read a picture and shrink it to what the tower takes, ahead of asking about it.

        Raises
        ------
        UsageError
            For anything but one picture.
        NpvlmError
            For a picture that cannot be read.
        """
        check_picture(picture)
        if isinstance(picture, Seen):
            return picture
        rgb = open_picture(picture)
        # The rest may change, or can be read only once.
        kept = picture if isinstance(picture, (str, Path, bytes)) else rgb
        pixels = pixel_values(rgb, self.preprocessor)
        return Seen(name_of(picture), kept, rgb.width, rgb.height, pixels)

    def look(self, picture: Shown) -> Seen:
        """Show the image tower a picture once, for any number of questions about it.

        >>> seen = model.look(picture)
        >>> model.ask(seen, "how many stars?").text, model.ask(seen, "how many squares?").text
        ('1', '1')
        """
        seen = self.prepare(picture)
        return replace(seen, features=self._features([seen])[0])

    def ids_of(self, prompt: str, pictures: int, answer: int) -> Index:
        """The ids of one sequence, if they fit with an answer of so many tokens.

        A typed `<image>` is dropped: the pictures come first anyway.

        Raises
        ------
        UsageError
            For no text, no picture, or more than max_position_embeddings of config.json.
        """
        check_text("prompt", prompt)
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


def _check_bins(bins: int) -> None:
    if bins not in (BINS, BINS - 1):
        raise UsageError(f"bins is {bins}, expected {BINS} or {BINS - 1}.")


def _limit(asked: int | None, prompt: str) -> int:
    """Most tokens of an answer: what is asked for, or what the task needs."""
    return tasks.max_tokens(prompt) if asked is None else asked
