"""NXTP: every tensor of the 1.78 B model accounted for; complete and released files."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from vlm_jax.models import clip as clip_model
from vlm_jax.models import llama as llama_model
from vlm_jax.nn import functional
from vlm_jax.systems.nxtp import network
from vlm_jax.systems.nxtp import weights as nxtp
from vlm_jax.weights import clip, convert, errors, export, lazy, llama, readers

# Ours has no copy of CLIP's logit_scale, which the network never reads.
PARAMETERS = {
    1: 771_921_921,
    3: 1_176_688_641,
    6: 1_783_838_721,
    12: 2_998_138_881,
    32: 7_045_806_081,
}


def full_size(depth=6):
    cfg = network.NxtpConfig(clip_model.VISION_PRESETS["l14"], network.DECODERS[f"llama_{depth}"])
    return network.make(cfg).abstract()


def size_of(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def tiny_config(meta):
    v, d = meta["config"]["vision"], meta["config"]["decoder"]
    return network.NxtpConfig(
        clip_model.VisionConfig(v["width"], v["layers"], v["patch"], v["image_size"]),
        llama_model.LlamaConfig(
            d["vocab_total"],
            d["dim"],
            d["blocks"],
            d["ffn_hidden"],
            d["heads"],
            rms_eps=d["norm_eps"],
            max_tokens=d["max_seq_len"],
        ),
    )


@pytest.fixture(scope="module")
def golden(golden_nxtp):
    meta = json.loads((golden_nxtp / "meta.json").read_text())
    tensors = readers.read(golden_nxtp / "checkpoint.safetensors")
    abstract = network.make(tiny_config(meta)).abstract()
    return tensors, abstract, nxtp.from_tensors(tensors, abstract)


@pytest.mark.parametrize("depth", PARAMETERS)
def test_sizes_of_the_paper(depth):
    assert size_of(full_size(depth)) == PARAMETERS[depth] - 1


def test_sizes_of_the_parts():
    tree = full_size()
    assert size_of(tree["decoder"]) == 1_476_464_640
    assert size_of(tree["projection"]) == 4_194_304
    assert size_of(tree["vision"]) + size_of(tree["projection"]) == 307_374_081 - 1
    assert size_of(tree["vision"]["blocks"]["0"]) == 12_596_224
    table = tree["decoder"]["embed"]
    assert size_of(table) == size_of(tree["decoder"]["lm_head"]) == 131_080_192


def test_every_tensor_of_the_real_model_has_its_place(golden_nxtp):
    manifest = json.loads((golden_nxtp / "real_model_manifest.json").read_text())["model"]
    theirs = {entry["key"].removeprefix("module."): tuple(entry["shape"]) for entry in manifest}
    assert nxtp.shapes(full_size()) == theirs
    released = {e["key"].removeprefix("module.") for e in manifest if e["released"]}
    assert set(nxtp.released_names(theirs, 24)) == released


def test_what_learns_is_what_is_released(golden_nxtp):
    manifest = json.loads((golden_nxtp / "real_model_manifest.json").read_text())["model"]

    learned = {
        p: x for p, x in functional.flatten(full_size()).items() if re.search(nxtp.trained(24), p)
    }
    released = sum(int(np.prod(e["shape"])) for e in manifest if e["released"])
    assert released == 1_556_238_336
    # The reference stores its whole table and masks the gradient of all rows but one.
    assert sum(x.size for x in learned.values()) == released - 32_001 * 4096
    assert "decoder/embed/image" in learned and "decoder/embed/table" not in learned


def test_there_and_back(golden, tmp_path):
    tensors, abstract, params = golden
    made = nxtp.to_upstream(params)
    assert set(made) == set(tensors)
    for name in tensors:
        if not name.endswith("logit_scale"):
            np.testing.assert_array_equal(made[name](), tensors[name])
    export.write(tmp_path, nxtp.checkpoint(params, dtype="float32"))
    again = nxtp.from_tensors(nxtp.read(tmp_path), abstract)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def split_checkpoint(tensors, folder, depth, trained=1):
    """A CLIP file and the names that a released file would hold."""
    vision = {
        name.replace("vision_encoder.", "visual."): tensors[name]
        for name in tensors
        if name.startswith("vision_encoder.") and "proj.weight" != name[15:]
    }
    vision["visual.proj"] = np.zeros((128, 64), np.float32)  # discarded
    vision["token_embedding.weight"] = np.zeros((10, 8), np.float32)
    return vision


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_released_file_over_clip(golden, tmp_path, suffix):
    torch = pytest.importorskip("torch")
    tensors, abstract, params = golden
    if suffix == ".pth":
        nxtp.save(tmp_path / "released.pth", params, dtype="float32")
        stored = torch.load(tmp_path / "released.pth", weights_only=True)
        assert set(stored) == {"epoch", "global_step", "model"}
        path = tmp_path / "released.pth"
    else:
        path = tmp_path / "released"
        export.write(path, nxtp.checkpoint(params, released=True, dtype="float32"))
    with pytest.raises(errors.WeightsError, match="Give the CLIP file"):
        nxtp.from_tensors(nxtp.read(path), abstract)
    # In CLIP's file the blocks that were trained hold other values.
    clip_file = split_checkpoint(tensors, tmp_path, 2)
    for name in clip_file:
        if ".resblocks.1." in name or "ln_post" in name:
            clip_file[name] = clip_file[name] + 1
    torch.save({k: torch.tensor(v) for k, v in clip_file.items()}, tmp_path / "clip.pt")
    combined = nxtp.read(path, tmp_path / "clip.pt")
    jax.tree.map(np.testing.assert_array_equal, nxtp.from_tensors(combined, abstract), params)


@pytest.mark.parametrize("layout", ["hf", "easylm", "native"])
def test_a_padded_table_loses_its_unused_rows(layout):
    base = llama_model.LlamaConfig(20, 16, 1, 24, 2)
    rng = np.random.default_rng(1)
    full = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(x.dtype), llama.abstract_params(base)
    )
    rules = dict(hf=llama.HF_RULES, easylm=llama.EASYLM_RULES, native=convert.NATIVE_RULES)[layout]
    stored = lazy.Tensors(convert.revert(full, rules), "x")
    made = nxtp.decoder_from_llama(stored, dataclasses.replace(base, vocab_size=18 + 2))
    np.testing.assert_array_equal(made["embed"]["table"], full["embed"]["table"][:18])
    head = made["lm_head"]["kernel"]
    np.testing.assert_array_equal(head[:, :18], full["lm_head"]["kernel"][:, :18])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_suffix_decides_the_format(golden, tmp_path, suffix, dtype):
    pytest.importorskip("torch")
    file = tmp_path / f"out{suffix}"
    nxtp.save(file, golden[2], released=False, dtype=dtype)
    assert (file.read_bytes()[:2] == b"PK") == (suffix == ".pth")
    made = nxtp.from_tensors(nxtp.read(file), golden[1])
    close = dict(rtol=2**-8) if dtype == "bfloat16" else dict(rtol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **close), made, golden[2])


def test_files_that_would_not_be_what_they_say(golden, tmp_path):
    with pytest.raises(errors.WeightsError, match="suffix '.npz' names no format; .bin"):
        nxtp.save(tmp_path / "out.npz", golden[2])
    large = functional.flatten(golden[2])
    large["decoder/final_norm/scale"] = large["decoder/final_norm/scale"] * 0 + 1e5
    for suffix in (".pth", ".safetensors"):
        with pytest.raises(errors.WeightsError, match="norm.weight: .* too large for float16"):
            nxtp.save(tmp_path / f"out{suffix}", functional.unflatten(large))
    assert not list(tmp_path.iterdir())


def test_a_tied_head_is_written_out(golden):
    _, abstract, params = golden
    decoder = {name: x for name, x in params["decoder"].items() if name != "lm_head"}
    made = nxtp.to_upstream(params | {"decoder": decoder})
    head = made["language_decoder.output.weight"]()
    np.testing.assert_array_equal(head[:-2], decoder["embed"]["table"])
    assert not head[-2:].any()
    shapes = nxtp.shapes(abstract | {"decoder": decoder})
    assert {name: load().shape for name, load in made.items()} == shapes
    tied = abstract | {"decoder": {k: x for k, x in abstract["decoder"].items() if k != "lm_head"}}
    again = nxtp.from_tensors(lazy.Tensors(made, "file"), tied)
    jax.tree.map(np.testing.assert_array_equal, again["decoder"], decoder)
    with pytest.raises(errors.WeightsError, match="head is not its embedding"):
        nxtp.from_tensors(lazy.Tensors(nxtp.to_upstream(params), "file"), tied)


def test_how_many_blocks_are_trained_follows_the_tower():
    # 18 of 24 is the paper's; the reference's two-block fixture trains its second.
    assert [nxtp.first_trained(n) for n in (24, 2, 1, 12)] == [18, 1, 0, 9]


def test_released_names_of_the_reference(golden, golden_nxtp):
    meta = json.loads((golden_nxtp / "meta.json").read_text())
    made = nxtp.to_upstream(golden[2], released=True)
    assert sorted(made) == sorted(meta["checkpoint_trainable_keys_released_form"])


def test_tower_from_hugging_face(golden, tmp_path):
    tensors, abstract, params = golden
    vision_cfg = dataclasses.replace(clip_model.VisionConfig(128, 2, 14, 42), projection=8)
    projection = {"kernel": np.zeros((128, 8), np.float32)}
    tree = {"vision": {**params["vision"], "projection": projection}}
    stored = lazy.Tensors(convert.revert(tree, clip.HF_RULES), "memory")
    assert clip.vision_config_of(stored) == vision_cfg
    released = lazy.Tensors(nxtp.to_upstream(params, released=True), "memory")
    released = released.renamed(lambda name: name.removeprefix("module."))
    made = nxtp.from_tensors(nxtp.over_clip(released, stored), abstract)
    jax.tree.map(np.testing.assert_array_equal, made, params)
    (tmp_path / "config.json").write_text('{"vision_config": {"hidden_act": "gelu"}}')
    other = lazy.Tensors(convert.revert(tree, clip.HF_RULES), str(tmp_path / "clip.safetensors"))
    with pytest.raises(errors.WeightsError, match="trained with gelu; the reference's tower"):
        nxtp.over_clip(released, other)


def test_a_foreign_or_missing_tensor_is_named(golden):
    tensors, abstract, _ = golden
    loaders = {name: lambda name=name: tensors[name] for name in tensors}
    loaders["language_decoder.extra"] = lambda: np.zeros(2)
    del loaders["language_decoder.norm.weight"]
    with pytest.raises(convert.ConversionError) as caught:
        nxtp.from_tensors(lazy.Tensors(loaders, "file"), abstract)
    assert "language_decoder.extra" in str(caught.value)
    assert "language_decoder.norm.weight" in str(caught.value)


@pytest.mark.parametrize("tied", [False, True])
def test_decoder_from_a_deeper_llama(tied):
    base = llama_model.LlamaConfig(20, 16, 3, 24, 2, tie_embeddings=tied)
    abstract = llama.abstract_params(base)
    rng = np.random.default_rng(1)
    full = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), abstract)
    stored = lazy.Tensors(llama.to_meta(full) if not tied else llama.to_hf(full, base), "x")
    cfg = dataclasses.replace(base, vocab_size=22, depth=2)
    made = nxtp.decoder_from_llama(stored, cfg)
    np.testing.assert_array_equal(made["embed"]["table"], full["embed"]["table"])
    q = made["layers"]["attn"]["q"]["kernel"]
    np.testing.assert_array_equal(q, full["layers"]["attn"]["q"]["kernel"][:2])
    assert made["embed"]["image"].shape == made["embed"]["empty"].shape == (16,)
    expected = network.make_decoder(cfg).abstract()
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, expected)
    if not tied:
        head = made["lm_head"]["kernel"]
        np.testing.assert_array_equal(head[:, :20], full["lm_head"]["kernel"])
        assert 0.0 < np.abs(head[:, 20]).max() <= 0.25 and not head[:, 21].any()
