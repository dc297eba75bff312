"""VQGAN against the outputs of the reference implementation, and its shapes and rules."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from vlm_jax.models import vqgan
from vlm_jax.nn import conv, functional

VARIANTS = {"vq": "vqgan", "vqattn": "vqgan_attn"}


def _config(upstream):
    return vqgan.VqganConfig(
        resolution=upstream["resolution"],
        hidden_channels=upstream["hidden_channels"],
        channel_mult=upstream["channel_mult"],
        num_res_blocks=upstream["num_res_blocks"],
        attn_resolutions=upstream["attn_resolutions"],
        mid_attn=not upstream["no_attn_mid_block"],
        z_channels=upstream["z_channels"],
        num_embeddings=upstream["num_embeddings"],
        quantized_width=upstream["quantized_embed_dim"],
        commitment_cost=upstream["commitment_cost"],
    )


def _params(tensors, abstract):
    """Names and layouts of the reference state dict -> ours, independent of weights/vqgan.py."""
    flat = {}
    for path, leaf in functional.flatten(abstract).items():
        name = path.replace("/", ".")
        if name.endswith(".kernel"):
            value = tensors[name.removesuffix("kernel") + "weight"].transpose(2, 3, 1, 0)
        elif name.endswith((".scale", ".embedding")):
            name = name.removesuffix("scale") + ("weight" if name.endswith("scale") else ".weight")
            value = tensors[name]
        else:
            value = tensors[name]
        assert value.shape == leaf.shape, path
        flat[path] = jnp.asarray(value)
    assert len(flat) == len(tensors)
    return functional.unflatten(flat)


@pytest.fixture(scope="module")
def io(golden_lvm):
    return np.load(golden_lvm / "io.npz")


@pytest.fixture(scope="module")
def networks(golden_lvm):
    configs = json.loads((golden_lvm / "config.json").read_text())
    out = {}
    for prefix, name in VARIANTS.items():
        fn = vqgan.make(_config(configs[name]))
        params = _params(load_file(golden_lvm / f"{name}.safetensors"), fn.abstract())
        out[prefix] = fn, params
    return out


def _nchw(x):
    return np.asarray(x).transpose(0, 3, 1, 2)


def _images(io, prefix):
    return jnp.asarray(io[f"{prefix}.images_u8"], jnp.float32) / 255


def _close(actual, expected, atol, rtol=0.0):
    np.testing.assert_allclose(np.asarray(actual), expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("prefix", list(VARIANTS))
def test_matches_reference(networks, io, prefix):
    fn, params = networks[prefix]

    @jax.jit
    def run(params, image, ids):
        model = fn.bind(params)
        encoded = model.encoder(image)
        z = model.quant_conv(encoded)
        quantized = model.straight_through(z)
        return dict(
            encoder_out=encoded,
            prequant=z,
            api_prequant=model.encode_latents(image),
            ids=model.encode(image),
            distances=quantized.distances_bte,
            loss=quantized.loss,
            soft=model.quantize.soft_codes(z),
            postquant=model.post_quant_conv(model.lookup(ids)),
            recon=model.decode(ids),
        )

    out = run(params, _images(io, prefix), io[f"{prefix}.ids"])
    _close(_nchw(out["encoder_out"]), io[f"{prefix}.encoder_out"], 3e-5)
    _close(_nchw(out["prequant"]), io[f"{prefix}.prequant"], 3e-5)
    _close(_nchw(out["api_prequant"]), io[f"{prefix}.prequant"], 3e-5)
    np.testing.assert_array_equal(out["ids"], io[f"{prefix}.ids"])
    assert out["ids"].dtype == jnp.int32
    _close(_nchw(out["postquant"]), io[f"{prefix}.postquant"], 3e-5)
    _close(_nchw(out["recon"]), io[f"{prefix}.recon"], 1e-4)
    _close(out["loss"], io[f"{prefix}.vq_loss"][0], 0.0, 1e-5)
    two = np.sort(np.asarray(out["distances"]), axis=-1)[..., :2]
    _close(two[..., 1] - two[..., 0], io[f"{prefix}.margin"], 2e-4)
    if prefix == "vq":
        _close(out["distances"][:1], io["vq.distances"], 2e-4)
        _close(out["soft"][:1, :4], io["vq.soft_code_first"], 1e-5)


def test_intermediates_match_reference(networks, io):
    fn, params = networks["vq"]

    @jax.jit
    def run(params, image, ids):
        model = fn.bind(params)
        out = {}
        h = model.encoder.conv_in(image)
        for i, level in enumerate(model.encoder.down):
            h = out[f"enc_down_{i}"] = level(h)
        out["enc_mid"] = model.encoder.mid(h)
        h = model.decoder.conv_in(model.post_quant_conv(model.lookup(ids)))
        h = out["dec_mid"] = model.decoder.mid(h)
        out["dec_up_2"] = model.decoder.up[2](h)
        return out

    out = run(params, _images(io, "vq")[:1], io["vq.ids"][:1])
    for name, value in out.items():
        _close(_nchw(value), io[f"vq.{name}"], 1e-4 if name.startswith("dec") else 5e-5)


def test_training_losses_and_gradients_match_reference(networks, io):
    fn, params = networks["vq"]
    image = _images(io, "vq")[io["vqtrain.images_index"]]

    def losses(params, shift):
        model = fn.bind(params)
        quantized = model.straight_through(model.encode_latents(image) + shift)
        recon = model.decode_latents(quantized.codes_byxc)
        return jnp.mean(jnp.square(recon - image)), quantized.loss

    zero = jnp.zeros((2, 8, 8, 16))
    rec_l2, vq_loss = jax.jit(losses)(params, zero)
    _close(rec_l2, io["vqtrain.rec_l2"][0], 0.0, 1e-5)
    _close(vq_loss, io["vqtrain.vq_loss"][0], 0.0, 1e-5)

    both = jax.jit(jax.grad(lambda p, s: sum(losses(p, s)), (0, 1)))
    grad, grad_z = both(params, zero)
    _close(_nchw(grad_z), io["vqtrain.grad_prequant"], 1e-5, 1e-3)
    _close(grad["quantize"]["embedding"], io["vqtrain.grad_codebook"], 1e-5, 1e-3)
    for part, name in [("encoder", "conv_in"), ("decoder", "conv_out")]:
        kernel = np.asarray(grad[part][name]["kernel"]).transpose(3, 2, 0, 1)
        _close(kernel, io[f"vqtrain.grad_{part}_{name}_w"], 1e-5, 1e-3)

    only = jax.jit(jax.grad(lambda p, s: losses(p, s)[1], (0, 1)))
    grad, grad_z = only(params, zero)
    _close(_nchw(grad_z), io["vqtrain.vqloss_only_grad_prequant"], 1e-6, 1e-4)
    expected = io["vqtrain.vqloss_only_grad_codebook"]
    _close(grad["quantize"]["embedding"], expected, 1e-6, 1e-4)


def test_released_sizes():
    counts = vqgan.num_params(vqgan.PRESETS["f16_8192"])
    assert counts == {
        "encoder": 58_693_568,
        "decoder": 87_018_499,
        "quantize": 524_288,
        "quant_conv": 4_160,
        "post_quant_conv": 4_160,
        "total": 146_244_675,
    }
    abstract = functional.flatten(vqgan.make(vqgan.PRESETS["f16_8192"]).abstract())
    assert len(abstract) == 277
    assert abstract["decoder/up/3/block/0/nin_shortcut/kernel"].shape == (1, 1, 768, 512)
    assert abstract["encoder/down/0/downsample/conv/kernel"].shape == (3, 3, 128, 128)
    assert vqgan.PRESETS["f16_8192"].tokens_per_image == 256


@pytest.mark.parametrize("preset", list(vqgan.PRESETS))
def test_preset_shapes(preset):
    cfg = vqgan.PRESETS[preset]
    fn = vqgan.make(cfg)
    image = jax.ShapeDtypeStruct((2, cfg.resolution, cfg.resolution, 3), jnp.float32)
    ids = jax.eval_shape(lambda p, x: fn.bind(p).encode(x), fn.abstract(), image)
    assert (ids.shape, ids.dtype) == ((2, cfg.tokens_per_image), jnp.int32)
    out = jax.eval_shape(lambda p, i: fn.bind(p).decode(i), fn.abstract(), ids)
    assert (out.shape, out.dtype) == (image.shape, jnp.float32)


def test_every_parameter_has_a_rule_and_every_rule_is_used():
    used = set()
    trees = [vqgan.make(cfg).abstract() for cfg in vqgan.PRESETS.values()]
    trees.append(
        vqgan.make(
            vqgan.VqganConfig(
                resolution=16,
                hidden_channels=32,
                channel_mult=(1, 1),
                attn_resolutions=(16,),
                mid_attn=True,
                z_channels=8,
                num_embeddings=8,
                quantized_width=4,
            )
        ).abstract()
    )
    for tree in trees:
        for path, leaf in functional.flatten(tree).items():
            index = next(i for i, (p, _) in enumerate(vqgan.SHARDING_RULES) if re.search(p, path))
            used.add(index)
            spec = vqgan.SHARDING_RULES[index][1]
            assert len(spec) <= len(leaf.shape)
            for size, axis in zip(leaf.shape, spec):
                assert axis is None or size % 8 == 0, path
    assert used == set(range(len(vqgan.SHARDING_RULES)))


def test_distance_ties_go_to_the_lowest_id():
    cfg = vqgan.VqganConfig(
        resolution=8,
        hidden_channels=32,
        channel_mult=(1,),
        z_channels=2,
        num_embeddings=4,
        quantized_width=1,
    )
    fn = vqgan.make(cfg)
    params = fn.init(jax.random.key(0))
    params["quantize"]["embedding"] = jnp.array([[5.0], [1.0], [-1.0], [1.0]])
    z = jnp.array([0.0, 1.0, 4.0, -9.0]).reshape(1, 2, 2, 1)
    ids = fn.bind(params).quantize(z)
    np.testing.assert_array_equal(ids, [[1, 1, 0, 2]])


def test_quantizer_loss_placements():
    z, codes = jnp.full((1, 1, 1, 2), 3.0), jnp.full((1, 1, 1, 2), 1.0)
    for factor_on, factor_z, factor_codes in [("codebook", 1.0, 0.25), ("commitment", 0.25, 1.0)]:

        def loss(z, c, factor_on=factor_on):
            return vqgan.quantizer_loss(z, c, cost=0.25, factor_on=factor_on)

        assert float(loss(z, codes)) == pytest.approx(1.25 * 4.0)
        grad_z, grad_codes = jax.grad(loss, (0, 1))(z, codes)
        _close(grad_z, np.full(z.shape, factor_z * 2 * 2.0 / 2), 1e-6)
        _close(grad_codes, np.full(z.shape, -factor_codes * 2 * 2.0 / 2), 1e-6)
    with pytest.raises(ValueError, match="factor_on='z'"):
        vqgan.quantizer_loss(z, codes, cost=0.25, factor_on="z")


def test_entropy_penalty_by_hand():
    sure = jnp.array([[[0.0, 9.0], [9.0, 0.0]]])  # two tokens, each certain, both codes used
    collapsed = jnp.array([[[0.0, 9.0], [0.0, 9.0]]])
    unsure = jnp.zeros((1, 2, 2))
    _close(vqgan.entropy_penalty(sure, temperature=0.01), -np.log(2), 1e-5)
    _close(vqgan.entropy_penalty(collapsed, temperature=0.01), 0.0, 1e-5)
    _close(vqgan.entropy_penalty(unsure, temperature=0.01), 0.0, 1e-5)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="level width 20 .* norm_groups=32"):
        vqgan.VqganConfig(hidden_channels=20, channel_mult=(1,))
    with pytest.raises(ValueError, match=r"attn_resolutions=\[17\] match no level"):
        vqgan.VqganConfig(attn_resolutions=(17,))
    with pytest.raises(ValueError, match="resolution=100 is not a multiple of 16"):
        vqgan.VqganConfig(resolution=100)
    cfg = vqgan.PRESETS["tiny"]
    model = vqgan.make(cfg)
    with pytest.raises(ValueError, match="image of 62x64 pixels"):
        jax.eval_shape(
            lambda p, x: model.bind(p).encode(x), model.abstract(), jnp.zeros((1, 62, 64, 3))
        )
    with pytest.raises(ValueError, match="63 ids"):
        jax.eval_shape(
            lambda p, i: model.bind(p).decode(i), model.abstract(), jnp.zeros((1, 63), jnp.int32)
        )


def test_bfloat16_compute_stays_close(networks, io):
    fn, params = networks["vq"]
    cfg = fn.bind(params).cfg
    import dataclasses

    low = vqgan.make(dataclasses.replace(cfg, dtype="bfloat16"))
    image = _images(io, "vq")
    z = jax.jit(lambda p: low.bind(p).encode_latents(image))(params)
    assert z.dtype == jnp.float32
    expected = io["vq.prequant"]
    error = np.abs(_nchw(z) - expected).max() / np.abs(expected).max()
    assert 0 < error < 0.05


def test_group_norm_against_its_definition():
    x = np.random.default_rng(0).normal(3.0, 2.0, (2, 5, 4, 6)).astype(np.float32)
    scale, bias = np.arange(1.0, 7.0, dtype=np.float32), np.arange(6.0, dtype=np.float32)
    grouped = x.reshape(2, 5, 4, 3, 2)
    mean = grouped.mean((1, 2, 4), keepdims=True)
    variance = grouped.var((1, 2, 4), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias
    _close(conv.group_norm(jnp.asarray(x), scale, bias, groups=3, eps=1e-6), expected, 1e-4)


def test_upsample_nearest_by_hand():
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]]).reshape(1, 2, 2, 1)
    expected = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    np.testing.assert_array_equal(conv.upsample_nearest(x)[0, :, :, 0], expected)


@pytest.mark.parametrize("side", [4, 48])  # below and above the size where the phases are used
def test_upsample_conv_equals_its_two_steps(side):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1, side, side, 5))
    kernel, bias = jax.random.normal(keys[1], (3, 3, 5, 7)), jax.random.normal(keys[2], (7,))
    expected = conv.conv2d(conv.upsample_nearest(x), kernel, bias)
    _close(conv.upsample_conv2d(x, kernel, bias), expected, 1e-4)
