"""config.json: what every published file means, and what is said about a wrong one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from npvlm.config import Config, parse_config, read_config, read_json
from npvlm.errors import NpvlmError
from tests.published import PALIGEMMA2, configs, paligemma, paligemma2, saved_by_transformers5

LONG = 10**400


def changed(values: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Copy a config with one field set, or left out where the value is ... ."""
    copy: dict[str, Any] = json.loads(json.dumps(values))
    *parts, key = path.split(".")
    inside = copy
    for part in parts:
        inside = inside[part]
    if value is ...:
        del inside[key]
    else:
        inside[key] = value
    return copy


def refusal(values: dict[str, Any], generation: dict[str, Any] | None = None) -> str:
    with pytest.raises(NpvlmError) as caught:
        parse_config(values, generation, "m/")
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 400
    return said


@pytest.mark.parametrize("name", configs())
def test_every_published_config_is_read(name: str) -> None:
    config = parse_config(configs()[name])
    resolution = int(name.removesuffix("-bfloat16").rsplit("-", 1)[1])
    assert config.vision_config.num_patches == (resolution // 14) ** 2
    assert config.image_token_index == 257152
    assert config.text_config.vocab_size == 257216
    assert config.projection_dim == config.text_config.hidden_size
    assert config.text_config.tie_word_embeddings
    assert config.eos_token_ids == (1,)


def test_fields_that_paligemma_leaves_out_have_their_class_defaults() -> None:
    config = parse_config(paligemma(224))
    text, vision = config.text_config, config.vision_config
    assert (text.head_dim, text.rms_norm_eps, text.rope_theta) == (256, 1e-6, 10000.0)
    assert text.max_position_embeddings == 8192
    assert (vision.image_size, vision.num_channels, vision.layer_norm_eps) == (224, 3, 1e-6)
    assert vision.head_dim == 72


def test_gemma_1_has_neither_windows_nor_caps() -> None:
    text = parse_config(paligemma(896)).text_config
    assert text.sliding_window is text.query_pre_attn_scalar is None
    assert text.attn_logit_softcapping is text.final_logit_softcapping is None
    assert text.layer_types == ("full_attention",) * 18
    assert text.attention_scale == 256**-0.5


@pytest.mark.parametrize("size", PALIGEMMA2)
def test_gemma_2_slides_in_every_other_layer_the_first_among_them(size: str) -> None:
    text = parse_config(paligemma2(size, 448)).text_config
    assert text.num_hidden_layers == PALIGEMMA2[size][1] == len(text.layer_types)
    assert set(text.layer_types[::2]) == {"sliding_attention"}
    assert set(text.layer_types[1::2]) == {"full_attention"}
    assert (text.sliding_window, text.attn_logit_softcapping) == (4096, 50.0)
    assert text.final_logit_softcapping == 30.0


def test_the_28b_scales_attention_by_another_number_than_head_dim() -> None:
    text = parse_config(paligemma2("28b", 224)).text_config
    assert text.head_dim == 128
    assert text.attention_scale == 144**-0.5


@pytest.mark.parametrize("family", ["gemma", "gemma2"])
def test_the_spellings_of_transformers_5_are_read(family: str) -> None:
    text = parse_config(saved_by_transformers5(family)).text_config
    assert text.rope_theta == 12345.0
    assert text.head_dim == 10
    slides = ("sliding_attention", "full_attention", "full_attention")
    assert text.layer_types == (slides if family == "gemma2" else ("full_attention",) * 3)


def test_image_token_id_is_another_name_of_image_token_index() -> None:
    values = changed(paligemma(224), "image_token_index", ...)
    assert parse_config(values | {"image_token_id": 257152}).image_token_index == 257152
    both = paligemma(224) | {"image_token_id": 7}
    assert "image_token_id is 7, expected image_token_index, which is 257152" in refusal(both)


def test_parts_without_a_type_are_gemma_1_and_siglip() -> None:
    values = changed(paligemma(224), "text_config.model_type", ...)
    values = changed(values, "vision_config.model_type", ...)
    assert parse_config(values) == parse_config(paligemma(224))


def test_parts_that_are_left_out_altogether_are_those_of_the_3b() -> None:
    config = parse_config({"model_type": "paligemma"})
    assert config.text_config.num_hidden_layers == 18
    assert config.text_config.vocab_size == 257152
    assert (config.vision_config.patch_size, config.vision_config.intermediate_size) == (14, 4096)


def test_gelu_means_tanh_in_gemma_1_and_is_refused_in_gemma_2() -> None:
    values = changed(paligemma(224), "text_config.hidden_act", "gelu")
    values = changed(values, "text_config.hidden_activation", "gelu")
    assert parse_config(values) == parse_config(paligemma(224))
    said = refusal(changed(paligemma2("3b", 224), "text_config.hidden_activation", "gelu"))
    assert 'hidden_activation is "gelu", expected "gelu_pytorch_tanh"' in said


def test_soft_caps_can_be_switched_off_by_null() -> None:
    values = changed(paligemma2("3b", 224), "text_config.final_logit_softcapping", None)
    values = changed(values, "text_config.attn_logit_softcapping", None)
    text = parse_config(values).text_config
    assert text.final_logit_softcapping is text.attn_logit_softcapping is None


def test_older_rope_fields_are_read() -> None:
    values = changed(paligemma(224), "text_config.rope_theta", 500.0)
    assert parse_config(values).text_config.rope_theta == 500.0
    values = changed(values, "text_config.rope_scaling", {"type": "default"})
    assert parse_config(values).text_config.rope_theta == 500.0
    values = changed(values, "text_config.rope_parameters", {"rope_theta": 7.0})
    assert parse_config(values).text_config.rope_theta == 500.0  # rope_scaling comes first


@pytest.mark.parametrize(
    ("generation", "top", "text", "found"),
    [
        ({"eos_token_id": [1, 107]}, 5, 6, (1, 107)),
        ({"eos_token_id": 3}, 5, 6, (3,)),
        ({}, 5, 6, (5,)),
        (None, [5, 7, 5], 6, (5, 7)),
        (None, None, [6, 8], (6, 8)),
        (None, ..., 6, (6,)),
        ({"eos_token_id": None}, ..., ..., ()),
        ({"eos_token_id": []}, None, ..., ()),
    ],
)
def test_stop_ids_come_from_the_first_place_that_names_any(
    generation: dict[str, Any] | None, top: Any, text: Any, found: tuple[int, ...]
) -> None:
    values = changed(paligemma2("3b", 224), "eos_token_id", top)
    values = changed(values, "text_config.eos_token_id", text)
    assert parse_config(values, generation).eos_token_ids == found


@pytest.mark.parametrize("given", ["1", -1, 1.0, True, [1, "2"], [[1]], {"a": 1}])
def test_stop_ids_that_are_none_are_refused(given: Any) -> None:
    said = refusal(paligemma(224), {"eos_token_id": given})
    assert said.startswith("m/generation_config.json: eos_token_id is ")


ABSURD = ["12", -1, 0, 1.5, True, [], {}, LONG, 2**31, float("nan"), float("inf")]


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: str(value)[:8])
@pytest.mark.parametrize(
    "field",
    [
        *("text_config.hidden_size", "text_config.num_hidden_layers", "text_config.head_dim"),
        *("text_config.num_attention_heads", "text_config.num_key_value_heads"),
        *("text_config.vocab_size", "text_config.intermediate_size", "text_config.sliding_window"),
        *("vision_config.hidden_size", "vision_config.image_size", "vision_config.patch_size"),
        *("vision_config.num_attention_heads", "vision_config.num_hidden_layers"),
        "projection_dim",
    ],
)
def test_sizes_that_are_none_are_refused_in_a_sentence(field: str, value: Any) -> None:
    said = refusal(changed(paligemma2("3b", 448), field, value))
    assert said.startswith(f"m/config.json: {field} is ")
    assert "expected a whole number from 1" in said


@pytest.mark.parametrize("value", ["1", -1.0, 0, True, [], LONG, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "field",
    [
        *("text_config.rms_norm_eps", "text_config.rope_theta", "vision_config.layer_norm_eps"),
        *("text_config.query_pre_attn_scalar", "text_config.final_logit_softcapping"),
    ],
)
def test_numbers_that_are_none_are_refused_in_a_sentence(field: str, value: Any) -> None:
    said = refusal(changed(paligemma2("3b", 448), field, value))
    assert said.startswith(f"m/config.json: {field} is ")
    assert "expected a finite number above 0" in said


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("text_config", [], "an object"),
        ("vision_config", "siglip", "an object"),
        ("text_config.model_type", "llama", '"gemma" or "gemma2"'),
        ("text_config.model_type", None, '"gemma" or "gemma2"'),
        ("text_config.model_type", ["gemma"], '"gemma" or "gemma2"'),
        ("text_config.attention_bias", True, "false"),
        ("text_config.use_bidirectional_attention", False, "true"),
        ("text_config.num_key_value_heads", 3, "a divisor of num_attention_heads, which is 8"),
        ("text_config.head_dim", 255, "an even number"),
        ("text_config.rope_scaling", {"type": "linear", "factor": 2}, '"default"'),
        ("text_config.rope_parameters", {"rope_type": "yarn"}, '"default"'),
        ("text_config.rope_parameters", {"full_attention": {"rope_theta": 1}}, "one set of values"),
        ("text_config.rope_parameters", {"rope_theta": "x"}, "a finite number above 0"),
        ("text_config.rope_parameters", 3, "an object"),
        ("text_config.partial_rotary_factor", 0.5, "1.0 or 1"),
        ("text_config.layer_types", ["full_attention"], "a list of 26 times"),
        ("text_config.layer_types", [["full_attention"]] * 26, "a list of 26 times"),
        ("text_config.layer_types", ["linear_attention"] * 26, "a list of 26 times"),
        ("text_config.sliding_window", None, "a whole number"),
        ("text_config.per_layer_config", {"0": {"head_dim": 4}}, "none"),
        ("vision_config.model_type", "clip_vision_model", '"siglip_vision_model"'),
        ("vision_config.hidden_act", "gelu", '"gelu_pytorch_tanh"'),
        ("vision_config.vision_use_head", True, "false"),
        ("vision_config.num_channels", 4, "3"),
        ("vision_config.num_attention_heads", 7, "a divisor of hidden_size, which is 1152"),
        ("vision_config.patch_size", 449, "a whole number from 1 to 448"),
        ("tie_word_embeddings", "yes", "true or false"),
        ("image_token_index", -1, "a whole number from 0"),
        ("projection_dim", 2048, "2304, the hidden_size of text_config"),
    ],
)
def test_what_npvlm_does_not_compute_is_refused(field: str, value: Any, expected: str) -> None:
    said = refusal(changed(paligemma2("3b", 448), field, value))
    assert said.startswith("m/config.json: ")
    assert field.split(".")[-1] in said
    assert f"expected {expected}" in said


def test_packed_weights_of_other_programs_are_refused() -> None:
    said = refusal(paligemma(224) | {"quantization_config": {"quant_method": "bitsandbytes"}})
    assert "float32, float16 or bfloat16" in said


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_precision_that_weights_were_packed_for_is_read(precision: str) -> None:
    assert parse_config(paligemma(224)).quantization is None
    entry = {"format": "npvlm", "version": 1, "precision": precision}
    assert parse_config(paligemma(224) | {"quantization": entry}).quantization == precision


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("quantization", 8, "an object"),
        ("quantization.format", "gptq", '"npvlm"; take the model'),
        ("quantization.format", ..., '"npvlm"; take the model'),
        ("quantization.version", 2, "1; convert the original checkpoint again"),
        ("quantization.version", True, "1; convert the original checkpoint again"),
        ("quantization.precision", "int3", '"int8" or "int4"'),
        ("quantization.precision", ["int8"], '"int8" or "int4"'),
    ],
)
def test_a_packing_that_is_unknown_is_refused(field: str, value: Any, says: str) -> None:
    entry = {"format": "npvlm", "version": 1, "precision": "int8"}
    said = refusal(changed(paligemma(224) | {"quantization": entry}, field, value))
    assert said.startswith(f"m/config.json: {field} is ")
    assert f"expected {says}" in said


def test_another_model_is_named() -> None:
    assert "m/config.json is a llava model, expected paligemma" in refusal({"model_type": "llava"})
    assert "of no named model_type" in refusal({"hidden_size": 3})
    assert "of no named model_type" in refusal({"model_type": 7})


def test_values_too_long_for_a_sentence_are_cut() -> None:
    said = refusal(changed(paligemma(224), "text_config.hidden_size", "x" * 5000))
    assert "..." in said
    assert len(refusal({"model_type": "x" * 5000})) < 300


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"\xff\xfe{}", "is no JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is no JSON"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"[1, 2]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
    ],
)
def test_a_file_that_is_no_json_object_is_refused(
    tmp_path: Path, content: bytes, says: str
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(NpvlmError) as caught:
        read_config(tmp_path)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'config.json'} ")
    assert says in said
    assert "\n" not in said


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NpvlmError, match=r"config\.json is missing"):
        read_config(tmp_path)
    with pytest.raises(NpvlmError, match="is not there, expected a folder"):
        read_config(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(NpvlmError, match="is a file, expected a folder"):
        read_config(tmp_path / "file")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(NpvlmError, match="is no regular file"):
        read_json(tmp_path / "config.json")


def test_a_folder_is_read_with_its_generation_config(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(paligemma(448)))
    assert read_config(folder).eos_token_ids == (1,)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 107]}')
    config: Config = read_config(folder)
    assert config.eos_token_ids == (1, 107)


BOMBS = {
    "too large": (b" " * 2**23 + b"{}", "expected at most 8,388,608"),
    "a key twice": (b'{"model_type": "llama", "model_type": "paligemma"}', "is there twice"),
    "objects without end": (b'{"a":' * 2**20, "nested too deeply"),
}


@pytest.mark.parametrize(("content", "says"), BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_asks_for_too_much_or_says_a_thing_twice_is_refused(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(saved_by_transformers5("gemma")))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(NpvlmError, match=says):
        read_config(tmp_path)


def test_a_file_of_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**34)  # a file with holes
    with pytest.raises(NpvlmError, match="17,179,869,184 bytes, expected at most"):
        read_config(tmp_path)


@pytest.mark.parametrize("value", ["\x1b[2J\n", "\ud800", "\u2028", "\x9b2J"])
def test_what_a_file_says_is_printed_and_not_obeyed(value: str) -> None:
    with pytest.raises(NpvlmError) as caught:
        parse_config({"model_type": value})
    said = str(caught.value)
    said.encode()
    assert said.isprintable() and value not in said
