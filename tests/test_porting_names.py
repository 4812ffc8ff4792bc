"""Names: what others call the stages, in every style that is known, and nothing guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from npvlm.errors import UsageError
from npvlm.porting.names import MOST_LAYERS, Found, match, read_map, suggest, unmatched
from npvlm.porting.stages import TEXT, TOWER, stages
from tests.tiny import tiny_config

FAMILIES = {name: [s.name for s in stages(tiny_config(name))] for name in ("gemma", "gemma2")}
FIRST, SECOND = FAMILIES["gemma"], FAMILIES["gemma2"]
V1, T3 = f"{TOWER}.encoder.layers.1", f"{TEXT}.layers.3"
QKV, KV = ("q_proj", "k_proj", "v_proj"), ("k_proj", "v_proj")


def stage_of(name: str, *others: str, wanted: list[str] = FIRST) -> str | None:
    """The one stage that a name is taken for, beside others in the same dump."""
    found = [s for s, place in match([name, *others], wanted).items() if place.name == name]
    assert len(found) < 2
    return found[0] if found else None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage_is_found_under_its_own_name(family: str) -> None:
    names = FAMILIES[family]
    assert match(names, names) == {name: Found(name) for name in names}


@pytest.mark.parametrize("separator", ["/", "_", "-", ":", "."])
def test_the_separator_and_the_case_do_not_matter(separator: str) -> None:
    for stage in SECOND:
        name = stage.replace(".", separator).upper()
        assert match([name], SECOND).get(stage) == Found(name), name


# What a module's hook sees, by every spelling of the module.
MODULES = {
    f"{V1}.self_attn": "vision_tower.vision_model.encoder.layers.1.self_attn.out_proj",
    f"{V1}.self_attn.k_proj": "model.vision_tower.vision_model.encoder.layers.1.self_attn.k_proj",
    f"{V1}.mlp": "model.vision_tower.encoder.layers.1.mlp.fc2",
    f"{V1}.mlp.gelu": "model.vision_tower.vision_model.encoder.layers.1.mlp.activation_fn",
    V1: "model.vision_tower.encoder.layers.1",
    f"{TOWER}.embeddings": "model.vision_tower.embeddings",
    f"{TOWER}.embeddings.patch_embedding": "vision_model.embeddings.patch_embedding",
    f"{TOWER}.post_layernorm": "vision_tower.post_layernorm",
    "multi_modal_projector": "model.multi_modal_projector.linear",
    T3: "model.language_model.layers.3",
    f"{T3}.self_attn": "model.language_model.layers.3.self_attn.o_proj",
    f"{T3}.mlp": "language_model.model.layers.3.mlp.down_proj",
    f"{T3}.self_attn.q_rope": "language_model.layers.3.self_attn.query_states",
    f"{T3}.post_attention_layernorm": "model.language_model.layers.3.post_attention_layernorm",
    f"{TEXT}.norm": "model.language_model.norm",
}


@pytest.mark.parametrize("ending", ["", ".output", ".out", ".0", "/output", ".output.0"])
@pytest.mark.parametrize("stage", MODULES)
def test_module_paths_of_every_release_are_read_with_what_hooks_add(
    stage: str, ending: str
) -> None:
    assert stage_of(MODULES[stage] + ending) == stage


def test_the_output_layer_is_the_logits_only_where_no_soft_cap_follows() -> None:
    assert stage_of("lm_head") == stage_of("language_model.lm_head") == "language_model.logits"
    assert stage_of("lm_head", wanted=SECOND) is None
    assert stage_of("logits", "lm_head") == "language_model.logits"


BIG_VISION = {
    "image": "pixel_values",
    "img/embedding": f"{TOWER}.embeddings.patch_embedding",
    "img/stem": f"{TOWER}.embeddings.patch_embedding",
    "img/with_posemb": f"{TOWER}.embeddings",
    "img/Transformer/encoderblock_1/LayerNorm_0": f"{V1}.layer_norm1",
    "img/Transformer/encoderblock_1/LayerNorm_1": f"{V1}.layer_norm2",
    "img/Transformer/encoderblock_1/MultiHeadDotProductAttention_0/value": f"{V1}.self_attn.v_proj",
    "img/Transformer/encoderblock_1/MultiHeadDotProductAttention_0/out": f"{V1}.self_attn",
    "img/Transformer/encoderblock_1/MlpBlock_0/Dense_0": f"{V1}.mlp.fc1",
    "img/Transformer/encoderblock_1/MlpBlock_0/Dense_1": f"{V1}.mlp",
    "img/encoder/block01/sa": f"{V1}.self_attn",
    "img/encoder/block01/mlp": f"{V1}.mlp",
    "img/encoder/block01/+mlp": V1,
    "img/encoder/block01/+sa": None,
    "img/Transformer/encoder_norm": f"{TOWER}.post_layernorm",
    "img/head": "multi_modal_projector",
    "img/logits": "multi_modal_projector",
    "llm/layers/3/pre_attention_norm": f"{T3}.input_layernorm",
    "llm/layers/3/attn/q_einsum": f"{T3}.self_attn.q_proj",
    "llm/layers/3/attn/encoded": f"{T3}.self_attn.attend",
    "llm/layers/3/attn/attn_vec_einsum": f"{T3}.self_attn",
    "llm/layers/3/mlp/linear": f"{T3}.mlp",
    "llm/final_norm": f"{TEXT}.norm",
    "llm/pre_logits": f"{TEXT}.norm",
    "llm/logits": "language_model.logits",
}
GGUF = {
    "inp_raw": "pixel_values",
    "inp_tokens": "input_ids",
    "inp_pos": "positions",
    "v.patch_embd": f"{TOWER}.embeddings.patch_embedding",
    "v.blk.1.ln1": f"{V1}.layer_norm1",
    "v.blk.1.attn_q": f"{V1}.self_attn.q_proj",
    "v.blk.1.attn_out": f"{V1}.self_attn",
    "v.blk.1.ffn_up": f"{V1}.mlp.fc1",
    "v.post_ln": f"{TOWER}.post_layernorm",
    "mm.0": "multi_modal_projector",
    "mm.input_projection": "multi_modal_projector",
    "blk.3.attn_norm": f"{T3}.input_layernorm",
    "blk.3.attn_k": f"{T3}.self_attn.k_proj",
    "blk.3.attn_output": f"{T3}.self_attn",
    "blk.3.ffn_gate": f"{T3}.mlp.gate_proj",
    "blk.3.ffn_up": f"{T3}.mlp.up_proj",
    "blk.3.ffn_down": f"{T3}.mlp",
    "output_norm": f"{TEXT}.norm",
    "output": "language_model.logits",
}
GEMMA_CPP = {
    "layer_3/pre_att_rms_out": f"{T3}.input_layernorm",
    "layer_3/att_out": f"{T3}.self_attn.attend",
    "layer_3/att_sums": f"{T3}.self_attn",
    "layer_3/pre_ffw_rms_out": f"{T3}.post_attention_layernorm",
    "layer_3/ffw_out": f"{T3}.mlp",
}


@pytest.mark.parametrize(("name", "stage"), [*BIG_VISION.items(), *GGUF.items()])
def test_names_of_big_vision_and_gguf_are_known_each_by_itself(
    name: str, stage: str | None
) -> None:
    assert stage_of(name) == stage


def test_names_of_gemma_cpp_are_known_together() -> None:
    assert match(list(GEMMA_CPP), FIRST) == {s: Found(name) for name, s in GEMMA_CPP.items()}


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("vit.1.q", f"{V1}.self_attn.q_proj"),
        ("vit.embed+pos", f"{TOWER}.embeddings"),
        ("lm.3.q_rope", f"{T3}.self_attn.q_rope"),
        ("decoder_layer_3_mlp", f"{T3}.mlp"),
        ("vision[1].fc1", None),
        ("vision.layers[1].fc1", f"{V1}.mlp.fc1"),
        ("paligemma_with_expert.paligemma.model.language_model.layers.3.mlp", f"{T3}.mlp"),
    ],
)
def test_short_names_are_known_where_they_say_tower_or_decoder(
    name: str, stage: str | None
) -> None:
    assert stage_of(name) == stage


# The decoder's graph: names come before the layer number.
GRAPH = {
    "attn_norm-3": "input_layernorm",
    "Qcur-3": "self_attn.q_proj",
    "Kcur-3": "self_attn.k_proj",
    "Vcur-3": "self_attn.v_proj",
    "Qcur_pos-3": "self_attn.q_rope",
    "kqv_out-3": "self_attn.attend",
    "ffn_gate-3": "mlp.gate_proj",
    "ffn_up-3": "mlp.up_proj",
    "ffn_geglu-3": "mlp.gated",
    "ffn_out-3": "mlp",
    "l_out-3": "",
}


def test_callbacks_of_a_graph_are_read_with_their_layer_number() -> None:
    wanted = {f"{T3}.{name}" if name else T3: Found(key) for key, name in GRAPH.items()}
    assert match(list(GRAPH), FIRST) == wanted


def test_callbacks_of_the_towers_graph_are_told_from_the_decoders() -> None:
    names = ["layer_inp_normed-1", "Qcur-1", "ffn_inp_normed-1", "layer_out-1"]
    inner = ["layer_norm1", "self_attn.q_proj", "layer_norm2"]
    stages_found = [*(f"{V1}.{name}" for name in inner), V1]
    assert match(names, FIRST) == dict(zip(stages_found, map(Found, names), strict=True))


# The norms behind attention.


@pytest.mark.parametrize("name", ["blk.3.ffn_norm", "llm/layers/3/pre_ffw_norm"])
def test_the_norm_before_the_mlp_has_another_name_in_each_family(name: str) -> None:
    assert stage_of(name) == f"{T3}.post_attention_layernorm"
    assert stage_of(name, wanted=SECOND) == f"{T3}.pre_feedforward_layernorm"


def test_a_dump_of_gemma_2_is_known_by_its_norms_where_the_wanted_stages_do_not_tell() -> None:
    wanted = [f"{T3}.post_attention_layernorm", "language_model.logits"]
    names = ["blk.3.ffn_norm", "blk.3.post_attention_norm", "lm_head"]
    assert match(names, wanted) == {wanted[0]: Found(names[1])}


# Fused arrays.


@pytest.mark.parametrize(
    ("name", "module", "part"),
    [
        ("blk.3.attn_qkv", "self_attn", QKV),
        ("model.language_model.layers.3.self_attn.qkv_proj.output", "self_attn", QKV),
        ("llm/layers/3/attn/kv_einsum", "self_attn", KV),
        ("llm/layers/3/mlp/gating_einsum", "mlp", ("gate_proj", "up_proj")),
        ("language_model.model.layers.3.mlp.gate_up_proj", "mlp", ("gate_proj", "up_proj")),
        ("language_model.model.layers.3.mlp.up_gate", "mlp", ("up_proj", "gate_proj")),
    ],
)
def test_a_fused_array_is_found_for_each_stage_in_it(
    name: str, module: str, part: tuple[str, ...]
) -> None:
    assert match([name], FIRST) == {f"{T3}.{module}.{word}": Found(name, part) for word in part}


def test_a_stage_by_itself_is_taken_before_a_fused_array() -> None:
    found = match(["blk.3.attn_qkv", "blk.3.attn_k"], FIRST)
    assert found[f"{T3}.self_attn.k_proj"] == Found("blk.3.attn_k")
    assert found[f"{T3}.self_attn.v_proj"] == Found("blk.3.attn_qkv", QKV)


# What is not guessed.


def test_names_that_do_not_say_whose_they_are_count_where_their_neighbours_do() -> None:
    assert stage_of("layers.1.mlp") is None
    assert stage_of("layers.1.mlp", "layers.0.layer_norm1") == f"{V1}.mlp"
    assert stage_of("layers.3.mlp", "layers.0.input_layernorm") == f"{T3}.mlp"
    both = ("layers.0.layer_norm1", "layers.0.input_layernorm")
    assert stage_of("layers.1.mlp", *both) is None
    assert stage_of("layers.1.mlp", "encoder.layers.0.layer_norm1") is None  # other neighbours


@pytest.mark.parametrize(
    "name",
    [
        "blk.3.attn_q.weight",  # no activation
        "model.vision_tower.embeddings.position_embedding",  # the table
        "model.language_model.embed_tokens",  # scaled or not
        "inp_embd",  # not scaled
        "model.vision_tower.output",
        "language_model.layers.9.mlp",  # there is no such layer
        "language_model.layers.1.blocks.2.mlp",  # which layer
        "language_model.model.layers.0.1",  # the second thing that a layer gives
        "vision_tower.lm_head",
        "paligemma_with_expert.gemma_expert.model.layers.3.mlp",  # not PaliGemma's decoder
        "transformer.wte",
        "",
    ],
)
def test_what_may_be_something_else_is_left_alone(name: str) -> None:
    assert match([name], FIRST) == {}


def test_the_more_exact_of_two_names_wins_whatever_their_order() -> None:
    names = ["model.language_model.layers.3.self_attn.o_proj", f"{T3}.self_attn"]
    for order in (names, names[::-1]):
        assert match(order, FIRST) == {f"{T3}.self_attn": Found(names[1])}
        assert unmatched(order, match(order, FIRST)) == [names[0]]
    names = ["blk.3.q_proj.output", "blk.3.wq", "blk.3.attn_q"]
    for order in (names, names[::-1]):
        assert match(order, FIRST) == {f"{T3}.self_attn.q_proj": Found("blk.3.attn_q")}
    assert match(names[:2], FIRST) == {f"{T3}.self_attn.q_proj": Found("blk.3.wq")}


@given(st.text(max_size=40))
def test_any_name_is_read_without_a_traceback(name: str) -> None:
    found = match([name], FIRST)
    assert set(found) <= set(FIRST) and all(place.name == name for place in found.values())


def test_an_unknown_name_suggests_the_stages_that_come_closest() -> None:
    assert suggest("language_model.model.layers.2.self_attn.qrope", FIRST)[0] == (
        f"{TEXT}.layers.2.self_attn.q_rope"
    )
    assert suggest("0123456789", FIRST) == []


# Maps.


def test_a_map_names_single_stages_and_all_layers(tmp_path: Path) -> None:
    lines = {"input_ids": "tokens", f"{TEXT}.layers.{{i}}.mlp": "dec{i}/ff", V1: "enc1"}
    toml = "\n".join(f'"{stage}" = "{name}"' for stage, name in lines.items())
    (tmp_path / "names.toml").write_text(toml)
    (tmp_path / "names.json").write_text(json.dumps(lines))
    named = read_map(tmp_path / "names.toml")
    assert named == read_map(tmp_path / "names.json")
    assert named["input_ids"] == "tokens" and named[V1] == "enc1"
    assert named[f"{T3}.mlp"] == "dec3/ff" and len(named) == MOST_LAYERS + 2


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("a.toml", "input_ids: tokens", "is no map"),
        ("a.json", "[1]", "expected a name for each stage"),
        ("a.json", '{"input_ids": ', "is no map"),
        ("a.toml", "input_ids = 3", "input_ids is 3, expected the name of an array"),
        ("a.toml", f'{TEXT}.norm = "x"', "put the stage's name in quotes"),
        ("a.toml", '"input_idz" = "x"', "did you mean input_ids?"),
        ("a.toml", f'"{TEXT}.layers.{{i}}.mlp" = "x"', "on one side only"),
    ],
)
def test_a_map_that_is_wrong_is_refused_in_one_sentence(
    tmp_path: Path, file: str, text: str, said: str
) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(UsageError) as refused:
        read_map(tmp_path / file)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_map_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_map(tmp_path / "none.toml")
