"""Tensor names: the published spelling, the others, and the shapes that a config asks for."""

from __future__ import annotations

import pytest

from npvlm.config import parse_config
from npvlm.files.names import canonical_name, expected_shapes
from tests.published import configs, paligemma, paligemma2, saved_by_transformers5


def respelled(name: str, release: str) -> str:
    """Spell a published name as a later release of transformers does."""
    if release == "published":
        return name
    if release == "saved by 5":
        return name.replace("vision_tower.vision_model.", "vision_tower.")
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    name = "model." + name.replace("language_model.model.", "language_model.")
    return name.replace("vision_model.", "") if release == "modules of 5" else name


@pytest.mark.parametrize("release", ["published", "saved by 5", "modules of 4.52", "modules of 5"])
@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_every_spelling_becomes_the_published_one(family: str, release: str) -> None:
    values = saved_by_transformers5(family) | {"tie_word_embeddings": False}
    for name in expected_shapes(parse_config(values)):
        assert canonical_name(respelled(name, release)) == name
        assert canonical_name(respelled(name, release).removeprefix("model.")) == name


def test_modules_have_the_same_alias_table() -> None:
    layer = "language_model.model.layers.3.self_attn.q_rope"
    assert canonical_name("model.language_model.layers.3.self_attn.q_rope") == layer
    assert canonical_name("lm_head") == "language_model.lm_head"
    tower = "vision_tower.vision_model.encoder.layers.0"
    assert canonical_name("model.vision_tower.encoder.layers.0") == tower
    assert canonical_name("multi_modal_projector") == "multi_modal_projector"


def test_names_of_other_models_stay_as_they_are() -> None:
    assert canonical_name("transformer.wte.weight") == "transformer.wte.weight"


# Tensors in the published files, and their parameters with the output layer counted once.
COUNTS = {
    "paligemma-3b-pt-224": (603, 2_923_466_480),
    "paligemma-3b-pt-448": (603, 2_924_351_216),
    "paligemma-3b-pt-896": (603, 2_927_890_160),
    "paligemma2-3b-pt-224": (727, 3_032_242_416),
    "paligemma2-3b-pt-896": (727, 3_036_666_096),
    "paligemma2-10b-pt-448": (903, 9_663_523_568),
    "paligemma2-28b-pt-224": (947, 27_650_487_024),
    "paligemma2-28b-pt-896": (947, 27_654_910_704),
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_published_models_have_as_many_numbers_as_published(name: str) -> None:
    shapes = expected_shapes(parse_config(configs()[name]))
    total = 0
    for shape in shapes.values():
        size = 1
        for side in shape:
            size *= side
        total += size
    assert (len(shapes), total) == COUNTS[name]


def test_shapes_follow_the_config() -> None:
    shapes = expected_shapes(parse_config(paligemma2("3b", 448)))
    layer = "language_model.model.layers.25."
    assert shapes[f"{layer}self_attn.q_proj.weight"] == (2048, 2304)
    assert shapes[f"{layer}self_attn.k_proj.weight"] == (1024, 2304)
    assert shapes[f"{layer}self_attn.o_proj.weight"] == (2304, 2048)
    assert shapes[f"{layer}mlp.down_proj.weight"] == (2304, 9216)
    tower = "vision_tower.vision_model.embeddings."
    assert shapes[f"{tower}position_embedding.weight"] == (1024, 1152)
    assert shapes[f"{tower}patch_embedding.weight"] == (1152, 3, 14, 14)
    assert shapes["multi_modal_projector.linear.weight"] == (2304, 1152)


def test_only_gemma_2_has_norms_around_its_mlp() -> None:
    norm = "language_model.model.layers.0.pre_feedforward_layernorm.weight"
    assert norm in expected_shapes(parse_config(paligemma2("3b", 224)))
    assert norm not in expected_shapes(parse_config(paligemma(224)))


def test_an_output_layer_of_its_own_is_expected_only_where_the_tables_are_not_tied() -> None:
    head = "language_model.lm_head.weight"
    assert head not in expected_shapes(parse_config(paligemma(224)))
    untied = parse_config(paligemma(224) | {"tie_word_embeddings": False})
    assert expected_shapes(untied)[head] == (257216, 2048)
