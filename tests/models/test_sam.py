"""SAM against the outputs of an original: encoder, prompts, decoder, on a tiny model."""

import dataclasses
import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.models import sam
from vlm_jax.models.sam import image_encoder, prompt_encoder
from vlm_jax.nn import functional
from vlm_jax.program import sharding
from vlm_jax.weights import convert, lazy, readers
from vlm_jax.weights import sam as weights

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "nextchat"
CFG = sam.PRESETS["tiny"]


@functools.cache
def io():
    return {key: x for key, x in np.load(FOLDER / "io.npz").items() if key.startswith("sam_")}


@functools.cache
def tensors():
    """The SAM of the tiny NExT-Chat, in Meta's names."""
    whole = readers.read(FOLDER / "checkpoint.safetensors")
    names = [name for name in whole if name.startswith("sam.model.")]
    loaders = {name.removeprefix("sam.model."): lazy.item(whole, name) for name in names}
    return lazy.Tensors(loaders, whole.source)


@functools.cache
def module():
    return sam.make(CFG).bind(weights.from_tensors(tensors(), CFG))


def close(found, expected, *, scale=1e-4):
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=scale * max(1, np.abs(expected).max()))


def channels_last(x):
    return np.moveaxis(x, 1, -1)


def test_image_encoder():
    made = jax.jit(module().encode)(channels_last(io()["sam_in"]))
    close(made, channels_last(io()["sam_image_embedding"]))


def test_prompts():
    encoder = module().prompt_encoder
    close(encoder.grid(), channels_last(io()["sam_dense_pe"])[0])
    close(encoder.boxes(jnp.asarray(io()["sam_boxes"])[None])[0], io()["sam_box_embedding"])
    dense = channels_last(io()["sam_dense_embedding"])
    close(np.broadcast_to(encoder.no_mask[...], dense.shape), dense)


@functools.cache
def decoded(several):
    prompts = np.concatenate([io()["sam_prompt_tokens"], io()["sam_box_embedding"]], axis=1)[None]
    image = channels_last(io()["sam_image_embedding"])
    return jax.jit(lambda *xs: module().masks(*xs, several=several))(image, prompts)


def test_two_masks_of_one_image():
    logits, iou = decoded(False)
    close(logits[0], io()["sam_low_res"], scale=1e-3)
    close(iou[0], io()["sam_iou"], scale=1e-3)
    close(sam.upsample(logits[0], 128), io()["sam_masks_up"], scale=1e-3)


def test_three_masks_of_each_prompt():
    logits, iou = decoded(True)
    close(logits[0], io()["sam_low_res_multi"], scale=1e-3)
    close(iou[0], io()["sam_iou_multi"], scale=1e-3)


# ---- against transformers ----------------------------------------------------------------------


@functools.cache
def drawn(cfg, seed=0):
    """Random parameters that any program can draw: transformers' names in order, one generator."""
    rng = np.random.default_rng(seed)
    rules = weights.HF_RULES
    shapes = weights.join_shapes(convert.reverted_shapes(sam.make(cfg).abstract(), rules))
    made = {}
    for name in sorted(shapes):
        one = np.float32("norm" in name and name.endswith("weight"))
        made[name] = (0.05 * rng.standard_normal(shapes[name])).astype(np.float32) + one
    return weights.from_tensors(in_memory({name: (lambda x=x: x) for name, x in made.items()}), cfg)


def theirs(cfg, params):
    """transformers' SAM with our parameters."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.SamConfig(
        vision_config=dict(
            hidden_size=cfg.width, output_channels=cfg.prompt_width, num_hidden_layers=cfg.depth,
            num_attention_heads=cfg.num_heads, image_size=cfg.image_size, window_size=cfg.window,
            patch_size=cfg.patch_size, mlp_dim=cfg.hidden, mlp_ratio=cfg.hidden / cfg.width,
            global_attn_indexes=list(cfg.global_blocks), num_pos_feats=cfg.prompt_width // 2,
        ),
        prompt_encoder_config=dict(
            hidden_size=cfg.prompt_width, image_size=cfg.image_size, patch_size=cfg.patch_size,
            mask_input_channels=cfg.mask_channels,
        ),
        mask_decoder_config=dict(
            hidden_size=cfg.prompt_width, mlp_dim=cfg.decoder_mlp_width,
            num_hidden_layers=cfg.decoder_depth, num_attention_heads=cfg.decoder_heads,
            num_multimask_outputs=cfg.num_masks, iou_head_hidden_dim=cfg.iou_width,
        ),
    )  # fmt: skip
    model = transformers.SamModel(config).eval()
    state = {name: torch.tensor(load()) for name, load in weights.to_hf(params, cfg).items()}
    shared = "prompt_encoder.shared_embedding.positional_embedding"
    state[shared] = state["shared_image_embedding.positional_embedding"]
    model.load_state_dict(state)
    return model


def run_both(cfg, several):
    """(ours, theirs): masks and estimates of one prompt of two points."""
    torch = pytest.importorskip("torch")
    params = drawn(cfg)
    model, rng = theirs(cfg, params), np.random.default_rng(1)
    image = rng.standard_normal((1, cfg.image_size, cfg.image_size, 3)).astype(np.float32)
    points = rng.uniform(0, cfg.image_size, (1, 1, 2, 2)).astype(np.float32)
    kinds = np.array([[[1, 0]]], np.int32)
    given = dict(
        pixel_values=torch.tensor(np.moveaxis(image, 3, 1)), input_points=torch.tensor(points),
        input_labels=torch.tensor(kinds), multimask_output=several,
    )  # fmt: skip
    with torch.no_grad():
        out = model(**given)
    network = sam.make(cfg).bind(params)
    # They put a point that is none behind the others.
    pad = np.zeros((1, 1, 1, 2), np.float32), np.full((1, 1, 1), -1, np.int32)
    prompts = network.prompt_encoder.points(
        jnp.concatenate([points, pad[0]], 2), jnp.concatenate([kinds, pad[1]], 2)
    )
    ours = jax.jit(lambda image: network.masks(network.encode(image), prompts, several=several))
    return ours(image), (out.pred_masks.numpy(), out.iou_scores.numpy())


@pytest.mark.parametrize("several", [False, True])
def test_points_as_in_transformers(several):
    ours, theirs = run_both(CFG, several)
    for found, expected in zip(ours, theirs):
        close(found, expected, scale=1e-4)


def test_masks_as_prompts_as_in_transformers():
    torch = pytest.importorskip("torch")
    params = drawn(CFG)
    logits = np.random.default_rng(2).standard_normal((2, 1, 32, 32)).astype(np.float32)
    with torch.no_grad():
        dense = theirs(CFG, params).prompt_encoder.mask_embed(torch.tensor(logits)).numpy()
    made = sam.make(CFG).bind(params).prompt_encoder.masks(jnp.asarray(logits[:, 0][None]))
    close(made[0], channels_last(dense))


VIT_B = pathlib.Path(__file__).parents[1] / "golden" / "sam" / "vit_b.npz"


def sampled(encoding, logits, iou):
    """A few of the numbers of a full-size run, channels last."""
    return dict(
        encoding=encoding[0, 3::16, 5::16, ::16], logits=logits[0, :, 7::32, 9::32], iou=iou[0]
    )


@pytest.mark.slow
def test_vit_b_as_in_transformers():
    """Samples of transformers 5's outputs on the random weights of `drawn`, made once."""
    cfg = sam.PRESETS["vit_b"]
    image = np.random.default_rng(1).standard_normal((1, 1024, 1024, 3)).astype(np.float32)
    network = sam.make(cfg).bind(drawn(cfg))
    prompts = network.prompt_encoder.boxes(jnp.array([[[100.0, 200.0, 700.0, 650.0]]]))
    encoding = jax.jit(network.encode)(image)
    logits, iou = jax.jit(lambda *xs: network.masks(*xs, several=True))(encoding, prompts)
    golden = np.load(VIT_B)
    for name, found in sampled(encoding, logits[:, 0], iou[:, 0]).items():
        close(found, golden[name])


# ---- parts and sizes ---------------------------------------------------------------------------


@pytest.mark.parametrize("size, window", [((8, 8), 3), ((6, 6), 3), ((5, 7), 4)])
def test_windows_there_and_back(size, window):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    windows = image_encoder.to_windows(jnp.asarray(x), window)
    rows, cols = (-(-n // window) for n in size)
    assert windows.shape == (2 * rows * cols, window, window, 3)
    np.testing.assert_array_equal(windows[cols, 0, 0], x[0, window, 0])  # second row, first column
    np.testing.assert_array_equal(image_encoder.from_windows(windows, (2, *size), window), x)


def test_prompts_of_one_image_do_not_depend_on_each_other():
    image = channels_last(io()["sam_image_embedding"])
    prompts = np.random.default_rng(0).normal(size=(1, 3, 6, 32)).astype(np.float32)
    decode = jax.jit(module().masks)
    together = decode(image, prompts)
    for k in range(3):
        for whole, one in zip(together, decode(image, prompts[:, k : k + 1])):
            np.testing.assert_allclose(whole[:, k], one[:, 0], atol=1e-5)


def test_each_image_has_its_own_masks():
    """Several images with several prompts each: [B, K] is B times [1, K]."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(2, 8, 8, 32)).astype(np.float32)
    prompts = rng.normal(size=(2, 2, 6, 32)).astype(np.float32)
    decode = jax.jit(module().masks)
    together = decode(images, prompts)
    for b in range(2):
        for whole, one in zip(together, decode(images[b : b + 1], prompts[b : b + 1])):
            np.testing.assert_allclose(whole[b], one[0], atol=1e-5)


def test_pixels_outside_of_the_photo_are_zero():
    image = np.full((1, 4, 6, 3), 200, np.uint8)
    made = sam.normalize(image, np.array([[1, 0, 5, 3]]))
    expected = (200 - np.array(sam.MEAN)) / np.array(sam.STD)
    np.testing.assert_allclose(made[0, 0, 1], expected, rtol=1e-6)
    inside = np.zeros((4, 6), bool)
    inside[:3, 1:5] = True
    np.testing.assert_array_equal(np.any(made[0], axis=-1), inside)
    np.testing.assert_array_equal(
        sam.normalize(jnp.asarray(image), jnp.array([[1, 0, 5, 3]])), made
    )


def sizes(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name, encoder", [
    ("vit_b", 89_670_912), ("vit_l", 308_278_272), ("vit_h", 637_026_048),
])  # fmt: skip
def test_sizes_of_the_released_models(name, encoder):
    parts = sam.make(sam.PRESETS[name]).abstract()
    # 6,220 and the matrix of places, which is no parameter there.
    assert {part: sizes(tree) for part, tree in parts.items()} == {
        "image_encoder": encoder, "prompt_encoder": 6_220 + 256, "mask_decoder": 4_058_340,
    }  # fmt: skip


def test_every_parameter_has_a_rule_and_every_rule_a_parameter():
    abstract = sam.make(CFG).abstract()
    sharding.match(sam.SHARDING_RULES, abstract)
    paths = list(functional.flatten(abstract))
    for rule, _ in sam.SHARDING_RULES:
        assert any(re.search(rule, path) for path in paths), rule


@pytest.mark.parametrize("fields, message", [
    (dict(width=50), "width 50 is not a multiple of 4"),
    (dict(image_size=130), "image_size 130"),
    (dict(global_blocks=(3,)), r"global_blocks \[3\]"),
    (dict(window=0), "window 0"),
])  # fmt: skip
def test_impossible_sizes(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **fields)


def test_other_image_sizes_are_refused():
    with pytest.raises(ValueError, match=r"images of \[64, 64, 3\], but SAM takes \[128, 128, 3\]"):
        module().encode(jnp.zeros((1, 64, 64, 3)))


# ---- weights -----------------------------------------------------------------------------------


def test_every_tensor_of_metas_layout_there_and_back():
    made = weights.to_meta(weights.from_tensors(tensors(), CFG))
    assert set(made) == set(tensors())
    for name, load in made.items():
        np.testing.assert_array_equal(load(), tensors()[name])


def in_memory(loaders):
    return lazy.Tensors(loaders, "a file")


def test_both_layouts_hold_the_same():
    params = drawn(CFG)
    for written in (weights.to_meta(params), weights.to_hf(params, CFG)):
        back = weights.from_tensors(in_memory(written), CFG)
        jax.tree.map(np.testing.assert_array_equal, back, params)


def test_sizes_come_from_the_shapes():
    assert weights.config_of(tensors()) == dataclasses.replace(CFG, mlp_width=192, decoder_heads=1)
    big = sam.PRESETS["vit_b"]
    shapes = weights.join_shapes(
        convert.reverted_shapes(sam.make(big).abstract(), weights.META_RULES)
    )
    empty = {name: (lambda shape=shape: np.broadcast_to(np.float32(0), shape))
             for name, shape in shapes.items()}  # fmt: skip
    assert weights.config_of(in_memory(empty)) == dataclasses.replace(big, mlp_width=3072)


def test_missing_tensors_are_named():
    loaders = {name: lazy.item(tensors(), name) for name in tensors()}
    del loaders["mask_decoder.iou_token.weight"]
    with pytest.raises(convert.ConversionError, match="mask_decoder.iou_token.weight: missing"):
        weights.from_tensors(in_memory(loaders), CFG)


def test_kinds_of_prompts_have_the_order_of_the_tables():
    encoder = module().prompt_encoder
    assert (prompt_encoder.OUTSIDE, prompt_encoder.INSIDE) == (0, 1)
    np.testing.assert_array_equal(
        encoder.kinds[...][prompt_encoder.LOW_CORNER],
        tensors()["prompt_encoder.point_embeddings.2.weight"][0],
    )
