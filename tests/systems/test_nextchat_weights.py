"""NExT-Chat's released layout, there and back; what a file may lack; where training starts."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from tests.systems import nextchat_golden as golden
from vlm_jax.models import clip as clip_model
from vlm_jax.models import llama as llama_model
from vlm_jax.nn import functional
from vlm_jax.program import config as config_lib
from vlm_jax.systems import nextchat
from vlm_jax.systems.nextchat import network, upstream, weights
from vlm_jax.tools import convert_weights
from vlm_jax.weights import clip, convert, errors, export, lazy, llama, readers, sam

CFG = golden.CFG
OF_MASKS = ("sam.", "seg_prompt_mlp.")


def in_memory(tensors, source="a file"):
    return lazy.Tensors({name: (lambda x=x: x) for name, x in tensors.items()}, source)


def without(*beginnings):
    return in_memory(
        {name: x for name, x in golden.tensors().items() if not name.startswith(beginnings)}
    )


def abstract(cfg=CFG):
    return network.make(cfg).abstract()


def test_every_tensor_of_the_released_layout_is_accounted_for():
    theirs = golden.tensors()
    assert len(theirs) == 282
    made = weights.to_upstream(golden.params(golden.MASKS))
    assert set(theirs) - set(made) == {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)
    }
    for name, load in made.items():
        np.testing.assert_array_equal(load(), theirs[name])


def test_names_and_shapes_of_the_released_model():
    """All of 1,324 but the angles of 32 layers."""
    shapes = weights.shapes_of(abstract(network.PRESETS["7b_336_masks"]))
    assert len(shapes) == 1324 - 32
    for name, shape in {
        "model.embed_tokens.weight": (32005, 4096),
        "lm_head.weight": (32005, 4096),
        "model.layers.31.mlp.down_proj.weight": (4096, 11008),
        "model.mm_projector.0.weight": (4096, 1024),
        "model.mm_projector.2.bias": (4096,),
        "model.vision_tower.vision_model.embeddings.class_embedding": (1024,),
        "model.vision_tower.vision_model.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        "model.vision_tower.vision_model.embeddings.position_embedding.weight": (577, 1024),
        "model.vision_tower.vision_model.pre_layrnorm.weight": (1024,),
        "model.vision_tower.vision_model.post_layernorm.bias": (1024,),
        "model.vision_tower.vision_model.encoder.layers.23.self_attn.out_proj.weight": (1024, 1024),
        "model.vision_tower.vision_model.encoder.layers.23.mlp.fc1.weight": (4096, 1024),
        "loc_encoder.0.weight": (2048, 4),
        "loc_encoder.2.weight": (4096, 2048),
        "loc_decoder.0.weight": (2048, 4096),
        "loc_decoder.2.bias": (4,),
        "seg_prompt_mlp.0.weight": (4096, 4096),
        "seg_prompt_mlp.2.weight": (1024, 4096),
        "sam.model.image_encoder.pos_embed": (1, 64, 64, 1280),
        "sam.model.image_encoder.patch_embed.proj.weight": (1280, 3, 16, 16),
        "sam.model.image_encoder.blocks.30.attn.qkv.weight": (3840, 1280),
        "sam.model.image_encoder.blocks.30.attn.rel_pos_w": (27, 80),
        "sam.model.image_encoder.blocks.31.attn.rel_pos_h": (127, 80),
        "sam.model.image_encoder.neck.2.weight": (256, 256, 3, 3),
        "sam.model.prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128),
        "sam.model.prompt_encoder.point_embeddings.3.weight": (1, 256),
        "sam.model.prompt_encoder.mask_downscaling.6.weight": (256, 16, 1, 1),
        "sam.model.mask_decoder.mask_tokens.weight": (4, 256),
        "sam.model.mask_decoder.transformer.layers.1.cross_attn_image_to_token.q_proj.weight": (
            128,
            256,
        ),
        "sam.model.mask_decoder.output_upscaling.0.weight": (256, 64, 2, 2),
        "sam.model.mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (32, 256),
        "sam.model.mask_decoder.iou_prediction_head.layers.2.bias": (4,),
    }.items():
        assert shapes[name] == shape, name


def test_a_projector_of_one_matrix_has_no_number():
    cfg = dataclasses.replace(CFG, projector_depth=1)
    names = convert.reverted_shapes(abstract(cfg), weights.rules(1))
    assert {name for name in names if "mm_projector" in name} == {
        "model.mm_projector.weight", "model.mm_projector.bias",
    }  # fmt: skip
    params = network.make(cfg).init(jax.random.key(0))
    tensors = {name: load() for name, load in weights.to_upstream(params).items()}
    back = weights.from_tensors(in_memory(tensors), abstract(cfg))
    np.testing.assert_array_equal(
        back["projector"]["layers"]["0"]["kernel"], params["projector"]["layers"]["0"]["kernel"]
    )


@pytest.mark.parametrize("missing", ["model.mm_projector.2.bias", "loc_decoder.0.weight"])
def test_missing_tensors_are_named(missing):
    tensors = without(missing)
    with pytest.raises(convert.ConversionError, match=re.escape(missing)):
        weights.from_tensors(tensors, abstract())


def test_unknown_tensors_are_named():
    tensors = in_memory({**golden.tensors(), "model.extra.weight": np.zeros(3, np.float32)})
    with pytest.raises(convert.ConversionError, match="model.extra.weight"):
        weights.from_tensors(tensors, abstract())


def test_stages_1_and_2_have_neither_tower_nor_sam():
    stage2 = without("model.vision_tower.", *OF_MASKS)
    found = weights.from_tensors(stage2, abstract(golden.MASKS))
    assert sorted(found) == ["box_decoder", "box_encoder", "decoder", "projector"]
    np.testing.assert_array_equal(
        found["decoder"]["embed"]["table"], golden.params()["decoder"]["embed"]["table"]
    )


def test_a_model_without_masks_leaves_those_of_the_file():
    assert sorted(weights.from_tensors(golden.tensors(), abstract())) == [
        "box_decoder", "box_encoder", "decoder", "projector", "vision",
    ]  # fmt: skip


def clip_file(tmp_path, layout):
    """The golden's tower with other values, as a CLIP file."""
    cfg = clip_model.VisionConfig(64, 3, 14, 56, projection=8)
    text = clip_model.TextConfig(32, 1, 8, vocab_size=20, max_tokens=8, num_heads=2)
    params = clip_model.make(clip_model.ClipConfig(cfg, text)).init(jax.random.key(3))
    params = jax.tree.map(np.asarray, params)
    if layout == "openai":
        written = clip.openai_checkpoint(params, "float32")
        export.write_file(tmp_path / "clip.safetensors", written)
        return tmp_path / "clip.safetensors", params["vision"]
    export.write(tmp_path / "clip", export.hf(clip, params, clip_model.ClipConfig(cfg, text)))
    return tmp_path / "clip", params["vision"]


@pytest.mark.parametrize("layout", ["openai", "hf"])
def test_the_tower_comes_from_a_clip_file(tmp_path, layout):
    path, tower = clip_file(tmp_path, layout)
    wide = dataclasses.replace(CFG, vision=clip_model.VisionConfig(64, 3, 14, 56))
    theirs = {name: x for name, x in golden.tensors().items()
              if not name.startswith((*OF_MASKS, "model.mm_projector.0"))}  # fmt: skip
    theirs["model.mm_projector.0.weight"] = np.zeros((64, 64), np.float32)
    theirs["model.mm_projector.0.bias"] = np.zeros(64, np.float32)
    tensors = weights.over_clip(in_memory(theirs), clip.read(path))
    found = functional.flatten(weights.from_tensors(tensors, abstract(wide))["vision"])
    expected = functional.flatten(tower)
    del expected["projection/kernel"]
    assert set(found) == set(expected)
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], x.astype(np.float16).astype(np.float32))
    alone = weights.vision_from_clip(clip.read(path), wide.vision)
    jax.tree.map(np.testing.assert_array_equal, functional.flatten(alone), found)


def test_the_tower_has_the_rounding_of_float16():
    name = "model.vision_tower.vision_model.pre_layrnorm.weight"
    value = np.full(32, 1 / 3, np.float32)
    found = weights.from_tensors(in_memory({**golden.tensors(), name: value}), abstract())
    np.testing.assert_array_equal(
        found["vision"]["pre_norm"]["scale"], np.full(32, np.float16(1 / 3), np.float32)
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_and_import(tmp_path, dtype):
    checkpoint = weights.checkpoint(golden.params(), CFG, dtype)
    export.write(tmp_path / "out", checkpoint)
    tensors = weights.read(tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((golden.FOLDER / "config.json").read_text())
    assert {key: fields[key] for key in fields if key in theirs} == {
        key: theirs[key] for key in fields if key in theirs
    }
    assert fields["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"
    assert weights.config_of(tensors, tmp_path / "out", CFG.vision) == dataclasses.replace(
        CFG, decoder=dataclasses.replace(CFG.decoder, max_tokens=1024)
    )
    found = weights.from_tensors(tensors, abstract())
    for path, x in functional.flatten(golden.params()).items():
        rounded = np.asarray(jax.numpy.asarray(x).astype(dtype).astype(np.float32))
        np.testing.assert_array_equal(functional.flatten(found)[path], rounded)


def test_sizes_come_from_the_files(tmp_path):
    tensors = readers.read(golden.FOLDER / "checkpoint.safetensors")
    sizes = weights.config_of(tensors, golden.FOLDER)
    # Neither the default of an MLP's width nor the heads of the mask decoder show in shapes.
    masks = dataclasses.replace(golden.MASKS.sam, mlp_width=192, decoder_heads=1)
    assert sizes == dataclasses.replace(CFG, sam=masks)
    assert weights.config_of(without(*OF_MASKS), golden.FOLDER) == CFG
    with pytest.raises(errors.WeightsError, match="no image tower"):
        weights.config_of(without("model.vision_tower."), golden.FOLDER)
    shutil.copy(golden.FOLDER / "config.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(errors.WeightsError, match="model_type is 'llava'"):
        weights.config_of(tensors, tmp_path)


def test_a_tied_head_is_written_out_and_recognised():
    decoder = dataclasses.replace(CFG.decoder, tie_embeddings=True)
    cfg = dataclasses.replace(CFG, decoder=decoder)
    params = jax.tree.map(np.asarray, network.make(cfg).init(jax.random.key(0)))
    written = weights.checkpoint(params, cfg)
    assert written.shapes["lm_head.weight"] == (405, 64)
    tensors = {name: load() for name, load in written.tensors.items()}
    back = weights.from_tensors(in_memory(tensors), abstract(cfg))
    np.testing.assert_array_equal(
        back["decoder"]["embed"]["table"], params["decoder"]["embed"]["table"]
    )
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    with pytest.raises(errors.WeightsError, match="tie_embeddings=False"):
        weights.from_tensors(in_memory(tensors), abstract(cfg))


@pytest.mark.parametrize("tied", [False, True])
def test_a_vicuna_grows_by_five_rows(tied):
    base = llama_model.LlamaConfig(40, 8, 2, 16, 2, tie_embeddings=tied)
    params = jax.tree.map(np.asarray, llama_model.make(base).init(jax.random.key(1)))
    tensors = in_memory({name: load() for name, load in llama.to_hf(params, base).items()})
    cfg = dataclasses.replace(base, vocab_size=45)
    found = weights.decoder_from_llama(tensors, cfg)
    jax.tree.map(
        np.testing.assert_array_equal,
        functional.flatten(found["layers"]), functional.flatten(params["layers"]),
    )  # fmt: skip
    tables = {"embed": found["embed"]["table"]}
    starts = {"embed": params["embed"]["table"]}
    if not tied:
        tables["head"], starts["head"] = found["lm_head"]["kernel"].T, params["lm_head"]["kernel"].T
    for name, table in tables.items():
        assert table.shape == (45, 8)
        np.testing.assert_array_equal(table[:40], starts[name])
        assert 0 < np.abs(table[40]).max() < 0.1  # <im_patch>, random
        mean = table[:41].mean(axis=0)
        np.testing.assert_allclose(table[41:], np.tile(mean, (4, 1)), rtol=1e-5, atol=1e-7)


def test_rows_behind_the_vocabulary_are_left_out():
    base = llama_model.LlamaConfig(48, 8, 1, 16, 2)
    params = jax.tree.map(np.asarray, llama_model.make(base).init(jax.random.key(1)))
    tensors = in_memory({name: load() for name, load in llama.to_hf(params, base).items()})
    found = weights.decoder_from_llama(tensors, dataclasses.replace(base, vocab_size=45))
    np.testing.assert_array_equal(found["embed"]["table"][:40], params["embed"]["table"][:40])


# ---- where training starts -------------------------------------------------------------------

MODEL = dict(vision=dict(preset="tiny"), decoder=dict(preset="tiny"))


def test_starting_points():
    assert upstream.parse("a/b") == {"nextchat": "a/b"}
    assert upstream.parse("clip=c.pt, llama=7b") == {"clip": "c.pt", "llama": "7b"}
    for bad in ("clap=c.pt", "clip=", "nextchat=a,llama=b"):
        with pytest.raises(config_lib.ConfigError, match="init.upstream"):
            upstream.parse(bad)


def test_a_released_folder_is_a_starting_point():
    task = nextchat.make_task(MODEL)
    found = nextchat.load_upstream(f"nextchat={golden.FOLDER / 'checkpoint.safetensors'}", task)
    jax.tree.map(np.testing.assert_array_equal, found, golden.params())
    other = nextchat.make_task(MODEL | dict(decoder=dict(preset="tiny", num_heads=8)))
    with pytest.raises(errors.WeightsError, match="num_heads=4, the model has 8"):
        nextchat.load_upstream(str(golden.FOLDER / "checkpoint.safetensors"), other)


def test_a_folder_without_a_tower_needs_clip(tmp_path):
    params = {part: tree for part, tree in golden.params().items() if part != "vision"}
    export.write(tmp_path / "stage2", weights.checkpoint(params, CFG))
    task = nextchat.make_task(MODEL)
    with pytest.raises(config_lib.ConfigError, match="no image tower; add the CLIP file"):
        nextchat.load_upstream(str(tmp_path / "stage2"), task)
    path, tower = clip_file(tmp_path, "openai")
    wide = nextchat.make_task(MODEL | dict(vision=dict(preset="tiny", width=64, num_heads=1)))
    with pytest.raises(convert.ConversionError, match="mm_projector"):  # of another width
        nextchat.load_upstream(f"nextchat={tmp_path / 'stage2'},clip={path}", wide)


def test_stage_1_starts_from_clip_and_a_language_model(tmp_path):
    path, tower = clip_file(tmp_path, "hf")
    base = dataclasses.replace(CFG.decoder, vocab_size=400)
    params = jax.tree.map(np.asarray, llama_model.make(base).init(jax.random.key(1)))
    export.write(tmp_path / "vicuna", export.hf(llama, params, base))
    task = nextchat.make_task(
        MODEL | dict(vision=dict(preset="tiny", width=64, num_heads=0, mlp_width=0))
    )
    found = nextchat.load_upstream(f"clip={path},llama={tmp_path / 'vicuna'}", task)
    assert sorted(found) == ["decoder", "vision"]
    abstract = task.network.abstract()
    for part, tree in found.items():
        assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, abstract[part])
    np.testing.assert_array_equal(found["decoder"]["embed"]["table"][:400],
                                  params["embed"]["table"])  # fmt: skip
    np.testing.assert_array_equal(found["vision"]["class_token"],
                                  tower["class_token"].astype(np.float16))  # fmt: skip


def test_the_conversion_command(tmp_path, capsys):
    flags = [f"--from={golden.FOLDER}", f"--to={tmp_path / 'out'}", "--system=nextchat"]
    assert convert_weights.main([*flags, "--format=upstream"]) == 0
    report = capsys.readouterr().out
    assert "282 tensors, upstream layout, float32" in report and "inv_freq" in report
    back = weights.from_tensors(weights.read(tmp_path / "out"), abstract(golden.MASKS))
    jax.tree.map(np.testing.assert_array_equal, back, golden.params(golden.MASKS))
    assert convert_weights.main([*flags, "--format=hf"]) == 1
    assert "has no --format=hf" in capsys.readouterr().err


def test_stage_3_takes_sam_from_its_own_file(tmp_path):
    params = golden.params(golden.MASKS)["sam"]
    tensors = {name: load() for name, load in sam.to_meta(params).items()}
    shapes = {name: x.shape for name, x in tensors.items()}
    loaders = {name: (lambda x=x: x) for name, x in tensors.items()}
    written = export.Checkpoint(loaders, shapes, np.dtype("float32"), "sam", {}, {})
    export.write_file(tmp_path / "sam.safetensors", written)
    task = nextchat.make_task(MODEL | dict(sam=dict(preset="tiny")))
    found = nextchat.load_upstream(f"sam={tmp_path / 'sam.safetensors'}", task)
    jax.tree.map(np.testing.assert_array_equal, found, {"sam": params})
    # A folder that holds the trained mask decoder alone: the file has the rest.
    own = without("sam.model.image_encoder.", "sam.model.prompt_encoder.")
    other = jax.tree.map(lambda x: x + 1, params)
    file = in_memory({name: load() for name, load in sam.to_meta(other).items()})
    found = weights.over_sam(own, file)
    found = weights.from_tensors(found, abstract(golden.MASKS))["sam"]
    jax.tree.map(np.testing.assert_array_equal, found["mask_decoder"], params["mask_decoder"])
    jax.tree.map(np.testing.assert_array_equal, found["image_encoder"], other["image_encoder"])
    with pytest.raises(config_lib.ConfigError, match="the model makes no masks"):
        nextchat.load_upstream(f"sam={tmp_path / 'sam.safetensors'}", nextchat.make_task(MODEL))
