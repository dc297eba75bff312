import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from vlm_jax.models import llama
from vlm_jax.nn import functional
from vlm_jax.ops import losses, partition
from vlm_jax.program import sharding
from vlm_jax.weights import llama as weights
from vlm_jax.weights import readers

TINY = llama.LlamaConfig(40, 32, 2, 48, 4, num_kv_heads=2)


@functools.cache
def network(cfg):
    return functional.Functional(lambda rngs: llama.Llama(cfg, rngs))


def apply(cfg, params, method, *args, **kwargs):
    static = {k: kwargs.pop(k) for k in list(kwargs) if isinstance(kwargs[k], bool)}

    @jax.jit
    def run(params, args, kwargs):
        return getattr(network(cfg).bind(params), method)(*args, **kwargs, **static)

    return run(params, args, kwargs)


@functools.cache
def random_params(cfg):
    """Larger than the real initialisation, so that attention is not flat."""
    params = jax.jit(network(cfg).init)(jax.random.key(0))
    return jax.tree.map(lambda x: x * 8 if x.ndim > 2 else x, params)


# ---- the reference ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(golden_lvm):
    fields = json.loads((golden_lvm / "config.json").read_text())["llama"]
    cfg = llama.LlamaConfig(
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        depth=fields["num_hidden_layers"],
        mlp_width=fields["intermediate_size"],
        num_heads=fields["num_attention_heads"],
        max_tokens=fields["max_sequence_length"],
    )
    params = weights.from_hf(readers.read(golden_lvm / "llama.safetensors"), cfg)
    return cfg, params, np.load(golden_lvm / "io.npz")


def decode_layout(reference):
    cfg, params, io = reference
    params, cfg = llama.decode_form(params, cfg)
    return cfg, params, io


@pytest.mark.parametrize("layout", [lambda x: x, decode_layout], ids=["scanned", "decode"])
def test_logits(reference, layout):
    cfg, params, io = layout(reference)
    out = apply(cfg, params, "__call__", io["lm.input_ids"])
    np.testing.assert_allclose(out.logits, io["lm.logits"], atol=2e-4)
    np.testing.assert_allclose(out.hidden[:1], io["lm.hidden_final_norm"], atol=1e-4)
    assert out.logits.dtype == jnp.float32 and out.cache is None

    real = io["lm.attention_mask"].astype(bool)
    masked = apply(cfg, params, "__call__", io["lm.input_ids"], valid_bt=real).logits
    np.testing.assert_allclose(masked[real], io["lm.logits_masked"][real], atol=2e-4)
    assert np.isfinite(masked).all()

    moved = apply(
        cfg, params, "__call__", io["lm.input_ids"][:1], positions_bt=io["lm.position_ids_off100"]
    ).logits
    np.testing.assert_allclose(moved, io["lm.logits_off100"], atol=2e-4)


def test_hidden_states(reference):
    cfg, params, io = reference
    tokens = io["lm.input_ids"][:1]
    embedded = apply(cfg, params, "embed", tokens)
    np.testing.assert_allclose(embedded, io["lm.hidden_embed"], atol=1e-4)
    # One layer and a neutral final norm leave the input of layer 1, normalised.
    short = dataclasses.replace(cfg, depth=1)
    first = jax.tree.map(lambda x: x[:1], params["layers"])
    ones = {"scale": jnp.ones(cfg.width)}
    cut = {**params, "layers": first, "final_norm": ones}
    want = io["lm.hidden_after_layer0"]
    want = want / np.sqrt((want**2).mean(-1, keepdims=True) + cfg.rms_eps)
    got = apply(short, cut, "transform", embedded)[0]
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
@pytest.mark.parametrize("chunked", [False, True])
def test_loss_and_gradients(reference, remat, chunked):
    cfg, params, io = reference
    cfg = dataclasses.replace(cfg, remat=remat)

    @jax.jit
    def loss(params):
        module = network(cfg).bind(params)
        hidden, _ = module.transform(module.embed(io["lm.input_ids"]))
        rest = io["loss.targets"], io["loss.masks"]
        if chunked:
            return losses.chunked_cross_entropy(
                hidden, module.head_matrix(), *rest, mean="row", chunk=24
            )[0]
        return losses.cross_entropy(module.logits(hidden), *rest, mean="row")[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(value, io["loss.masked"][0], rtol=1e-5)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(norm, io["loss.grad_global_norm"][0], rtol=1e-4)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=2e-3)
    close(grads["lm_head"]["kernel"].T, io["loss.grad_lm_head"])
    close(grads["embed"]["table"], io["loss.grad_embed"])
    close(grads["layers"]["attn_norm"]["scale"][0], io["loss.grad_l0_attention_norm"])


def test_perplexity(reference):
    cfg, params, io = reference
    context, target = io["ppl.context_ids"], io["ppl.target_ids"]
    tokens = np.concatenate([context, target], axis=1)
    logits = apply(cfg, params, "__call__", tokens).logits[:, context.shape[1] - 1 : -1]
    logp = losses.token_logp(logits, target)
    np.testing.assert_allclose(logp, io["ppl.token_logprobs"], atol=5e-4)
    np.testing.assert_allclose(np.exp(-logp.mean(1)), io["ppl.perplexity"], rtol=1e-3)


# ---- sizes -----------------------------------------------------------------------------------

COUNTS = {  # 2 V d + L (4 d^2 + 3 d m + 2 d) + d with V = 8292
    "lvm_debug": 2_451_072,
    "lvm_100m": 116_974_720,
    "lvm_300m": 290_968_576,
    "lvm_600m": 648_396_288,
    "lvm_1b": 1_147_119_616,
    "lvm_3b": 3_274_742_400,
    "lvm_7b": 6_544_199_680,
    "lvm_13b": 12_773_094_400,
    "lvm_20b": 20_722_710_528,
    "lvm_30b": 32_213_342_720,
    "smollm2_135m": 134_515_008,
}


@pytest.mark.parametrize("name", llama.PRESETS)
def test_presets(name):
    cfg = llama.PRESETS[name]
    assert llama.num_params(cfg) == COUNTS[name]
    tokens = jax.ShapeDtypeStruct((2, cfg.max_tokens), jnp.int32)
    abstract = network(cfg).abstract()
    out = jax.eval_shape(lambda p, x: network(cfg).bind(p)(x), abstract, tokens)
    assert out.logits.shape == (2, cfg.max_tokens, cfg.vocab_size)
    sharding.match(llama.SHARDING_RULES, abstract)
    decode, decode_cfg = jax.eval_shape(lambda p: llama.decode_form(p, cfg)[0], abstract), None
    decode_cfg = dataclasses.replace(cfg, fused=True, scan_layers=False)
    assert jax.tree.map(lambda x: x.shape, decode) == jax.tree.map(
        lambda x: x.shape, network(decode_cfg).abstract()
    )


def test_presets_of_the_paper():
    head_widths = {name: cfg.head_size for name, cfg in llama.PRESETS.items()}
    assert head_widths["lvm_300m"] == 128
    assert head_widths["lvm_600m"] == 96
    assert head_widths["lvm_3b"] == 100


def test_flops_by_hand():
    cfg = llama.LlamaConfig(10, 4, 2, 6, 2, num_kv_heads=1)
    per_layer = 4 * 4 * 2 + 2 * 4 * 2 + 3 * 4 * 6  # q and o, k and v, MLP
    matrices = 6 * (2 * per_layer + 10 * 4)
    assert llama.flops_per_token(cfg, 8, causal_half=False) == matrices + 12 * 2 * 4 * 8
    assert llama.flops_per_token(cfg, 8) == matrices + 6 * 2 * 4 * 8


def test_impossible_configs():
    with pytest.raises(ValueError, match="width 32 is not a multiple of num_heads 5"):
        dataclasses.replace(TINY, num_heads=5)
    with pytest.raises(ValueError, match="num_heads 4 .* num_kv_heads 3"):
        dataclasses.replace(TINY, num_kv_heads=3)
    with pytest.raises(ValueError, match="head width 3 must be even"):
        dataclasses.replace(TINY, head_width=3)
    with pytest.raises(ValueError, match="'most' is none of"):
        dataclasses.replace(TINY, remat="most")
    with pytest.raises(ValueError, match="decode_form"):
        dataclasses.replace(TINY, fused=True)


def test_a_mask_instead_of_the_causal_order():
    tokens = np.arange(14).reshape(2, 7)
    triangle = np.tri(7, dtype=bool)[None]
    params = random_params(TINY)
    want = apply(TINY, params, "__call__", tokens).logits
    got = apply(TINY, params, "__call__", tokens, mask_bts=triangle).logits
    np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(ValueError, match="mask_bts and cache"):
        apply(
            TINY, params, "__call__", tokens, mask_bts=triangle, cache=llama.make_cache(TINY, 2, 7)
        )


# ---- layouts, packing, cache -----------------------------------------------------------------

TOKENS = np.random.default_rng(0).integers(0, TINY.vocab_size, (2, 12))


@pytest.mark.parametrize("tied", [False, True])
def test_layouts_agree(tied):
    cfg = dataclasses.replace(TINY, tie_embeddings=tied)
    params = random_params(cfg)
    assert ("lm_head" in params) != tied
    want = apply(cfg, params, "__call__", TOKENS).logits

    unrolled_cfg = dataclasses.replace(cfg, scan_layers=False)
    layers = {str(i): jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(cfg.depth)}
    unrolled = {**params, "layers": layers}
    assert jax.tree.structure(network(unrolled_cfg).abstract()) == jax.tree.structure(unrolled)
    got = apply(unrolled_cfg, unrolled, "__call__", TOKENS).logits
    np.testing.assert_allclose(got, want, atol=1e-5)

    for source in ((params, cfg), (unrolled, unrolled_cfg)):
        fused, fused_cfg = llama.decode_form(*source)
        got = apply(fused_cfg, fused, "__call__", TOKENS).logits
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert llama.decode_form(fused, fused_cfg)[0] is fused
    head = apply(cfg, params, "head_matrix")
    np.testing.assert_allclose(head, apply(fused_cfg, fused, "head_matrix"))
    assert head.shape == (cfg.width, cfg.vocab_size)


def test_packed_documents_are_independent():
    params = random_params(TINY)
    packed = TOKENS[:1]
    out = apply(
        TINY,
        params,
        "__call__",
        packed,
        segments_bt=np.array([[1] * 5 + [2] * 5 + [0] * 2]),
        positions_bt=np.array([[0, 1, 2, 3, 4] * 2 + [0, 0]]),
    ).logits
    for part in (slice(0, 5), slice(5, 10)):
        alone = apply(TINY, params, "__call__", packed[:, part]).logits
        np.testing.assert_allclose(out[:, part], alone, atol=1e-5)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("layout", ["scanned", "decode"])
@pytest.mark.parametrize("fresh", [True, False])
def test_cache_equals_full_forward(layout, fresh):
    cfg, params = TINY, random_params(TINY)
    valid = np.ones((2, 12), bool)
    valid[1, :3] = False  # left padding
    want = apply(cfg, params, "__call__", TOKENS, valid_bt=valid).logits
    if layout == "decode":
        params, cfg = llama.decode_form(params, cfg)

    cache = dataclasses.replace(llama.make_cache(cfg, 2, 14), fresh=fresh)
    first = apply(cfg, params, "__call__", TOKENS[:, :6], valid_bt=valid[:, :6], cache=cache)
    parts, cache = [first.logits], first.cache
    for piece in (slice(6, 7), slice(7, 8), slice(8, 12)):  # single tokens, then several at once
        out = apply(cfg, params, "__call__", TOKENS[:, piece], cache=cache)
        parts, cache = [*parts, out.logits], out.cache
    got = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(got[valid], want[valid], atol=2e-5)
    assert int(cache.index) == 12
    np.testing.assert_array_equal(cache.valid_bs[:, :12], valid)

    swapped = cache.rows(jnp.array([1, 0, 1]))
    token = apply(cfg, params, "embed", TOKENS[:, :1])
    want_step = apply(cfg, params, "step", token, cache)[0]
    got_step = apply(cfg, params, "step", token[jnp.array([1, 0, 1])], swapped)[0]
    np.testing.assert_allclose(got_step, want_step[jnp.array([1, 0, 1])], atol=1e-5)


def test_cache_misuse():
    params = random_params(TINY)
    cache = llama.make_cache(TINY, 2, 8)
    with pytest.raises(ValueError, match="12 tokens for a cache of 8"):
        apply(TINY, params, "__call__", TOKENS, cache=cache)
    with pytest.raises(ValueError, match="cannot be combined"):
        apply(TINY, params, "__call__", TOKENS, cache=cache, segments_bt=TOKENS)


def test_bfloat16_compute():
    cfg = dataclasses.replace(TINY, dtype="bfloat16")
    params = random_params(cfg)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = apply(cfg, params, "__call__", TOKENS)
    assert out.logits.dtype == jnp.float32 and out.hidden.dtype == jnp.bfloat16
    want = apply(TINY, params, "__call__", TOKENS).logits
    np.testing.assert_allclose(out.logits, want, atol=0.05)
    # On CPU the decode layout computes in float32, whatever training did.
    assert llama.decode_form(params, cfg)[1].dtype == "float32"


def test_token_outside_the_vocabulary_is_loud():
    out = apply(TINY, random_params(TINY), "embed", np.array([[1, TINY.vocab_size]]))
    assert np.isfinite(out[0, 0]).all() and np.isnan(out[0, 1]).all()


# ---- sharding --------------------------------------------------------------------------------


def test_every_rule_is_used():
    for pattern, _ in llama.SHARDING_RULES:
        paths = functional.flatten(network(TINY).abstract())
        assert any(re.search(pattern, path) for path in paths), pattern


SHARDED = dataclasses.replace(TINY, remat="full", num_heads=4, num_kv_heads=4)


def loss_and_grads(params, tokens, cfg=SHARDED):
    module = network(cfg).bind(params)
    hidden, _ = module.transform(
        module.embed(tokens), segments_bt=jnp.ones_like(tokens).at[:, 9:].set(2)
    )
    targets = jnp.roll(tokens, -1, axis=1)
    return losses.chunked_cross_entropy(
        hidden, module.head_matrix(), targets, jnp.ones(targets.shape), chunk=8
    )[0]


def run_on_mesh(sizes, params, tokens, cfg=SHARDED):
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    places = sharding.of_params(mesh, llama.SHARDING_RULES, params)
    rows = jax.NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def step(params, tokens):
        with partition.use_mesh(mesh):
            return jax.value_and_grad(loss_and_grads)(params, tokens, cfg)

    step = jax.jit(
        step,
        in_shardings=(places, rows),
        out_shardings=(jax.NamedSharding(mesh, PartitionSpec()), places),
    )
    return step(jax.device_put(params, places), jax.device_put(tokens, rows))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 4)])
def test_meshes_agree_with_one_device(sizes):
    if math.prod(sizes) > jax.device_count():
        pytest.skip(f"needs {math.prod(sizes)} devices, there are {jax.device_count()}")
    agree_on_mesh(sizes, random_params(SHARDED), SHARDED)


def test_a_mesh_agrees_with_one_device_about_lora():
    cfg = dataclasses.replace(SHARDED, lora_rank=4, lora_modules="q,k,v,o,gate,up,down")
    params = functional.flatten(random_params(cfg))
    for path, x in params.items():
        if path.endswith("lora_b"):
            params[path] = 0.1 * jax.random.normal(jax.random.key(1), x.shape)
    agree_on_mesh((2, 2, 2), functional.unflatten(params), cfg)


def agree_on_mesh(sizes, params, cfg):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (8, 16)))
    one = functools.partial(loss_and_grads, cfg=cfg)
    want, want_grads = jax.jit(jax.value_and_grad(one))(params, tokens)
    got, grads = run_on_mesh(sizes, params, tokens, cfg)
    np.testing.assert_allclose(got, want, atol=1e-5)
    for path, want in functional.flatten(want_grads).items():
        np.testing.assert_allclose(functional.flatten(grads)[path], want, atol=1e-5, err_msg=path)


# Depth does not matter to the partitioner (one scanned body), so two layers stand for all.
COMPILE = """
import dataclasses, sys, jax, jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec as P
from vlm_jax.program import sharding
from vlm_jax.models import llama
from vlm_jax.nn import functional
from vlm_jax.ops import losses, partition

def compile_step(cfg, sizes, rules):
    cfg = dataclasses.replace(cfg, remat="full", dtype="bfloat16", depth=2)
    fn = functional.Functional(lambda rngs: llama.Llama(cfg, rngs))
    mesh = jax.make_mesh(sizes, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    places = sharding.of_params(mesh, rules, fn.abstract())
    rows = jax.NamedSharding(mesh, P(("data", "fsdp")))

    def loss(params, tokens):
        with partition.use_mesh(mesh):
            module = fn.bind(params)
            hidden, _ = module.transform(module.embed(tokens))
            weights = jnp.ones(tokens.shape)
            head = module.head_matrix()
            return losses.chunked_cross_entropy(hidden, head, tokens, weights, chunk=128)[0]

    tokens = jax.ShapeDtypeStruct((8, 256), jnp.int32)
    step = jax.jit(jax.grad(loss), in_shardings=(places, rows), out_shardings=places)
    step.lower(fn.abstract(), tokens).compile()

tiny = llama.LlamaConfig(40, 32, 3, 48, 4)
if sys.argv[1] == "ours":
    for sizes in ((8, 1, 1), (1, 8, 1), (2, 2, 2)):
        compile_step(tiny, sizes, llama.SHARDING_RULES)
        lora = dict(lora_rank=4, lora_modules="q,k,v,o,gate,up,down")
        compile_step(dataclasses.replace(tiny, **lora), sizes, llama.SHARDING_RULES)
else:  # the familiar rule that cuts the embedding table both ways
    compile_step(tiny, (2, 2, 2), (("embed/table", P("tensor", "fsdp")), *llama.SHARDING_RULES))
print("compiled")
"""


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["ours", "embedding cut both ways"])
def test_no_involuntary_rematerialization(rules):
    # The compiler complains on the stderr of the process, beneath Python, at a log level that the
    # tests otherwise silence, and not when it finds the program in the cache.
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    env["TF_CPP_MIN_LOG_LEVEL"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, rules], capture_output=True, text=True, env=env, timeout=900
    )
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]
    complains = "nvoluntary full rematerialization" in done.stderr
    assert complains == (rules != "ours"), done.stderr[-3000:]
