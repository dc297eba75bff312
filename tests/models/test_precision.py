"""Products of float32 networks ask for all bits on every device; those of bfloat16 for nothing."""

import ast
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from vlm_jax.models import bert, clip, llama, vqgan
from vlm_jax.nn import functional
from vlm_jax.ops import attention, losses

ROOT = pathlib.Path(llama.__file__).parents[1]
IDS = jnp.zeros((2, 8), jnp.int32)


def products(function, *args):
    """(dtypes of the factors, precision asked for) of every product of the lowered function."""
    text = jax.jit(function).lower(*args).as_text()
    lines = re.findall(r"stablehlo\.(?:dot_general|convolution)\b.*", text)
    assert lines
    return [
        (set(re.findall(r"(bf16|f32)>", line[: line.rindex("->")])), "HIGHEST" in line)
        for line in lines
    ]


def of_llama(dtype):
    cfg = llama.LlamaConfig(16, 8, 2, 16, 2, dtype=dtype, param_dtype=dtype)
    network = functional.Functional(lambda rngs: llama.Llama(cfg, rngs))

    def run(params):
        module = network.bind(params)
        hidden, _ = module.transform(module.embed(IDS))
        loss, _ = losses.chunked_cross_entropy(
            hidden, module.head_matrix(), IDS, jnp.ones(IDS.shape), chunk=4
        )
        return loss.sum() + module.logits(hidden).sum()

    return jax.grad(run), network.abstract()


def of_vqgan(dtype):
    cfg = vqgan.VqganConfig(
        resolution=16,
        hidden_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        mid_attn=True,
        z_channels=4,
        quantized_width=4,
        num_embeddings=8,
        dtype=dtype,
    )
    network = vqgan.make(cfg)

    def run(params):
        module = network.bind(params)
        return module.decode_latents(module.encode_latents(jnp.ones((1, 16, 16, 3)))).sum()

    return jax.grad(run), network.abstract()


def of_clip(dtype):
    cfg = clip.ClipConfig(
        clip.VisionConfig(**vars(clip.VISION_PRESETS["tiny"]) | dict(dtype=dtype)),
        clip.TextConfig(**vars(clip.TEXT_PRESETS["tiny"]) | dict(dtype=dtype)),
    )
    network = functional.Functional(lambda rngs: clip.Clip(cfg, rngs))
    side = cfg.vision.image_size

    def run(params):
        image = jnp.ones((1, side, side, 3))
        return network.bind(params).vision.tokens(image).sum()

    return jax.grad(run), network.abstract()


def of_bert(dtype):
    cfg = bert.BertConfig(16, 8, 1, 2, 16, max_tokens=8, dtype=dtype)
    network = functional.Functional(lambda rngs: bert.Bert(cfg, rngs))

    def run(params):
        return network.bind(params)(IDS, IDS == 0).astype(jnp.float32).sum()

    return jax.grad(run), network.abstract()


def of_attention(implementation):
    def make(dtype):
        q = jax.ShapeDtypeStruct((1, 8, 2, 8), dtype)

        def run(q):
            o = attention.attend(q, q, q, causal=True, implementation=implementation)
            return o.astype(jnp.float32).sum()

        return jax.grad(run), q

    return make


KINDS = {
    "llama": of_llama,
    "vqgan": of_vqgan,
    "clip": of_clip,
    "bert": of_bert,
    "xla": of_attention("xla"),
    "blocks": of_attention("blocks"),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_all_products_of_float32_are_whole(kind):
    found = products(*KINDS[kind]("float32"))
    assert all(types == {"f32"} and whole for types, whole in found)
    with jax.default_matmul_precision("tensorfloat32"):  # also as JAX_DEFAULT_MATMUL_PRECISION
        chosen = products(*KINDS[kind]("float32"))
    assert len(chosen) == len(found)
    assert not any(whole for _, whole in chosen) or kind == "vqgan"  # which fixes some for itself


@pytest.mark.parametrize("kind", list(KINDS))
def test_products_of_bfloat16_are_left_alone(kind):
    found = products(*KINDS[kind]("bfloat16"))
    assert any("bf16" in types for types, _ in found)
    assert not any(whole for types, whole in found if "bf16" in types)


PRODUCTS = {"dot", "matmul", "einsum", "tensordot", "vdot", "inner", "dot_general"}


def test_no_product_is_made_elsewhere():
    """`ops/matmul.py` decides; whatever does not go through it must say its precision itself."""
    found = []
    for folder in ("ops", "nn", "models", "decoding", "systems"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                name, owner = node.func.attr, ast.unparse(node.func.value)
                product = name in PRODUCTS or name.startswith("conv_general")
                of_jax = owner in ("jnp", "lax", "jax.lax", "jax.numpy")
                says = any(keyword.arg == "precision" for keyword in node.keywords)
                if product and of_jax and not says:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not found
