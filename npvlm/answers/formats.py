"""Boxes of several pictures in the formats that other tools read: COCO, YOLO, CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from npvlm.answers.masks import run_lengths

if TYPE_CHECKING:
    from npvlm.answers.detection import Detection

COLUMNS = ("image", "label", "x0", "y0", "x1", "y1", "confidence")


def label_numbers(detections: Iterable[Detection]) -> dict[str, int]:
    """Number the labels from 0: those asked for, in their order, then others as they come."""
    numbers: dict[str, int] = {}
    for detection in detections:
        for label in [*detection.labels, *(box.label for box in detection.boxes)]:
            numbers.setdefault(label, len(numbers))
    return numbers


def coco(detections: Sequence[Detection]) -> dict[str, Any]:
    """A COCO dataset: images, categories and annotations, counted from 1.

    An annotation has bbox as x, y, width, height in pixels, its score, and for a mask the run
    lengths as segmentation.
    """
    numbers = label_numbers(detections)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, detection in enumerate(detections, 1):
        size = {"width": detection.width, "height": detection.height}
        images.append({"id": number, "file_name": detection.answer.image, **size})
        for box in detection.boxes:
            wide, high = box.x1 - box.x0, box.y1 - box.y0
            annotation: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": numbers[box.label] + 1,
                "bbox": [round(value, 2) for value in (box.x0, box.y0, wide, high)],
                "area": round(wide * high, 2),
                "iscrowd": 0,
                "score": box.confidence,
            }
            if box.painted is not None:
                mask = detection.mask(box)
                annotation["area"] = int(np.count_nonzero(mask))
                counts = run_lengths(mask)
                annotation["segmentation"] = {"size": list(mask.shape), "counts": counts}
            annotations.append(annotation)
    categories = [{"id": number + 1, "name": label} for label, number in numbers.items()]
    return {"images": images, "categories": categories, "annotations": annotations}


def yolo_lines(detection: Detection, numbers: dict[str, int]) -> list[str]:
    """One line for each box: class, centre x, centre y, width, height, in parts of the picture.

    A label that has no number yet gets the next one.
    """
    lines = []
    for box in detection.boxes:
        x0, x1 = box.x0 / detection.width, box.x1 / detection.width
        y0, y1 = box.y0 / detection.height, box.y1 / detection.height
        values = ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
        number = numbers.setdefault(box.label, len(numbers))
        lines.append(" ".join([str(number), *(f"{value:.6f}" for value in values)]))
    return lines


def csv_line(values: Iterable[object]) -> str:
    """One line of CSV, quoted where it must be."""
    line = io.StringIO()
    csv.writer(line).writerow(values)  # its line ends, \r\n, are what is quoted in a value
    return line.getvalue().removesuffix("\r\n")


def csv_lines(detection: Detection) -> list[str]:
    """One line of CSV for each box, under COLUMNS; corners in pixels."""
    return [
        csv_line(
            [
                detection.answer.image,
                box.label,
                *(round(edge, 2) for edge in (box.x0, box.y0, box.x1, box.y1)),
                round(box.confidence, 4),
            ]
        )
        for box in detection.boxes
    ]
