"""Boxes as other tools read them: COCO, YOLO and CSV, number by number."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from npvlm.answers.answer import Answer, Seconds
from npvlm.answers.boxes import Box
from npvlm.answers.detection import Detection, Paint, read_detection
from npvlm.answers.formats import coco, csv_line, csv_lines, label_numbers, yolo_lines
from tests.test_boxes import Letters

LEFT_HALF = np.where(np.arange(64) < 32, 1, -1).astype(np.float32) * np.ones((64, 1), np.float32)


def detection(image: str, boxes: list[Box], labels: list[str]) -> Detection:
    answer = Answer(
        image=image,
        prompt="detect cat ; dog",
        text="text",
        token_ids=[5, 6, 1],
        logprobs=[-0.25, -0.5, 0.0],
        nearby=[-0.125, -0.25, 0.0],
        prompt_token_ids=[2, 9],
        stop="eos",
        model="shapes",
        precision="float32",
        seed=None,
        seconds=Seconds(1.0, 2.0, 3.0),
    )
    return Detection(answer, 400, 200, labels, boxes, ["?"], Image.new("RGB", (400, 200), "red"))


@pytest.fixture
def found() -> list[Detection]:
    cat = Box("cat", 40, 20.004, 140.5, 70, confidence=0.876543)
    owl = Box("owl", 100, 100, 120, 140, painted=LEFT_HALF, codes=tuple(range(16)))
    fox = Box('a "fox", red', 0, 0, 400, 200, confidence=0.5)
    return [
        detection("a.png", [cat, owl], ["cat", "dog"]),
        detection("b.png", [fox, cat], ["dog"]),
    ]


def test_labels_are_numbered_as_asked_and_then_as_they_come(found) -> None:
    assert label_numbers(found) == {"cat": 0, "dog": 1, "owl": 2, 'a "fox", red': 3}


def test_a_coco_dataset_says_every_number(found) -> None:
    data = coco(found)
    assert data["images"] == [
        {"id": 1, "file_name": "a.png", "width": 400, "height": 200},
        {"id": 2, "file_name": "b.png", "width": 400, "height": 200},
    ]
    names = ["cat", "dog", "owl", 'a "fox", red']
    assert data["categories"] == [{"id": i, "name": name} for i, name in enumerate(names, 1)]
    cat = {
        "id": 1,
        "image_id": 1,
        "category_id": 1,
        "bbox": [40, 20, 100.5, 50],
        "area": 5024.6,
        "iscrowd": 0,
        "score": 0.876543,
    }
    columns = [*range(100, 110)]  # 40 pixels of each, down the columns
    counts = [100 * 200 + 100, *[40, 160] * (len(columns) - 1), 40]
    counts.append(400 * 200 - sum(counts))
    owl = {
        "id": 2,
        "image_id": 1,
        "category_id": 3,
        "bbox": [100, 100, 20, 40],
        "area": 400,
        "iscrowd": 0,
        "score": 0.0,
        "segmentation": {"size": [200, 400], "counts": counts},
    }
    fox = {
        "id": 3,
        "image_id": 2,
        "category_id": 4,
        "bbox": [0, 0, 400, 200],
        "area": 80000,
        "iscrowd": 0,
        "score": 0.5,
    }
    assert data["annotations"] == [cat, owl, fox, cat | {"id": 4, "image_id": 2}]
    assert json.loads(json.dumps(data)) == data


def test_yolo_counts_from_the_middle_in_parts_of_the_picture(found) -> None:
    numbers = {"cat": 7}
    assert yolo_lines(found[0], numbers) == [
        "7 0.225625 0.225010 0.251250 0.249980",
        "1 0.275000 0.600000 0.050000 0.200000",
    ]
    assert numbers == {"cat": 7, "owl": 1}


def test_csv_reads_back_whatever_the_label(found) -> None:
    assert csv_lines(found[0]) == [
        "a.png,cat,40,20.0,140.5,70,0.8765",
        "a.png,owl,100,100,120,140,0.0",
    ]
    [row, _] = csv.reader(io.StringIO("\n".join(csv_lines(found[1]))))
    assert row == ["b.png", 'a "fox", red', "0", "0", "400", "200", "0.5"]


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "\r\n", 'a"b', "a,b", "", " a "])
def test_any_text_stays_one_value_of_one_row_of_csv(text: str) -> None:
    line = csv_line([text, 1])
    assert list(csv.reader(io.StringIO(line + "\n", newline=""))) == [[text, "1"]]


# --- reading an answer ----------------------------------------------------------------------------

PLAIN = "<loc0000><loc0000><loc0341><loc1023> cat"
MASKED = "<loc0000><loc0000><loc0682><loc0341>" + "<seg009>" * 16 + " dog"


def read(text: str, paint: Paint | None = None, bins: int = 1023) -> list[Box]:
    """The boxes of an answer about a picture of 300 x 90."""
    answer = replace(
        detection("a.png", [], []).answer,
        text=text,
        token_ids=[*text.encode()],
        nearby=[-0.125] * len(text),
    )
    return read_detection(answer, "a.png", (300, 90), Letters(), paint, bins).boxes


def test_an_answer_is_read_at_the_size_of_its_picture_and_in_its_bins() -> None:
    [box] = read(PLAIN)
    assert (box.x0, box.y0, box.x1, box.y1) == (0, 0, 300, 30)
    assert box.confidence == pytest.approx(np.exp(-0.125 * len(PLAIN.replace(" ", ""))))
    [box] = read(PLAIN, bins=1024)
    assert box.x1 == pytest.approx(300 * 1023 / 1024)


def test_only_what_has_codes_is_painted_and_each_with_its_own_mask() -> None:
    asked = []

    def paint(codes: np.ndarray) -> np.ndarray:
        asked.append(codes.tolist())
        return np.arange(len(codes) * 4, dtype=np.float32).reshape(-1, 2, 2)

    other = MASKED.replace("<seg009>", "<seg010>")
    boxes = read(f"{MASKED} ; {PLAIN} ; {other}", paint)
    assert asked == [[[9] * 16, [10] * 16]]
    painted = [
        box.painted if box.painted is None else box.painted.ravel().tolist() for box in boxes
    ]
    assert painted == [[0, 1, 2, 3], None, [4, 5, 6, 7]]
    assert read(PLAIN, paint) and len(asked) == 1
    assert [box.painted for box in read(MASKED)] == [None]
    with pytest.raises(ValueError, match="shorter"):
        read(MASKED, lambda codes: np.empty((0, 2, 2), np.float32))


# --- the result of one picture --------------------------------------------------------------------


def test_a_detection_says_corners_masks_and_outlines(found) -> None:
    told = found[0].to_dict()
    assert json.loads(found[0].to_json()) == told
    assert (told["width"], told["height"], told["unread"]) == (400, 200, ["?"])
    assert told["text"] == "text" and told["logprob"] == -0.75 and "nearby" not in told
    cat, owl = told["boxes"]
    assert cat == {"label": "cat", "box": [40, 20, 140.5, 70], "confidence": 0.876543}
    assert list(owl) == ["label", "box", "confidence", "mask", "polygons"]
    assert owl["mask"] == coco(found)["annotations"][1]["segmentation"]
    assert sorted(owl["polygons"][0]) == sorted([100, 100, 110, 100, 110, 140, 100, 140])


def test_corners_of_outlines_have_two_digits(found) -> None:
    edge = np.array([[1, -2], [1, -2]], np.float32)  # a third of the way from 12.5 to 17.5
    box = Box("", 10, 10, 20, 30, painted=edge)
    [ring] = replace(found[0], boxes=[box]).to_dict()["boxes"][0]["polygons"]
    assert sorted(ring) == sorted([10, 10, 14.17, 10, 14.17, 30, 10, 30])


def test_a_thing_without_a_mask_is_its_whole_box(found) -> None:
    cat, owl = found[0].boxes
    whole = found[0].mask(cat)
    assert whole.shape == (200, 400) and whole[20:70, 40:140].all() and whole.sum() == 50 * 100
    assert found[0].cut_out(cat).getextrema() == ((255, 255), (0, 0), (0, 0), (255, 255))
    cut = found[0].cut_out(owl)
    assert cut.size == (20, 40)
    assert np.array_equal(np.asarray(cut)[..., 3] > 0, np.tile(np.arange(20) < 10, (40, 1)))


def test_a_detection_draws_its_own_picture_with_the_colours_of_what_was_asked(
    found, tmp_path
) -> None:
    found[0].draw(tmp_path / "boxes.png")
    with Image.open(tmp_path / "boxes.png") as drawn:
        assert drawn.tobytes() == found[0].drawn().tobytes()
    pixels = np.asarray(found[0].drawn()).reshape(-1, 3).tolist()
    assert [255, 0, 0] in pixels and [213, 94, 0] in pixels  # the picture, and the first colour
    assert [0, 158, 115] in pixels and [0, 114, 178] not in pixels  # owl is third; no dog is there
