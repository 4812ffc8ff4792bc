"""Hold npvlm's beam search and its scores of given answers against those of transformers.

`check.py` runs it on its checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from transformers import PaliGemmaForConditionalGeneration

from golden import beam_cases, oracle, ours
from golden.beam_cases import EOS, Search
from golden.oracle import STEPS, Case
from npvlm import kernels
from npvlm.api import Model

LOGITS = "language_model.logits"


@dataclass
class Found:
    """What was compared, of all checkpoints together."""

    searches: list[Search] = field(default_factory=list)
    greedy: int = 0  # searches that find what greedy decoding does
    otherwise: int = 0  # searches in which torch's float32 takes another turn than its float64
    answers: int = 0  # whose every token was scored
    nearest: dict[str, float] = field(default_factory=dict)  # the largest share of a limit
    differences: list[str] = field(default_factory=list)

    def hold(self, what: str, where: str, error: float, limit: float) -> None:
        """An error is within its limit; a nan is not."""
        self.nearest[what] = max(self.nearest.get(what, 0.0), error / limit)
        if not error <= limit:
            self.differences.append(f"{where}: {what} off by {error:.1e}, limit {limit:.1e}")


def compare(
    name: str,
    slow: Model,
    fast: Model,
    float32: PaliGemmaForConditionalGeneration,
    float64: PaliGemmaForConditionalGeneration,
    cases: list[Case],
    found: Found,
) -> None:
    """Search by beams, packed and alone, and score answers; note what differs.

    The tokens are those of transformers in float64. A score is a mean of log-probabilities, and
    each of these is a logit less a mean of all: its error is at most twice a logit's.
    """
    searches = beam_cases.searches(cases, float32, float64)
    found.searches += searches
    for search in searches:
        found.greedy += search.answer == cases[search.prompt].answer[: len(search.answer)]
        found.otherwise += search.torchs != search.answer
    for beams, ends in {(s.beams, tuple(s.ends)) for s in searches}:
        own = [s for s in searches if (s.beams, tuple(s.ends)) == (beams, ends)]
        for way, model, dtype in (
            ("definitions", slow, np.float32),
            ("kernels", fast, np.float32),
            ("float64", slow, np.float64),
        ):
            model = replace(model, config=replace(model.config, eos_token_ids=ends))
            _compare_searches(f"{name}, {way}", model, dtype, own, cases, found)
    for number, case in enumerate(cases):
        answers = [case.answer, [EOS], searches[3 * number + 1].answer]
        where = f"{name}, prompt {number}"
        _compare_scores(where, slow, fast, float32, float64, case, answers, found)


def _compare_searches(
    where: str, model: Model, dtype: type, own: list[Search], cases: list[Case], found: Found
) -> None:
    """Searches of one width, packed; the kernels' are the same bits alone, as `generate` gives."""
    asked = [cases[search.prompt] for search in own]
    pixels, prompts = [case.pixels.astype(dtype) for case in asked], [case.ids for case in asked]
    packed = ours.beams(model, pixels, prompts, STEPS, own[0].beams)
    for search, case, (ids, logprobs) in zip(own, asked, packed, strict=True):
        what = f"{where}, prompt {search.prompt}, {search.beams} beams"
        if ids != search.answer:
            found.differences.append(f"{what}: {ids}, torch's float64 has {search.answer}")
            continue
        limit = 2 * beam_cases.logits_off(case)
        if dtype is np.float64:
            limit *= ours.APART * ours.FINER
        error = abs(float(np.mean(logprobs)) - search.score)
        found.hold(f"scores in {np.dtype(dtype)}", what, error, limit)
        if model.ops is kernels:
            [alone] = model.generate(
                [case.pictures], case.prompt, max_tokens=STEPS, beams=search.beams
            )
            if (alone.token_ids, alone.logprobs) != (ids, logprobs):
                found.differences.append(f"{what}: alone it has other bits than packed")


def _compare_scores(
    where: str,
    slow: Model,
    fast: Model,
    float32: PaliGemmaForConditionalGeneration,
    float64: PaliGemmaForConditionalGeneration,
    case: Case,
    answers: list[list[int]],
    found: Found,
) -> None:
    """Given answers, scored together, against the log-softmax of a pass over each."""
    narrow = [ours.score(model, case.pixels, case.ids, answers) for model in (slow, fast)]
    wide = ours.score(slow, case.pixels.astype(np.float64), case.ids, answers)
    for i, answer in enumerate(answers):
        rows = slice(len(case.ids) - 1, -1)
        truth = oracle.run_float64(float64, case.pixels, case.ids, answer)[0][LOGITS][rows]
        torchs = oracle.run(float32, case.pixels, case.ids, answer)[LOGITS][rows]
        expected = truth[range(len(answer)), answer] - np.log(np.sum(np.exp(truth), axis=-1))
        limit = 2 * float(np.max(np.abs(truth - torchs)))
        for run in narrow:
            error = float(np.max(np.abs(run[i] - expected)))
            found.hold("answers in float32", where, error, limit)
        error = float(np.max(np.abs(wide[i] - expected)))
        found.hold("answers in float64", where, error, ours.APART * ours.FINER * limit)
        found.answers += 1


def show(found: Found) -> list[str]:
    """Print what was compared; every difference in words, a check that proves nothing included."""
    count = len(found.searches)
    early = sum(len(search.answer) < STEPS for search in found.searches)
    print(
        f"\nbeams: {count} searches, {early} end early, {count - found.greedy} find what greedy "
        f"decoding does not, {found.otherwise} in which torch's float32 differs from its float64; "
        f"{found.answers} answers scored"
    )
    for what, share in found.nearest.items():
        print(f"{what}: at most {share:.2f} of the limit")
    differences = list(found.differences)
    if not (0 < early < count and 0 < found.greedy < count):
        differences.append("beams: the searches are not of all kinds")
    for what, share in found.nearest.items():
        if share < 0.01:
            differences.append(f"beams, {what}: the limit is loose, {share:.1e} of it is used")
    return differences
