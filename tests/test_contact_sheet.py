"""The contact sheet: what is written, and what happens when a person clicks, in Chromium."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import npvlm
from npvlm.files.thumbnails import thumbnail
from npvlm.work.batch_input import Item
from npvlm.work.contact_sheet import AHEAD, SIDE, check_place, contact_sheet
from npvlm.work.demo import draw_picture
from tests.browser import CHROMIUM, Page
from tests.test_cli import one_line, run

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&amp;\u2028"
COUNT = AHEAD + 36


def make_sheet(place: Path, count: int, picture: Path | None = None) -> list[dict[str, Any]]:
    """A sheet of records of all kinds, and these."""
    items, records = [], []
    for i in range(count):
        path = picture or place.parent / "absent.png"
        item = Item(i, f"album/{i:05}.png", "segment cat ; dog", path, {"note": HOSTILE})
        record = item.head
        if i % 10 == 9:
            record["error"] = f"{path} is no picture {HOSTILE}"
        else:
            sure = (i % 8 + 1) / 9
            boxes = [
                {
                    "label": "cat" if k else f"dog {HOSTILE}",
                    "box": [10 * k, 20, 10 * k + 30, 60],
                    "confidence": min(1.0, sure + k / 10),
                    "mask": {"size": [80, 120], "counts": [9600]},
                    "polygons": [[10, 20, 40, 20, 40, 60]],
                }
                for k in range(i % 3)
            ]
            said = {"text": f"word{i}" if boxes else "", "token_ids": [5, 1], "stop": "eos"}
            numbers = {"logprobs": [2 * math.log(sure), 0.0], "width": 120, "height": 80}
            record |= {**said, **numbers, "model": "shapes", "boxes": boxes, "unread": []}
        items.append(item)
        records.append(record)
    told: list[tuple[int, int]] = []
    contact_sheet(items, iter(records), place, lambda *now: told.append(now))
    assert told == [(i + 1, count) for i in range(count)]
    return records


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "p.png"
    Image.linear_gradient("L").resize((120, 80)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def sheet(picture: Path) -> Path:
    place = picture.with_name("sheet.html")
    make_sheet(place, COUNT, picture)
    return place


def views(page: Path) -> list[dict[str, Any]]:
    """What a page knows, as a browser would find it."""
    [data] = re.findall(
        r'<script type="application/json" id="data">(.*?)</script', page.read_text(), re.DOTALL
    )
    return json.loads(data)["views"]


# What is written


def test_one_file_holds_everything_but_what_is_long(sheet: Path, picture: Path) -> None:
    found = views(sheet)
    assert [view["record"]["index"] for view in found] == list(range(COUNT))
    for view in found:
        assert not {"token_ids", "logprobs"} & view["record"].keys()
        assert view["record"]["note"] == HOSTILE
        if "error" in view["record"]:
            assert view["reason"] == view["record"]["error"].removeprefix(f"{picture} ")
            assert not {"thumbnail", "confidence"} & view.keys()
            continue
        kind, _, data = view["thumbnail"].partition(",")
        assert kind == "data:image/png;base64" and view["tiny"]
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (120, 80)
        assert view["confidence"] == pytest.approx((view["record"]["index"] % 8 + 1) / 9)
        assert all("mask" not in box and box["polygons"] for box in view["record"]["boxes"])


def test_nothing_is_fetched_and_nothing_ends_the_script(sheet: Path) -> None:
    page = sheet.read_text()
    assert page.count("</script>") == 2
    assert re.findall(r"https?://[^\"' ]+", page) == ["http://www.w3.org/2000/svg"]
    assert "default-src 'none'" in page


def test_a_folder_holds_the_same_with_thumbnails_beside(picture: Path, sheet: Path) -> None:
    place = picture.with_name("sheet")
    make_sheet(place, COUNT, picture)
    apart, within = views(place / "index.html"), views(sheet)
    names = [view.get("thumbnail") for view in apart]
    assert names[:2] == ["thumbnails/000000.png", "thumbnails/000001.png"]
    for one, other in zip(apart, within, strict=True):
        if name := one.get("thumbnail"):
            data = base64.b64encode((place / name).read_bytes()).decode()
            assert other["thumbnail"].endswith(f",{data}")
        assert {**one, "thumbnail": 0} == {**other, "thumbnail": 0}
    assert len(list((place / "thumbnails").iterdir())) == COUNT - COUNT // 10
    with pytest.raises(npvlm.UsageError, match="is there already"):
        check_place(place, [])


def test_equal_records_give_equal_bytes(picture: Path, sheet: Path, tmp_path: Path) -> None:
    make_sheet(tmp_path / "again.htm", COUNT, picture)
    assert (tmp_path / "again.htm").read_bytes() == sheet.read_bytes()


def test_a_picture_that_is_gone_has_no_thumbnail(tmp_path: Path) -> None:
    make_sheet(tmp_path / "sheet.html", 8)
    assert not any("thumbnail" in view for view in views(tmp_path / "sheet.html"))


def test_thumbnails_are_small_upright_and_on_white(tmp_path: Path) -> None:
    large = Image.new("RGB", (3000, 1000), (200, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    large.save(tmp_path / "large.jpg", exif=exif)
    small = thumbnail(tmp_path / "large.jpg", SIDE)
    assert (small.height, small.width) == (SIDE, round(SIDE / 3)) and len(small.data) < 20_000
    Image.new("RGBA", (10, 10)).save(tmp_path / "clear.png")
    clear = thumbnail(tmp_path / "clear.png", SIDE)
    shown = Image.open(io.BytesIO(clear.data))
    assert shown.size == (clear.width, clear.height) == (10, 10)  # never enlarged
    assert shown.getpixel((5, 5)) == (255, 255, 255)
    (tmp_path / "broken.jpg").write_bytes((tmp_path / "large.jpg").read_bytes()[:900])
    for name in ("broken.jpg", "absent.jpg"):
        with pytest.raises(npvlm.NpvlmError, match=name):
            thumbnail(tmp_path / name, SIDE)


def test_tiny_pictures_are_kept_as_they_are_and_drawings_have_no_rings(tmp_path: Path) -> None:
    path = tmp_path / "drawn.png"
    for size in ((128, 96), (320, 240), (900, 675), (3, 800)):
        drawn = draw_picture().resize(size, Image.Resampling.NEAREST)
        drawn.save(path)
        small = thumbnail(path, SIDE)
        shown = Image.open(io.BytesIO(small.data))
        assert shown.format == ("PNG" if max(size) <= 128 else "JPEG") == small.kind.upper()
        expected = drawn.copy()
        expected.thumbnail((SIDE, SIDE), Image.Resampling.BOX, reducing_gap=None)
        assert shown.size == expected.size
        away = np.abs(np.asarray(shown).astype(int) - np.asarray(expected))
        assert away.max() == 0 if small.kind == "png" else 0 < away.mean() < 0.8
        if small.kind == "jpeg":
            assert {layer[1:3] for layer in shown.layer} == {(1, 1)}  # colours at full size


def test_batch_writes_a_sheet_and_can_do_so_afterwards(picture: Path, tmp_path: Path) -> None:
    command = ["batch", picture, "--task", "caption", "-o", tmp_path / "out.jsonl"]
    run(*command, "--html", tmp_path / "sheet.html", "--max-tokens", 2)
    [view] = views(tmp_path / "sheet.html")
    [record] = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert view["confidence"] == pytest.approx(math.exp(record["logprob"] / 2))
    assert view["record"]["text"] == record["text"]
    again = run(*command, "--html", tmp_path / "later", "--max-tokens", 2, "--resume")
    assert again.returncode == 0 and "0 pictures, 1 from before" in one_line(again)
    assert views(tmp_path / "later/index.html")[0]["record"] == view["record"]


# What a person sees and does

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


@pytest.fixture
def page(browser: Page, sheet: Path) -> Iterator[Page]:
    """The sheet, freshly opened; it may fetch and complain of nothing."""
    browser.resize(1280, 900)
    browser.open(sheet)
    browser.settled()
    yield browser
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}
    assert browser.complaints == []
    assert browser.run("document.title") == "Contact sheet"


def shown(page: Page) -> list[int]:
    """The records whose cards are in the page, in the order in which they lie there."""
    place = "c => [c.offsetTop, c.offsetLeft, Number(c.dataset.index)]"
    found = page.run(f"[...document.querySelectorAll('.card')].map({place})")
    return [index for _, _, index in sorted(found)]


def wanted(page: Page, words: str) -> list[int]:
    """What a filter leaves."""
    page.run("filter.value = ''")
    page.click("#filter")
    page.write(words)
    return shown(page)


def count(page: Page, selector: str) -> int:
    return page.run(f"document.querySelectorAll({json.dumps(selector)}).length")


def text(page: Page, selector: str) -> str:
    return page.run(f"document.querySelector({json.dumps(selector)}).innerText")


@needs_chromium
def test_cards_lie_in_order_and_only_those_near_the_window(page: Page) -> None:
    first = shown(page)
    assert first == list(range(len(first))) and 15 <= len(first) < 40
    assert text(page, "#about") == f"{COUNT} pictures · “segment cat ; dog” · shapes · 10 errors"
    page.run("scrollTo(0, 1e6)")
    page.settled()
    page.settled()
    last = shown(page)
    assert last[-1] == COUNT - 1 and last == list(range(last[0], COUNT)) and len(last) < 40


@needs_chromium
def test_the_filter_finds_words_numbers_and_errors(page: Page) -> None:
    assert wanted(page, "word31") == [31]
    assert wanted(page, "ALBUM/00007") == [7]
    assert wanted(page, "error") == list(range(9, COUNT, 10))
    assert wanted(page, '"is no picture"') == list(range(9, COUNT, 10))
    assert wanted(page, "segment") == []  # all share the prompt
    assert text(page, "#none") == "No picture fits the filter."
    expected = [i for i in range(COUNT) if i % 10 != 9 and i % 3 == 2 and i % 8 < 2]
    assert wanted(page, "conf<0.3 boxes>=2") == expected
    assert text(page, "#count") == f"{len(expected)} of {COUNT}"
    assert wanted(page, '"word31" conf<0.1') == []


@needs_chromium
def test_a_card_opens_with_its_boxes_and_keys_go_on(page: Page) -> None:
    page.click(".card", 2)
    assert page.run("dialog.open") and text(page, "#open-name").startswith("00002.png")
    drawn = "dialog .stage svg "
    counts = [count(page, drawn + part) for part in ("image", ".box", ".mask", "text")]
    assert counts == [1, 2, 2, 2]
    assert page.run("document.querySelector('dialog .stage svg').getAttribute('viewBox')") == (
        "0 0 120 80"
    )
    assert [count(page, ".facts li"), count(page, ".facts script, .facts img")] == [2, 0]
    assert HOSTILE.replace("\u2028", "") in text(page, ".facts li").replace("\u2028", "")
    page.click("summary")
    assert '"word2"' in text(page, ".facts pre")
    page.key("ArrowRight")
    assert text(page, "#open-name").startswith("00003.png")
    assert "nothing found" in text(page, ".facts")
    assert page.run("document.querySelector('details').open")  # stays so
    page.click(".step", 0)
    assert text(page, "#open-name").startswith("00002.png")
    page.key("Escape")
    assert not page.run("dialog.open")
    assert page.run("document.activeElement.dataset.index") == "2"


@needs_chromium
def test_arrows_move_between_cards_and_enter_opens(page: Page) -> None:
    columns = page.run("columns")
    page.key("ArrowRight")
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowRight"):
        page.key(key)
    assert page.run("document.activeElement.dataset.index") == str(1 + 3 * columns)
    assert page.run("document.activeElement.getBoundingClientRect().bottom") <= 900
    page.key("Enter")
    assert text(page, "#open-name").startswith(f"{1 + 3 * columns:05}.png")
    page.click("dialog .close")
    page.key("/")
    assert page.run("document.activeElement.id") == "filter"


@needs_chromium
def test_an_error_says_why_and_has_no_picture(page: Page) -> None:
    wanted(page, "error")
    assert text(page, ".card .stage").startswith(f"is no picture {HOSTILE.split('&')[0]}")
    assert text(page, ".card .said .text") == "no answer"
    fits = "(c => c.scrollWidth <= c.clientWidth)(document.querySelector('.card .stage'))"
    assert page.run(fits)
    page.click(".card", 0)
    assert HOSTILE.split("&")[0] in text(page, ".facts .wrong")
    assert count(page, "dialog svg") == 0
    shape = "(r => [r.width, r.height])(dialog.getBoundingClientRect())"
    wide, high = page.run(shape)
    assert wide <= 560 and high < 500
    assert page.run("getComputedStyle(stage).display") == "none"
    page.key("Escape")
    wanted(page, "word1")
    page.click(".card", 0)
    assert page.run(shape)[0] > 1000 and page.run("getComputedStyle(stage).display") == "grid"
    page.key("Escape")


@needs_chromium
def test_tiny_pictures_have_square_pixels_and_narrow_ones_a_frame(page: Page, tmp_path) -> None:
    draw_picture().resize((24, 20)).save(tmp_path / "a.png")
    draw_picture().resize((3, 800)).save(tmp_path / "b.png")
    draw_picture().save(tmp_path / "c.png")
    items = [
        Item(i, name, "ocr", tmp_path / name) for i, name in enumerate(("a.png", "b.png", "c.png"))
    ]
    sizes = [
        {"width": 24, "height": 20},
        {"width": 3, "height": 800},
        {"width": 448, "height": 448},
    ]
    answers = [
        {**item.head, **size, "text": "", "logprobs": [0.0]}
        for item, size in zip(items, sizes, strict=True)
    ]
    contact_sheet(items, iter(answers), tmp_path / "sheet.html", lambda *_: None)
    page.open(tmp_path / "sheet.html")
    page.settled()
    looks = (
        "[...document.querySelectorAll('.card image')].map(i => getComputedStyle(i).imageRendering)"
    )
    assert page.run(looks) == ["pixelated", "auto", "auto"]
    framed = (
        "[...document.querySelectorAll('.card svg')].map(s => s.querySelectorAll('.frame').length)"
    )
    assert page.run(framed) == [0, 1, 0]


@needs_chromium
def test_unsure_ones_come_first_when_asked(page: Page) -> None:
    page.run("at('sort').value = 'unsure'; at('sort').dispatchEvent(new Event('change'))")
    found = shown(page)
    assert found[:10] == list(range(9, COUNT, 10))  # errors
    assert {i % 8 for i in found[10:20]} == {0}
    page.run("at('sort').value = 'sure'; at('sort').dispatchEvent(new Event('change'))")
    assert {i % 8 for i in shown(page)[:8]} == {7}


@needs_chromium
def test_labels_and_bars_choose(page: Page) -> None:
    page.run("filter.value = ''; arrange()")
    assert count(page, "#labels .label") == 2
    number = page.run(
        "[...document.querySelectorAll('.label b')].findIndex(b => b.innerText === 'cat')"
    )
    page.click(".label", number)
    assert page.run("filter.value") == '"cat"'
    assert set(shown(page)) <= set(range(2, COUNT, 3))
    page.click(".label", number)
    assert page.run("filter.value") == ""
    page.click("#bars button", 2)
    assert page.run("filter.value") == "conf>=0.10 conf<0.15"
    assert set(shown(page)) == {i for i in range(0, COUNT, 8) if i % 10 != 9}


@needs_chromium
def test_it_fits_a_narrow_window(page: Page) -> None:
    page.resize(380, 700)
    page.settled()
    assert page.run("columns") == 1
    assert page.run("document.documentElement.scrollWidth") <= 380
    page.click(".card", 0)
    box = page.run("(r => [r.left, r.right])(dialog.getBoundingClientRect())")
    assert box == [0, 380]
    page.key("Escape")


@needs_chromium
def test_ten_thousand_records_stay_a_few_cards(page: Page, tmp_path: Path) -> None:
    make_sheet(tmp_path / "many.html", 10_000)
    page.open(tmp_path / "many.html")
    page.settled()
    assert text(page, "#about").startswith("10,000 pictures")
    assert len(shown(page)) < 40
    for place in (200_000, 399_000, 1e7):
        page.run(f"scrollTo(0, {place})")
        page.settled()
        page.settled()
        assert 10 <= len(shown(page)) < 60
    assert shown(page)[-1] == 9999
    assert wanted(page, "word9998 boxes>0") == [9998]
