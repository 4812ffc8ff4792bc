"""One model in many threads, and in processes that were forked."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

import npvlm
from npvlm.work.demo import draw_picture
from tests.test_startup import python

PICTURE = draw_picture()


def said(answer: npvlm.Answer) -> tuple[object, ...]:
    return answer.text, answer.logprobs


def found(detection: npvlm.Detection) -> tuple[object, ...]:
    masks = [detection.mask(box).tobytes() for box in detection.boxes]
    return said(detection.answer), detection.boxes, masks


def half(model: npvlm.Model) -> str:
    """The beginning of an answer that nobody reads on."""
    return next(model.stream(PICTURE, "caption en"))


CALLS: dict[str, Callable[[npvlm.Model], object]] = {
    "caption": lambda m: said(m.caption(PICTURE)),
    "segment": lambda m: found(m.segment(PICTURE, "red circle")),
    "stream": lambda m: list(m.stream(PICTURE, "caption en")),
    "half a stream": half,
    "drawn": lambda m: said(m.generate(PICTURE, "caption en", temperature=3.0, seed=5)[0]),
    "beams": lambda m: said(m.generate(PICTURE, "caption en", beams=3)[0]),
    "batch": lambda m: [said(a) for a in m.batch([PICTURE] * 2, ["ocr", "caption en"])],
    "score": lambda m: m.score(PICTURE, "caption en", ["a red circle", "a star"]).candidates,
    "explain": lambda m: [w.heat.tobytes() for w in m.explain(PICTURE, "caption en").words],
    "logits": lambda m: m.logits(PICTURE, "caption en", [5, 6]).tobytes(),
}


def test_every_call_gives_each_thread_its_own_answer() -> None:
    models = [npvlm.load("shapes"), npvlm.load("shapes2")]
    asked = [(call, model) for call in CALLS.values() for model in models]
    alone = [call(model) for call, model in asked]
    with ThreadPoolExecutor(8) as threads:
        together = threads.map(lambda one: one[0](one[1]), asked * 3)
        assert list(together) == alone * 3


def test_a_stream_that_is_left_half_way_stops_nobody() -> None:
    model, answers = npvlm.load("shapes"), []
    kept = model.stream(PICTURE, "caption en")
    next(kept)
    other = threading.Thread(target=lambda: answers.append(model.caption(PICTURE).text))
    other.start()
    other.join(60)
    assert answers == ["".join(model.stream(PICTURE, "caption en"))]


@pytest.mark.parametrize("do", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_model_is_not_copied_but_loaded_again(do: Callable[[npvlm.Model], object]) -> None:
    with pytest.raises(npvlm.UsageError, match=r"call npvlm\.load there.*\(shapes\)"):
        do(npvlm.load("shapes"))


# A child that hangs is ended by its alarm, and would be seen by its status.
FORK = """
import os, signal, sys, warnings
import npvlm
from npvlm import computing
from npvlm.work.demo import draw_picture

warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
picture = draw_picture()

def child(ask):
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        signal.alarm(60)
        try:
            print(ask())
        except npvlm.NpvlmError as error:
            print(error)
        sys.stdout.flush()
        os._exit(0)
    print(os.waitpid(pid, 0)[1])
"""
TWO = "caption(picture, max_tokens=2).text"


@pytest.mark.skipif("not hasattr(os, 'fork')", reason="no fork there")
class TestForks:
    """What a forked child may do."""

    def test_before_any_kernel_ran_it_computes(self) -> None:
        code = f"model = npvlm.load('shapes')\nchild(lambda: model.{TWO})\nprint(model.{TWO})"
        assert python(FORK + code) == ["a red", "0", "a red"]

    def test_afterwards_it_is_refused_in_a_sentence_and_the_parent_goes_on(self) -> None:
        code = f"""
model = npvlm.load("shapes")
model.{TWO}
child(lambda: model.{TWO})
child(lambda: npvlm.load("shapes", "int8"))
child(lambda: npvlm.load("shapes", ops="numpy").{TWO})
print(model.{TWO})
"""
        refused, first, packed, second, *rest = python(FORK + code)
        assert "its threads" in refused or "whose threads" in refused
        assert (first, packed, second, rest) == ("0", refused, "0", ["a red", "0", "a red"])

    def test_with_threads_that_can_be_started_anew_it_computes(self) -> None:
        code = f"model = npvlm.load('shapes')\nmodel.{TWO}\nchild(lambda: model.{TWO})"
        assert python(FORK + code, NUMBA_THREADING_LAYER="workqueue") == ["a red", "0"]

    def test_while_other_threads_compute_none_is_waited_for_in_vain(self) -> None:
        """Neither by the child, which has only one thread, nor by the libraries of the parent."""
        code = f"""
import threading
model, done = npvlm.load("shapes", ops="numpy"), threading.Event()

def compute():
    while not done.is_set():
        model.{TWO}

threading.Thread(target=compute).start()
for _ in range(3):
    child(lambda: model.{TWO})
done.set()
"""
        assert python(FORK + code, OPENBLAS_NUM_THREADS="2") == ["a red", "0"] * 3
