"""The page of an explanation: pointing at a word lights the picture."""

from __future__ import annotations

import base64
import html
from io import BytesIO
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from PIL import Image

from npvlm.answers.heat import shows, wash
from npvlm.answers.words import in_words, sureness

if TYPE_CHECKING:
    from npvlm.answers.explanation import Explanation, Word

TEMPLATE = Path(__file__).with_name("explanation.html")
LARGEST = 1024  # pixels of the picture's longer side on the page
WASH = 128  # of a heat's longer side, which the browser stretches

# What each method shows, and what it does not prove: a paragraph a line.
TOLD = {
    "attention": """
The light shows which parts of the picture the model gathered from as it chose a word: its
attention, as the mean over all heads of the layers that see the whole picture.

It does not prove that those parts decided the word: what is gathered may be ignored later, and a
patch may carry news of other patches, since each has seen the whole picture before.

To test what a word depends on, change the picture: <code>--method occlusion</code> covers one part
after another and measures how much less likely the word becomes.
""",
    "occlusion": """
The light shows what a word needs: each part of the picture was covered with the picture's mean
colour, and the further the odds of the word fell, the brighter the part.

For these covers that is a cause and no mere coincidence, as long as the words before stay the same.

It does not prove that a bright part is enough for the word, nor that a dark one is ignored: two
parts that say the same stand in for each other, and a covered picture is a strange picture.
""",
}


def page(explanation: Explanation) -> str:
    """The page as text; it needs nothing else, and everything from outside is escaped."""
    facts = {
        "picture": Path(explanation.image).name or "a picture",
        "model": explanation.model,
        "precision": explanation.precision,
        "method": explanation.method,
    }
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    words = explanation.words
    return template.substitute(
        title=html.escape(f"{explanation.prompt}: {explanation.answer}"[:120]),
        prompt=html.escape(explanation.prompt),
        whose="The model's answer" if explanation.own else "The answer that was given",
        words="".join(_button(number, word, explanation) for number, word in enumerate(words, 1)),
        picture=_data(_smaller(explanation.picture), "JPEG", quality=88),
        name=html.escape(facts["picture"]),
        width=explanation.picture.width,
        height=explanation.picture.height,
        heats="".join(_heat(number, word, explanation) for number, word in enumerate(words, 1)),
        told="".join(f"<p>{part.strip()}</p>" for part in TOLD[explanation.method].split("\n\n")),
        facts="".join(
            f"<div><dt>{key}</dt><dd>{html.escape(value)}</dd></div>"
            for key, value in facts.items()
        ),
    )


def _button(number: int, word: Word, explanation: Explanation) -> str:
    """A word to point at; the bar under it is as long as the word is likely."""
    sure = sureness(word.text, word.probability)
    across, down = word.peak
    rows, columns = ("upper", "middle", "lower"), ("left", "centre", "right")
    place = f"brightest {_third(down, *rows)} {_third(across, *columns)}"
    if not shows(word.heat, explanation.method):
        place = "no single part matters"
    return (
        f'<button type="button" id="word-{number}" aria-pressed="false" '
        f'aria-description="{sure}; {place}" style="--share:{word.probability:.3f}">'
        f"{html.escape(in_words(word.text))}</button>\n"
    )


def _third(share: float, first: str, second: str, third: str) -> str:
    return first if share < 1 / 3 else second if share < 2 / 3 else third


def _heat(number: int, word: Word, explanation: Explanation) -> str:
    """A word's heat and the ring around its peak, unseen until the word is pointed at."""
    size = explanation.picture.size
    longer = max(size)
    stretched = (max(1, round(size[0] * WASH / longer)), max(1, round(size[1] * WASH / longer)))
    across, down = (f"{100 * share:.2f}%" for share in word.peak)
    data = _data(wash(word.heat, stretched, explanation.method), "PNG", optimize=True)
    ring = f'<i style="left:{across};top:{down}"></i>'
    if not shows(word.heat, explanation.method):
        ring = ""
    return f'<div class="heat" id="heat-{number}"><img alt="" src="{data}">{ring}</div>\n'


def _smaller(picture: Image.Image) -> Image.Image:
    smaller = picture.copy()
    smaller.thumbnail((LARGEST, LARGEST))
    return smaller


def _data(picture: Image.Image, kind: str, **options: int | bool) -> str:
    """A picture written out in the address itself."""
    written = BytesIO()
    picture.save(written, kind, **options)
    code = base64.b64encode(written.getvalue()).decode()
    return f"data:image/{kind.lower()};base64,{code}"
