"""NExT-Chat against the reference: features, spliced vectors, states, logits, boxes."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.systems import nextchat_golden as golden
from vlm_jax.models import clip, sam
from vlm_jax.nn import functional
from vlm_jax.program import sharding
from vlm_jax.systems.nextchat import network

CFG = golden.CFG


@pytest.fixture(scope="module")
def io():
    return golden.io()


@pytest.fixture(scope="module")
def batch(io):
    """The reference's training batch: tokens, images, boxes and their validity."""
    tokens = io["train_input_ids"].astype(np.int32)
    counts = (tokens == CFG.boxes_id).sum(axis=1)
    boxes, valid = golden.boxes_of_rows(io["train_loc_inputs"], counts)
    return tokens, golden.channels_last(io["train_images"]), boxes, valid


def test_added_tokens_have_the_ids_of_the_reference(io):
    ids = (CFG.patch_id, CFG.start_id, CFG.end_id, CFG.at_id, CFG.boxes_id)
    assert ids == (400, 401, 402, 403, 404)
    big = network.PRESETS["7b_336"]
    assert (big.patch_id, big.boxes_id, big.num_image) == (32000, 32004, 576)
    assert CFG.num_image == 16


def test_image_features(io, batch):
    features = golden.call("image_features", batch[1])
    golden.close(features, io["clip_hidden_m2"][:, 1:])
    golden.close(golden.call("image_vectors", batch[1]), io["image_features"])


def test_vectors_that_the_decoder_reads(io, batch):
    golden.close(golden.call("inputs", *batch), io["train_inputs_embeds"])


def test_box_encoder_and_decoder(io, batch):
    module = network.make(CFG).bind(golden.params())
    valid = batch[3]
    embeds = module.box_encoder(jnp.asarray(batch[2]))
    golden.close(embeds[valid], io["train_loc_embeds"])
    golden.close(module.box_decoder(embeds)[valid], io["train_cycle_locs"])


def test_states_and_logits(io, batch):
    seen = io["train_attention_mask"] > 0
    hidden = golden.call("hidden", io["train_inputs_embeds"], seen)
    golden.close(np.asarray(hidden)[seen], io["train_hidden_last"][seen])
    module = network.make(CFG).bind(golden.params())
    golden.close(module.decoder.logits(hidden)[seen], io["train_logits"][seen])
    states = module.decoder.hidden_states(
        x_btd=io["train_inputs_embeds"], positions_bt=jnp.arange(175)[None], valid_bt=seen
    )
    for i, name in ((0, "train_hidden_0"), (1, "train_hidden_1")):
        golden.close(np.asarray(states[i])[seen], io[name][seen])


def test_decoded_boxes(io, batch):
    """Supervised `<at>` of the reference are a part of ours, which are all of a row in order."""
    tokens, (_, length) = batch[0], batch[0].shape
    module = network.make(CFG).bind(golden.params())
    states, valid = module.locations(jnp.asarray(io["train_hidden_last"]), tokens, 4)
    at = [np.flatnonzero(row == CFG.at_id) for row in tokens]
    assert np.asarray(valid).sum() == sum(len(places) for places in at) == 10
    where = [(p // length, int(np.flatnonzero(at[p // length] == p % length)[0]))
             for p in io["train_at_positions"]]  # fmt: skip
    rows, slots = np.array(where).T
    found = np.asarray(states)[rows, slots]
    golden.close(found, io["train_at_hidden"])
    boxes = module.box_decoder(jnp.asarray(found))
    golden.close(boxes, io["train_pred_locs"])
    golden.close(module.box_encoder(boxes), io["train_cycle_embeds"])


@pytest.mark.parametrize("name", ["gen", "region"])
def test_prompts_of_generation(io, name):
    """One with no region, one with two: `<boxes>` tokens read the boxes that are given."""
    tokens = io[f"{name}_input_ids"].astype(np.int32)
    boxes = io[f"{name}_loc_inputs"][None]
    images = golden.channels_last(io[f"{name}_images"])
    golden.close(golden.call("inputs", tokens, images, boxes), io[f"{name}_prompt_embeds"])


def test_forced_answers_give_the_boxes_of_the_reference(io):
    """Left-padded prompts; padding and unknown tokens are not read."""
    tokens = np.concatenate([io["rec_input_ids"], np.tile(io["rec_append_ids"], (2, 1))], axis=1)
    tokens = tokens.astype(np.int32)
    seen = np.pad(io["rec_attention_mask"] > 0, ((0, 0), (0, len(io["rec_append_ids"]))),
                  constant_values=True)  # fmt: skip
    x = golden.call("inputs", tokens, golden.channels_last(io["rec_images"]))
    module = network.make(CFG).bind(golden.params())
    states, valid = module.locations(golden.call("hidden", x, seen), tokens, 1)
    assert np.all(valid)
    golden.close(module.box_decoder(states)[:, 0], io["rec_locs"])


def test_masks_of_the_reference(io):
    """Two rows of one location each, from their states on; and both in one row of one image."""
    cfg = golden.MASKS
    tokens = io["seg_input_ids"].astype(np.int32)
    boxes = io["seg_loc_inputs"][:, None]
    x = golden.call("inputs", tokens, golden.channels_last(io["seg_images"]), boxes, cfg=cfg)
    hidden = golden.call("hidden", x, io["seg_attention_mask"] > 0, cfg=cfg)
    module = network.make(cfg).bind(golden.params(cfg))
    states, valid = module.locations(hidden, tokens, 1)
    assert np.all(valid)
    encoding = golden.call("encode_for_masks", golden.channels_last(io["seg_images_sam"]), cfg=cfg)
    found = module.box_decoder(states)
    logits, iou = golden.call("masks", encoding, states, found, cfg=cfg)
    golden.close(logits, io["seg_low_res"], scale=1e-3)
    golden.close(iou, io["seg_iou_pred"], scale=1e-3)
    golden.close(sam.upsample(logits, 128), io["seg_pred_masks"], scale=1e-3)


def test_several_masks_of_one_image(io):
    """What generation gave for one image with two locations: boxes, masks, estimates."""
    cfg = golden.MASKS
    states = jnp.asarray(io["gen_at_hidden"])[None]
    boxes = network.make(cfg).bind(golden.params(cfg)).box_decoder(states)
    golden.close(boxes[0], io["gen_locs"])
    encoding = golden.call("encode_for_masks", golden.channels_last(io["gen_images_sam"]), cfg=cfg)
    logits, iou = golden.call("masks", encoding, states, boxes, cfg=cfg)
    golden.close(sam.upsample(logits, 128)[0], io["gen_masks"][:, 0], scale=1e-3)
    golden.close(iou[0], io["gen_iou"][:, 0], scale=1e-3)


def test_a_row_without_its_image_does_not_shift_the_others(io, batch):
    tokens, images, boxes, valid = batch
    text = tokens.copy()
    text[1][text[1] == CFG.patch_id] = 5
    alone = np.asarray(golden.call("inputs", text, images, boxes, valid))
    whole = np.asarray(golden.call("inputs", tokens, images, boxes, valid))
    np.testing.assert_array_equal(np.delete(alone, 1, 0), np.delete(whole, 1, 0))
    table = golden.params()["decoder"]["embed"]["table"]
    np.testing.assert_array_equal(
        alone[1][text[1] == 5], np.tile(table[5], ((text[1] == 5).sum(), 1))
    )


def test_empty_slots_reach_neither_vectors_nor_gradients(batch):
    tokens, images, boxes, valid = batch
    broken = np.where(valid[..., None], boxes, np.nan)
    net = network.make(CFG)

    @jax.jit
    def total(part, boxes):
        module = net.bind({**golden.params(), "box_encoder": part})
        return jnp.square(module.inputs(tokens, images, boxes, valid)).sum()

    grads = jax.grad(total)
    ours, theirs = (grads(golden.params()["box_encoder"], x) for x in (boxes, broken))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(theirs))


def test_the_tower_gets_no_gradient(batch):
    net = network.make(CFG)

    @jax.jit
    def total(params):
        return jnp.square(net.bind(params).image_vectors(jnp.asarray(batch[1]))).sum()

    grads = jax.grad(total)(golden.params())
    assert not any(np.any(x) for x in jax.tree.leaves(grads["vision"]))
    assert all(np.any(x) for x in jax.tree.leaves(grads["projector"]))


def test_boxes_are_float32_in_a_network_of_bfloat16(batch):
    cfg = dataclasses.replace(
        CFG, decoder=dataclasses.replace(CFG.decoder, dtype="bfloat16"),
        vision=dataclasses.replace(CFG.vision, dtype="bfloat16"),
    )  # fmt: skip
    x = golden.call("inputs", *batch, cfg=cfg)
    assert x.dtype == jnp.bfloat16
    hidden = golden.call("hidden", x, batch[0] != 0, cfg=cfg)
    states, _ = network.make(cfg).bind(golden.params()).locations(hidden, batch[0], 4)
    boxes = network.make(cfg).bind(golden.params()).box_decoder(states)
    assert boxes.dtype == jnp.float32
    assert not np.array_equal(boxes, boxes.astype(jnp.bfloat16).astype(jnp.float32))


def sizes(tree):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_sizes_of_the_released_model():
    parts = network.make(network.PRESETS["7b_336"]).abstract()
    assert {name: sizes(tree) for name, tree in parts.items()} == {
        "decoder": 6_738_456_576,
        "vision": 303_507_456,
        "projector": 20_979_712,
        "box_encoder": 8_402_944,
        "box_decoder": 8_398_852,
    }


def test_sizes_of_the_released_model_with_masks():
    parts = network.make(network.PRESETS["7b_336_masks"]).abstract()
    assert sizes(parts["mask_prompt"]) == 20_976_640
    assert {name: sizes(tree) for name, tree in parts["sam"].items()} == {
        "image_encoder": 637_026_048,
        "prompt_encoder": 6_220 + 256,  # a buffer of 256 numbers besides
        "mask_decoder": 4_058_340,
    }
    assert sizes(parts) == 7_741_812_788 + 256


def test_start_values():
    params = network.make(CFG).init(jax.random.key(0))
    kernel = np.asarray(params["box_decoder"]["layers"]["0"]["kernel"])
    assert kernel.std() == pytest.approx(0.02, rel=0.05)
    assert not np.any(params["box_decoder"]["layers"]["0"]["bias"])
    for i, bound in ((0, 32**-0.5), (1, 64**-0.5)):
        layer = params["projector"]["layers"][str(i)]
        for values in (layer["kernel"], layer["bias"]):
            assert 0.9 * bound < np.abs(values).max() <= bound


def test_every_parameter_has_a_rule_and_every_rule_a_parameter():
    abstract = network.make(golden.MASKS).abstract()
    sharding.match(network.SHARDING_RULES, abstract)
    paths = list(functional.flatten(abstract))
    unused = [rule for rule, _ in network.SHARDING_RULES
              if not any(re.search(rule, path) for path in paths)]  # fmt: skip
    assert unused == [r"^vision/table$", r"^vision/projection/kernel$"]


@pytest.mark.parametrize("fields, message", [
    (dict(vision=clip.VisionConfig(32, 1, 14, 56, num_heads=4)), "must be at least 2"),
    (dict(projector_depth=0), "projector_depth 0"),
    (dict(decoder=dataclasses.replace(CFG.decoder, vocab_size=5)), "counts the 5 added"),
])  # fmt: skip
def test_impossible_sizes(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **fields)
