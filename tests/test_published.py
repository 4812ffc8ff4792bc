"""The table of published checkpoints, held to what is known of them from elsewhere."""

from __future__ import annotations

import pytest

from npvlm.config import parse_config
from npvlm.files.published import PUBLISHED, config_values
from tests.published import paligemma, paligemma2

# Counted over the published files, 257,216 rows of the embedding table included.
PARAMETERS = {
    "paligemma-3b": {224: 2_923_466_480, 448: 2_924_351_216, 896: 2_927_890_160},
    "paligemma2-3b": {224: 3_032_242_416, 448: 3_033_127_152, 896: 3_036_666_096},
    "paligemma2-10b": {224: 9_662_638_832, 448: 9_663_523_568, 896: 9_667_062_512},
    "paligemma2-28b": {224: 27_650_487_024, 448: 27_651_371_760, 896: 27_654_910_704},
}


@pytest.mark.parametrize("size", PARAMETERS)
def test_sizes_are_those_of_the_published_files(size: str) -> None:
    for resolution, parameters in PARAMETERS[size].items():
        model = PUBLISHED[f"{size}-pt-{resolution}"]
        assert (model.parameters, model.bytes) == (parameters, 2 * parameters)


@pytest.mark.parametrize("size", PARAMETERS)
@pytest.mark.parametrize("resolution", [224, 448, 896])
def test_configs_mean_the_same_as_the_published_ones(size: str, resolution: int) -> None:
    family, _, width = size.partition("-")
    theirs = paligemma(resolution) if family == "paligemma" else paligemma2(width, resolution)
    ours = parse_config(config_values(size, resolution))
    assert ours == parse_config(theirs)


def test_every_kind_is_there_at_its_sizes() -> None:
    names = set(PUBLISHED)
    for size in PARAMETERS:
        assert {f"{size}-pt-{side}" for side in (224, 448, 896)} <= names
        assert {f"{size}-mix-{side}" for side in (224, 448)} <= names
        assert f"{size}-mix-896" not in names
    assert {f"paligemma2-{width}-ft-docci-448" for width in ("3b", "10b")} <= names
    tasks = {model.task for model in PUBLISHED.values() if model.task not in (None, "docci")}
    assert len(tasks) == 25 and {"cococap", "refcoco-seg", "rsvqa-lr", "aokvqa-da"} <= tasks
    for task in tasks:
        assert {f"paligemma-3b-ft-{task}-{side}" for side in (224, 448)} <= names
    assert len(names) == 22 + 2 * 25 + 5


def test_names_repositories_and_revisions_go_together() -> None:
    for name, model in PUBLISHED.items():
        assert model.name == name and model.repo == f"google/{name}"
        assert model.revision == ("main" if name.startswith("paligemma2-") else "bfloat16")


def test_what_a_model_is_for_fits_its_name_and_quotes_a_prompt() -> None:
    assert "ocr, detect, segment" in PUBLISHED["paligemma-3b-mix-224"].purpose
    assert PUBLISHED["paligemma-3b-ft-docvqa-896"].purpose.endswith('"QUESTION"')
    assert PUBLISHED["paligemma-3b-ft-cococap-224"].purpose.endswith('"caption en"')
    assert all(len(model.purpose) <= 100 for model in PUBLISHED.values())
