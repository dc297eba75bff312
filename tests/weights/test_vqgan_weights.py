"""VQGAN checkpoints, plain and with attention, against the reference ids and images."""

import json

import jax
import numpy as np
import pytest

from vlm_jax.models import vqgan as model
from vlm_jax.nn import functional
from vlm_jax.weights import convert, export, readers, shipped, vqgan

VARIANTS = [("vqgan", "vq"), ("vqgan_attn", "vqattn")]


def config_of(golden_lvm, name):
    return json.loads((golden_lvm / "config.json").read_text())[name]


@pytest.mark.parametrize("name, arrays_of", VARIANTS)
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_reference_ids_and_images(tmp_path, golden_lvm, name, arrays_of, suffix):
    (tmp_path / "config.json").write_text(json.dumps(config_of(golden_lvm, name)))
    source = golden_lvm / f"{name}.safetensors"
    if suffix == ".safetensors":
        (tmp_path / "pytorch_model.safetensors").write_bytes(source.read_bytes())
    else:
        torch = pytest.importorskip("torch")
        tensors = readers.read(source)
        state = {key: torch.tensor(tensors[key]) for key in tensors}
        torch.save(state, tmp_path / "pytorch_model.bin")
    cfg, params = vqgan.load(tmp_path)
    arrays = np.load(golden_lvm / "io.npz")

    @jax.jit
    def there_and_back(params, image01):
        network = functional.Functional(lambda rngs: model.Vqgan(cfg, rngs)).bind(params)
        ids = network.encode(image01)
        return ids, network.decode(ids).transpose(0, 3, 1, 2)

    ids, image = there_and_back(params, arrays[f"{arrays_of}.images_u8"] / np.float32(255))
    np.testing.assert_array_equal(ids, arrays[f"{arrays_of}.ids"])
    np.testing.assert_allclose(image, arrays[f"{arrays_of}.recon"], atol=1e-4)


@pytest.mark.parametrize("name, arrays_of", VARIANTS)
def test_round_trip_is_bit_equal(tmp_path, golden_lvm, name, arrays_of):
    fields = config_of(golden_lvm, name)
    cfg = vqgan.config_from_hf(fields)
    tensors = readers.read(golden_lvm / f"{name}.safetensors")
    params = vqgan.from_hf(tensors, cfg)
    export.write(tmp_path, export.hf(vqgan, params, cfg))
    assert (tmp_path / "pytorch_model.safetensors").exists()
    assert json.loads((tmp_path / "config.json").read_text()) == fields
    back = readers.read(tmp_path)
    assert sorted(back) == sorted(tensors)
    for key in tensors:
        np.testing.assert_array_equal(back[key], tensors[key])


def test_missing_extra_and_misshapen_in_one_error(golden_lvm):
    cfg = vqgan.config_from_hf(config_of(golden_lvm, "vqgan"))
    tensors = dict(readers.read(golden_lvm / "vqgan.safetensors"))
    tensors["quant_conv.beta"] = tensors.pop("quant_conv.bias")
    tensors["post_quant_conv.weight"] = tensors["post_quant_conv.weight"].swapaxes(0, 1)
    with pytest.raises(convert.ConversionError) as caught:
        vqgan.from_hf(tensors, cfg)
    assert sorted(error.split(":")[0] for error in caught.value.errors) == [
        "post_quant_conv.weight",
        "quant_conv.beta",
        "quant_conv.bias",
    ]


def test_attention_weights_do_not_pass_for_the_plain_network(golden_lvm):
    cfg = vqgan.config_from_hf(config_of(golden_lvm, "vqgan_attn") | {"no_attn_mid_block": True})
    tensors = readers.read(golden_lvm / "vqgan_attn.safetensors")
    with pytest.raises(convert.ConversionError, match=r"encoder.mid.attn_1.k.bias: in the chec"):
        vqgan.from_hf(tensors, cfg)


def test_released_config_and_names():
    cfg = model.PRESETS["f16_8192"]
    assert vqgan.config_from_hf(vqgan.config_to_hf(cfg)) == cfg
    shapes = convert.reverted_shapes(vqgan.abstract_params(cfg), vqgan.HF_RULES)
    # released checkpoint: 277 tensors, 146,244,675 parameters
    assert len(shapes) == 277
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 146_244_675
    assert shapes["decoder.up.4.block.0.conv1.weight"] == (768, 768, 3, 3)


def test_configs_that_are_refused(tmp_path, golden_lvm):
    fields = config_of(golden_lvm, "vqgan")
    with pytest.raises(ValueError, match=r"\['no_attn_mid_block', 'z_channels'\] missing"):
        vqgan.config_from_hf(
            {k: v for k, v in fields.items() if k not in ("z_channels", "no_attn_mid_block")}
        )
    with pytest.raises(ValueError, match="resample_with_conv is 0, not true or false"):
        vqgan.config_from_hf(fields | {"resample_with_conv": 0})
    (tmp_path / "x.safetensors").write_bytes((golden_lvm / "vqgan.safetensors").read_bytes())
    with pytest.raises(FileNotFoundError, match="config.json not found.*f16_8192"):
        vqgan.load(tmp_path)


def in_torch(state, fields, image):
    """Latents and picture of a network without attention, written from the specification."""
    import torch
    from torch.nn import functional as f

    def conv(x, name):
        weight = state[name + ".weight"]
        return f.conv2d(x, weight, state[name + ".bias"], padding=weight.shape[-1] // 2)

    def act(x, name):
        scale, bias = state[name + ".weight"], state[name + ".bias"]
        return f.silu(f.group_norm(x, fields["norm_groups"], scale, bias, 1e-6))

    def block(x, name):
        y = conv(act(x, name + ".norm1"), name + ".conv1")
        y = conv(act(y, name + ".norm2"), name + ".conv2")
        short = name + ".nin_shortcut"
        return (conv(x, short) if short + ".weight" in state else x) + y

    def ends(x, name):
        return block(block(x, name + ".mid.block_1"), name + ".mid.block_2")

    levels = len(fields["channel_mult"])
    h = conv(image, "encoder.conv_in")
    for i in range(levels):
        for j in range(fields["num_res_blocks"]):
            h = block(h, f"encoder.down.{i}.block.{j}")
        h = f.avg_pool2d(h, 2, 2) if i < levels - 1 else h
    h = conv(act(ends(h, "encoder"), "encoder.norm_out"), "encoder.conv_out")
    z = conv(h, "quant_conv")
    codes = state["quantize.embedding.weight"]
    ids = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]), codes).argmin(-1)
    h = codes[ids].reshape(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
    h = ends(conv(conv(h, "post_quant_conv"), "decoder.conv_in"), "decoder")
    for i in reversed(range(levels)):
        for j in range(fields["num_res_blocks"] + 1):
            h = block(h, f"decoder.up.{i}.block.{j}")
        h = f.interpolate(h, scale_factor=2.0, mode="nearest") if i else h
    return ids.reshape(len(z), -1), conv(act(h, "decoder.norm_out"), "decoder.conv_out")


def test_resampling_without_convolutions(tmp_path):
    """Means of 2x2 pixels down, the nearest pixel up, as the reference has it."""
    torch = pytest.importorskip("torch")
    tiny = model.PRESETS["tiny"]
    fields = vqgan.config_to_hf(tiny) | {"resample_with_conv": False}
    cfg = vqgan.config_from_hf(fields)
    assert vqgan.config_to_hf(cfg) == fields
    shapes = convert.reverted_shapes(vqgan.abstract_params(cfg), vqgan.HF_RULES)
    assert not any("sample" in name for name in shapes)
    rng = np.random.default_rng(0)
    state = {
        name: torch.tensor(rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).float()
        for name, shape in shapes.items()
    }
    # Latents of one image differ little from place to place: codes where they are.
    state["quantize.embedding.weight"] = (
        state["quant_conv.bias"]
        + torch.tensor(rng.normal(size=(cfg.num_embeddings, cfg.quantized_width))).float()
    )
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    cfg, params = vqgan.load(tmp_path)
    image01 = rng.uniform(size=(2, 32, 48, 3)).astype(np.float32)

    @jax.jit
    def there_and_back(params):
        network = model.make(cfg).bind(params)
        z = network.encode_latents(image01)
        ids = network.quantize(z)
        return ids, network.decode_latents(network.quantize.codes(ids).reshape(z.shape))

    ids, picture = there_and_back(params)
    want_ids, want = in_torch(state, fields, torch.tensor(image01).permute(0, 3, 1, 2))
    assert len(np.unique(ids)) > 3
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(picture, want.permute(0, 2, 3, 1), atol=2e-5)


def test_names_that_come_with_the_package(tmp_path, golden_lvm, monkeypatch):
    cfg = vqgan.config_from_hf(config_of(golden_lvm, "vqgan"))
    params = vqgan.from_hf(readers.read(golden_lvm / "vqgan.safetensors"), cfg)
    folder = tmp_path / "assets" / "vqgan_mini"
    export.write(folder, export.native("vqgan", params, cfg, "float16"))
    monkeypatch.setattr(shipped.importlib.resources, "files", lambda package: tmp_path)
    got, back = vqgan.load("mini")
    assert got == cfg
    assert back["quant_conv"]["bias"].dtype == np.float32  # small on disk, float32 in use
    np.testing.assert_allclose(back["quant_conv"]["bias"], params["quant_conv"]["bias"], rtol=1e-3)
