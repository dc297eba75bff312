"""LLaMA: a pre-norm decoder with rotary positions, grouped-query attention and a gated MLP.

Touvron et al., arXiv 2302.13971. The network of LVM (arXiv 2312.00785, sec. 3.2) and, with tied
embeddings and fewer key heads, of SmolLM2.

    tokens ─ embed ─┬─ norm ─ attention ─(+)─┬─ norm ─ MLP ─(+)─ x depth ─ norm ─ head ─ logits
                    └─────────────────────┘  └──────────────┘

Two layouts of the same parameters, one code path for the mathematics:

    training   layers stacked on axis 0 and scanned: short compile, remat per layer.
               layers/attn/q/kernel [L, d, n, h] ... layers/mlp/gate/kernel [L, d, f]
    decoding   layers unrolled; q, k, v in one kernel, gate and up in one, stored (out, in) so that
               a matrix-vector product streams rows. `decode_form` converts.
               layers/0/attn/qkv/kernel [(n+2k)h, d] ... layers/0/mlp/gate_up/kernel [2f, d]

Rotary layout: half-split (ops/rope.py). Norms, softmax, angles and logits are float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from vlm_jax.models import caches
from vlm_jax.nn import attention, functional, linear, lora, mlp, norms
from vlm_jax.ops import matmul, partition, rope


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes and execution choices.

    Attributes:
      vocab_size: ids, special ones included.
      width: of the hidden states.
      depth: blocks.
      mlp_width: of a block's hidden layer.
      num_heads: of attention.
      num_kv_heads: 0 is num_heads.
      head_width: 0 is width // num_heads.
      rope_theta: base of the wave lengths of rotary positions.
      rms_eps: added to the mean square in norms.
      max_tokens: context the network is trained for; not a limit of the code.
      tie_embeddings: the head is the embedding table.
      dtype: compute. param_dtype: storage.
      remat: what the backward pass recomputes: 'none', 'full' (everything but the layer inputs),
        'dots' (everything but the results of matrix products).
      scan_layers: blocks are one stacked array and one compiled loop.
      fused: decode layout, see the module docstring.
      lora_rank: of low-rank additions to matrices (LoRA, `nn.linear`); 0 is none. Train them alone
        with optim.trainable="lora_[ab]$".
      lora_scale: factor on them. lora_modules: of q, k, v, o, gate, up, down, joined by commas.
    """

    vocab_size: int
    width: int
    depth: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int = 0
    head_width: int = 0
    rope_theta: float = 1e4
    rms_eps: float = 1e-6
    max_tokens: int = 4096
    tie_embeddings: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    fused: bool = False
    lora_rank: int = 0
    lora_scale: float = 1.0
    lora_modules: str = "q,v"

    def __post_init__(self):
        if not self.head_width and self.width % self.num_heads:
            raise ValueError(
                f"width {self.width} is not a multiple of num_heads {self.num_heads}; "
                "change one of them or set head_width"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"head width {self.head_size} must be even for rotary positions")
        if self.remat not in _REMAT:
            raise ValueError(f"remat {self.remat!r} is none of {sorted(_REMAT)}")
        if self.fused and self.scan_layers:
            raise ValueError("fused=True needs scan_layers=False; use decode_form")
        if self.fused and self.lora_rank:
            raise ValueError("fused=True has no LoRA; decode_form merges it")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank {self.lora_rank} must not be negative")
        unknown = set(self.lora.modules) - set(_MATRICES)
        if unknown:
            raise ValueError(
                f"lora_modules {self.lora_modules!r}: {sorted(unknown)[0]!r} is none of "
                f"{', '.join(_MATRICES)}"
            )

    @property
    def kv_heads(self) -> int:
        """Key heads, the default resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Head width, the default resolved."""
        return self.head_width or self.width // self.num_heads

    @property
    def lora(self) -> lora.Lora:
        """Which matrices have an addition."""
        return lora.Lora(self.lora_rank, self.lora_scale, tuple(self.lora_modules.split(",")))


_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
_REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def _lvm(width, mlp_width, depth, num_heads):
    # 8,192 visual ids and 100 special ones.
    return LlamaConfig(8292, width, depth, mlp_width, num_heads)


PRESETS = {  # upstream: EasyLM/models/llama/llama_model.py, vqlm_*
    "lvm_debug": _lvm(128, 256, 2, 4),
    "lvm_100m": _lvm(640, 1664, 22, 10),
    "lvm_300m": _lvm(1024, 2688, 22, 8),
    "lvm_600m": _lvm(1536, 4096, 22, 16),
    "lvm_1b": _lvm(2048, 5504, 22, 16),
    "lvm_3b": _lvm(3200, 8640, 26, 32),
    "lvm_7b": _lvm(4096, 11008, 32, 32),
    "lvm_13b": _lvm(5120, 13824, 40, 40),
    "lvm_20b": _lvm(6144, 16128, 46, 48),
    "lvm_30b": _lvm(6656, 17920, 60, 52),
    "smollm2_135m": LlamaConfig(  # upstream: HuggingFaceTB/SmolLM2-135M, config.json
        49152,
        576,
        30,
        1536,
        9,
        num_kv_heads=3,
        rope_theta=1e5,
        rms_eps=1e-5,
        max_tokens=8192,
        tie_embeddings=True,
    ),
}

# Training layout. The embedding table is split over vocabulary alone: splitting its width too
# makes the partitioner gather the whole table around the token lookup.
SHARDING_RULES = (
    (r"^embed/table$", P("tensor", None)),
    (r"^layers/attn/[qkv]/kernel$", P(None, "fsdp", "tensor", None)),
    (r"^layers/attn/o/kernel$", P(None, "tensor", None, "fsdp")),
    (r"^layers/mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"^layers/mlp/down/kernel$", P(None, "tensor", "fsdp")),
    # LoRA is narrow: every device has all of it.
    (r"^layers/((attn|mlp)_norm/scale|(attn|mlp)/\w+/lora_[ab])$", P()),
    (r"^final_norm/scale$", P()),
    (r"^lm_head/kernel$", P("fsdp", "tensor")),
)


# Decode layout: rows of the stored matrices are outputs, and they are what the axes share.
_OUT = P(("fsdp", "tensor"), None)
DECODE_SHARDING_RULES = (
    (r"^embed/table$", P("tensor", None)),
    (r"^layers/\d+/attn/(qkv|o)/kernel$", _OUT),
    (r"^layers/\d+/mlp/(gate_up|down)/kernel$", _OUT),
    (r"^layers/\d+/(attn|mlp)_norm/scale$", P()),
    (r"^final_norm/scale$", P()),
    (r"^lm_head/kernel$", _OUT),
)


def make_cache(cfg: LlamaConfig, batch: int, length: int, dtype=None) -> caches.Cache:
    """An empty cache for `length` tokens; dtype None is the compute dtype."""
    shape = (batch * cfg.kv_heads, length, cfg.head_size)

    def empty(*stack):
        return {name: jnp.zeros((*stack, *shape), dtype or cfg.dtype) for name in ("k", "v")}

    layers = empty(cfg.depth) if cfg.scan_layers else {str(i): empty() for i in range(cfg.depth)}
    valid_bs = jnp.zeros((batch, length), bool)
    return caches.Cache(layers, valid_bs, jnp.zeros((), jnp.int32), fresh=True)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """logits float32[B, T, V]; hidden [B, T, D] after the final norm; cache or None."""

    logits: jax.Array
    hidden: jax.Array
    cache: Any = None


class Llama(nnx.Module):
    """The network. Arguments named alike mean the same in every method.

    Arguments of the methods:
      tokens_bt: int32. x_btd: vectors in the space of the embedding.
      cache: from `make_cache`, with room for T more tokens; or its `fork`, and then axis t is one
        new token of each branch; see `models.caches`.
      **context: fields of `caches.Context`: who reads whom, and where tokens stand.
    """

    def __init__(self, cfg: LlamaConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed = Embed(cfg, rngs)
        if cfg.scan_layers:
            self.layers = Block(cfg, rngs, stack=(cfg.depth,))
        else:
            self.layers = nnx.List([Block(cfg, rngs) for _ in range(cfg.depth)])
        self.final_norm = norms.RMSNorm(cfg.width, cfg.rms_eps, cfg.param_dtype)
        if not cfg.tie_embeddings:
            sizes = (cfg.vocab_size, cfg.width) if cfg.fused else (cfg.width, cfg.vocab_size)
            self.lm_head = linear.Linear(rngs, sizes, param_dtype=cfg.param_dtype)

    def __call__(self, tokens_bt, *, cache=None, **context) -> Output:
        """Logits of every position."""
        hidden_btd, cache = self.transform(self.embed(tokens_bt), cache=cache, **context)
        return Output(self.logits(hidden_btd), hidden_btd, cache)

    def make_cache(self, batch: int, length: int) -> caches.Cache:
        """An empty cache for this network; see `make_cache` of the module."""
        return make_cache(self.cfg, batch, length)

    def step(self, x_btd, cache, *, length=None, **context) -> caches.Step:
        """One call of a decoding loop.

        Args:
          x_btd: a prompt, the next token of every row, or [B, R, D] that of every branch.
          cache: of either kind.
          length: int32, only so many vectors of a prompt are real, in every row; those behind fill
            up a shape. Causality hides them, so no mask is needed.
          **context: as above; of `valid_bt` the last real vector of a row counts.

        Returns:
          Step: logits and hidden state behind the last vector.
        """
        hidden_btd, cache = self.transform(x_btd, cache=cache, **context)
        last, cache = cache.last(hidden_btd, context.get("valid_bt"), length)
        return caches.Step(cache.squeeze(self.logits(last)), cache.squeeze(last), cache)

    def transform(self, x_btd, *, cache=None, **context):
        """(hidden_btd after the final norm, cache)."""
        call = caches.open_call(cache, x_btd, caches.Context(**context))
        x_btd, own, _ = self._blocks(x_btd, call)
        return self.final_norm(x_btd), call.close(own)

    def hidden_states(self, tokens_bt=None, *, x_btd=None, cache=None, **context):
        """What enters the first block and what leaves each, [depth + 1, B, T, D].

        The last is behind the final norm, what `logits` reads, as transformers'
        `output_hidden_states` gives them. In the compute dtype. Of tokens, or of vectors.

        Raises:
          ValueError: a cache: whole sequences only.
        """
        x_btd = self.embed(tokens_bt) if x_btd is None else x_btd
        call = _watched(x_btd, cache, context)
        last_btd, _, left_lbtd = self._blocks(x_btd, call, keep=lambda x_btd, own: x_btd)
        last_btd = self.final_norm(last_btd)
        return jnp.concatenate([x_btd[None], left_lbtd[:-1], last_btd[None]])

    def attention_maps(self, tokens_bt=None, *, x_btd=None, cache=None, **context):
        """Attention of every layer after the softmax, float32[depth, B, n, T, T]; to look at.

        Of tokens, or of vectors.

        Raises:
          ValueError: as `hidden_states`.
        """
        x_btd = self.embed(tokens_bt) if x_btd is None else x_btd
        call = caches.Maps(_watched(x_btd, cache, context))
        return self._blocks(x_btd, call, keep=lambda x_btd, maps_bnts: maps_bnts)[2]

    def _blocks(self, x_btd, call, keep=None):
        """(x_btd, what the layers made of their states, [L, ...] what `keep` takes of each)."""
        angles = rope.table(call.positions_bt, self.cfg.head_size, self.cfg.rope_theta)

        def block(x_btd, module, own, shared):
            x_btd = partition.constrain(x_btd, partition.BATCH, None, None)
            x_btd, own = module(x_btd, angles, call, own, shared)
            return x_btd, own if keep is None else keep(x_btd, own)

        if not self.cfg.scan_layers:
            left = {}
            for i, module in enumerate(self.layers):
                own, shared = (x and x[str(i)] for x in (call.own, call.shared))
                x_btd, left[str(i)] = _remat(block, self.cfg)(x_btd, module, own, shared)
            if keep is None:
                return x_btd, left, None
            return x_btd, None, jnp.stack(list(left.values()))
        graph, stacked = nnx.split(self.layers)
        if call.own is not None:
            return *self._scan_in_place(block, graph, stacked, x_btd, call), None

        def layer(x_btd, stacked):
            return block(x_btd, nnx.merge(graph, stacked), None, None)

        x_btd, left = jax.lax.scan(_remat(layer, self.cfg), x_btd, stacked)
        return x_btd, None, left

    def _scan_in_place(self, block, graph, stacked, x_btd, call):
        """Over the layers with their caches as part of the state: never two of all of them."""

        def layer(state, xs):
            x_btd, own = state
            module, i, shared = xs
            mine = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), own)
            x_btd, mine = block(x_btd, nnx.merge(graph, module), mine, shared)
            own = jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0), own, mine
            )
            return (x_btd, own), None

        steps = jnp.arange(self.cfg.depth)
        return jax.lax.scan(layer, (x_btd, call.own), (stacked, steps, call.shared))[0]

    def logits(self, hidden_btd):
        """float32 logits_btv of the next token."""
        # Stored (out, in) in the decode layout and when tied; no transpose is materialised.
        rows = self.cfg.tie_embeddings or self.cfg.fused
        kernel = self.embed.table if self.cfg.tie_embeddings else self.lm_head.kernel
        logits_btv = matmul.einsum(
            "btd,vd->btv" if rows else "btd,dv->btv",
            hidden_btd,
            kernel[...].astype(hidden_btd.dtype),
            preferred_element_type=jnp.float32,
        )
        return partition.constrain(logits_btv, partition.BATCH, None, "tensor")

    def head_matrix(self):
        """The output projection [D, V], for ops.losses.chunked_cross_entropy."""
        if self.cfg.tie_embeddings:
            return self.embed.table[...].T
        return self.lm_head.kernel[...].T if self.cfg.fused else self.lm_head.kernel[...]


class Block(nnx.Module):
    """x + Attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, cfg, rngs, stack=()):
        fields = dict(stack=stack, param_dtype=cfg.param_dtype, lora=cfg.lora)
        heads = dict(kv_heads=cfg.kv_heads, head_width=cfg.head_size)
        self.attn_norm = norms.RMSNorm(cfg.width, cfg.rms_eps, cfg.param_dtype, stack)
        if cfg.fused:
            self.attn = FusedAttention(cfg, rngs)
        else:
            self.attn = attention.Attention(rngs, cfg.width, cfg.num_heads, **heads, **fields)
        self.mlp_norm = norms.RMSNorm(cfg.width, cfg.rms_eps, cfg.param_dtype, stack)
        if cfg.fused:
            self.mlp = FusedMlp(cfg, rngs)
        else:
            self.mlp = mlp.Mlp(rngs, cfg.width, cfg.mlp_width, "silu", gated=True, **fields)

    def __call__(self, x_btd, angles, call, own, shared):
        """(the block's output, this layer's state).

        Args:
          angles: of rotary embedding.
          call: `caches.Call`, which knows who reads whom.
          own, shared: this layer's part of the cache.
        """
        update_btd, own = self.attn.step(
            self.attn_norm(x_btd),
            functools.partial(call.attend, own, shared),
            rotate=functools.partial(_rotate, angles),
        )
        x_btd = x_btd + update_btd
        return x_btd + self.mlp(self.mlp_norm(x_btd)), own


def _rotate(angles, x_btnh):
    return rope.rotate(x_btnh, *angles)


class FusedAttention(nnx.Module):
    """`nn.attention.Attention` in the decode layout: one product for q, k and v."""

    def __init__(self, cfg, rngs):
        self.cfg = cfg
        d, n, k, h = cfg.width, cfg.num_heads, cfg.kv_heads, cfg.head_size
        self.qkv = linear.Linear(rngs, ((n + 2 * k) * h, d), param_dtype=cfg.param_dtype)
        self.o = linear.Linear(rngs, (d, n * h), param_dtype=cfg.param_dtype)

    def step(self, x_btd, attend, *, rotate):
        """(x_btd, state)."""
        n, k, h = self.cfg.num_heads, self.cfg.kv_heads, self.cfg.head_size
        flat_bto = self.qkv("btd,od->bto", x_btd)
        heads_btnh = flat_bto.reshape(*flat_bto.shape[:2], n + 2 * k, h)
        q_btnh, k_btkh, v_btkh = jnp.split(heads_btnh, (n, n + k), axis=2)
        o_btnh, state = attend(rotate(q_btnh), rotate(k_btkh), v_btkh)
        return self.o("bto,do->btd", o_btnh.reshape(*o_btnh.shape[:2], -1)), state


class FusedMlp(nnx.Module):
    """`nn.mlp.Mlp` in the decode layout: one product for gate and up."""

    def __init__(self, cfg, rngs):
        d, f = cfg.width, cfg.mlp_width
        self.gate_up = linear.Linear(rngs, (2 * f, d), param_dtype=cfg.param_dtype)
        self.down = linear.Linear(rngs, (d, f), param_dtype=cfg.param_dtype)

    def __call__(self, x_btd):
        """x_btd -> x_btd."""
        gate_btf, up_btf = jnp.split(self.gate_up("btd,fd->btf", x_btd), 2, axis=-1)
        return self.down("btf,df->btd", jax.nn.silu(gate_btf) * up_btf)


class Embed(nnx.Module):
    """tokens_bt -> x_btd in the compute dtype. Ids outside the table give NaN, not a neighbour."""

    def __init__(self, cfg, rngs):
        self.dtype = cfg.dtype
        # Deviation 0.02 for everything, no factor for depth; upstream: initializer_range.
        sizes = cfg.vocab_size, cfg.width
        self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), sizes, cfg.param_dtype))

    def __call__(self, tokens_bt):
        """tokens_bt -> x_btd."""
        x_btd = jnp.take(self.table[...], tokens_bt, axis=0, mode="fill").astype(self.dtype)
        return partition.constrain(x_btd, partition.BATCH, None, None)


def _watched(x_btd, cache, context):
    if cache is not None:
        raise ValueError("hidden states and attention maps are of whole sequences; leave out cache")
    return caches.open_call(None, x_btd, caches.Context(**context))


def _remat(f, cfg):
    policy = _REMAT[cfg.remat]
    # Inside scan nothing can be merged across iterations, so the barriers are not needed.
    return jax.checkpoint(f, policy=policy, prevent_cse=not cfg.scan_layers) if policy else f


def decode_form(params, cfg: LlamaConfig):
    """Parameters and config of the decode layout, in the compute dtype.

    On CPU that dtype becomes float32: there matrix-vector products in bfloat16 are an order of
    magnitude slower, and converting once here beats converting at every step.

    Args:
      params: training layout, scanned or not (a decode layout is returned as it is). LoRA is
        merged into the kernels.
      cfg: its config.

    Returns:
      (params, cfg) with fused=True, scan_layers=False.
    """
    if cfg.fused:
        return params, cfg
    dtype = decode_dtype(cfg.dtype)

    def rows(kernel, k):
        return kernel.reshape(math.prod(kernel.shape[:k]), -1).T

    def layer(tree):
        attn, mlp = tree["attn"], tree["mlp"]
        qkv = [rows(attn[name]["kernel"], 1) for name in ("q", "k", "v")]
        gate_up = [mlp[name]["kernel"].T for name in ("gate", "up")]
        return {
            "attn_norm": tree["attn_norm"],
            "attn": {
                "qkv": {"kernel": jnp.concatenate(qkv)},
                "o": {"kernel": rows(attn["o"]["kernel"], 2)},
            },
            "mlp_norm": tree["mlp_norm"],
            "mlp": {
                "gate_up": {"kernel": jnp.concatenate(gate_up)},
                "down": {"kernel": mlp["down"]["kernel"].T},
            },
        }

    def convert(params):
        if cfg.lora_rank:
            params, _ = lora.merge(params, cfg.lora_scale)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        layers = {}
        for i in range(cfg.depth):
            if cfg.scan_layers:
                one = jax.tree.map(lambda x, i=i: x[i], params["layers"])
            else:
                one = params["layers"][str(i)]
            layers[str(i)] = layer(one)
        out = {**params, "layers": layers}
        if not cfg.tie_embeddings:
            out["lm_head"] = {"kernel": params["lm_head"]["kernel"].T}
        return out

    execution = dict(fused=True, scan_layers=False, remat="none", lora_rank=0)
    decode_cfg = dataclasses.replace(cfg, dtype=dtype, param_dtype=dtype, **execution)
    return jax.jit(convert)(params), decode_cfg


def decoding_config(params, cfg: LlamaConfig) -> LlamaConfig:
    """The config that decodes with these parameters as they lie, copying none of them.

    Args:
      params: either layout, arrays or shapes.
      cfg: that of the training layout.

    Returns:
      That of the decode layout where the parameters have it, else `cfg`; in the dtype of
      `decode_form`.
    """
    dtype = decode_dtype(cfg.dtype)
    layers = params["layers"]
    execution = dict(remat="none", fused=False, scan_layers="attn" in layers)
    if not execution["scan_layers"] and "qkv" in layers["0"]["attn"]:
        execution.update(fused=True, param_dtype=dtype, lora_rank=0)
    return dataclasses.replace(cfg, dtype=dtype, **execution)


def make(cfg: LlamaConfig) -> functional.Functional:
    """The network behind its functional boundary: `.init(rng)`, `.abstract()`, `.bind(params)`."""
    return functional.Functional(lambda rngs: Llama(cfg, rngs))


def decode_dtype(dtype: str) -> str:
    """That of `decode_form` for a compute dtype."""
    return "float32" if partition.platform() == "cpu" else dtype


def training_form(params, cfg: LlamaConfig):
    """Inverse of `decode_form`, on the host: (params, cfg) with stacked layers.

    The dtype stays that of the decode layout. A training layout is returned as it is.
    """
    if not cfg.fused:
        return params, cfg
    heads = cfg.num_heads, cfg.head_size
    kv_heads = cfg.kv_heads, cfg.head_size
    ends = np.cumsum([math.prod(heads), math.prod(kv_heads)])

    def layer(tree):
        q, k, v = np.split(np.asarray(tree["attn"]["qkv"]["kernel"]), ends)
        gate, up = np.split(np.asarray(tree["mlp"]["gate_up"]["kernel"]), 2)
        kernels = {
            "q": q.T.reshape(-1, *heads),
            "k": k.T.reshape(-1, *kv_heads),
            "v": v.T.reshape(-1, *kv_heads),
            "o": np.asarray(tree["attn"]["o"]["kernel"]).T.reshape(*heads, -1),
        }
        mlp = {"gate": gate.T, "up": up.T, "down": np.asarray(tree["mlp"]["down"]["kernel"]).T}
        return {
            "attn_norm": tree["attn_norm"],
            "attn": {name: {"kernel": x} for name, x in kernels.items()},
            "mlp_norm": tree["mlp_norm"],
            "mlp": {name: {"kernel": x} for name, x in mlp.items()},
        }

    layers = [layer(params["layers"][str(i)]) for i in range(cfg.depth)]
    out = {**params, "layers": jax.tree.map(lambda *xs: np.stack(xs), *layers)}
    if not cfg.tie_embeddings:
        out["lm_head"] = {"kernel": np.asarray(params["lm_head"]["kernel"]).T}
    return out, dataclasses.replace(cfg, fused=False, scan_layers=True)


def num_params(cfg: LlamaConfig) -> int:
    """Number of parameters, the embedding table included."""
    abstract = functional.Functional(lambda rngs: Llama(cfg, rngs)).abstract()
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))


def flops_per_token(cfg: LlamaConfig, tokens: int, causal_half: bool = True) -> float:
    """Floating-point operations of forward and backward, per token of a sequence.

    6 per matrix parameter (2 forward, 4 backward; the embedding lookup counts nothing, the head
    does), plus 12 * depth * n * h * tokens for scores and weighted values. `causal_half` counts
    only the half of those that a causal mask leaves. Recomputation is never counted.
    """
    d, n, k, h = cfg.width, cfg.num_heads, cfg.kv_heads, cfg.head_size
    matrices = cfg.depth * (2 * d * h * (n + k) + 3 * d * cfg.mlp_width) + d * cfg.vocab_size
    scores = 12 * cfg.depth * n * h * tokens
    return 6.0 * matrices + (scores / 2 if causal_half else scores)
