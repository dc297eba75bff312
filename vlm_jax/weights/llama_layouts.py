"""The names and layouts of LLaMA weights: one table of rules for each, and what they say of a file.

    layer kernel        Hugging Face      EasyLM             GGUF, Meta        ours
    q, k                (n h, d)          (d, n h) pairs     (n h, d) pairs    (d, n, h)
    v                   (n h, d)          (d, n h)           (n h, d)          (d, n, h)
    o                   (d, n h)          (n h, d)           (d, n h)          (n, h, d)
    MLP                 (out, in)         (in, out)          (out, in)         (in, out)

"pairs": rotary embeddings there turn neighbouring channels (2i, 2i+1) of a head; Hugging Face and
we turn channels i and i + h/2. The converters reorder q and k, the model knows one layout only.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Mapping

import numpy as np

from vlm_jax.weights import convert, errors, lazy

# Tables of angles, one per channel pair, that some files store; computed here.
INV_FREQ = r"(.*rotary_emb\.inv_freq|rope\.freqs)"
_BLOCK = re.compile(r"(?:^|[./])(?:layers|h|blk)[./](\d+)[./]")  # a layer's tensor, any layout


def _transposed(x, shape):
    return x.T.reshape(shape)


def _save_in_first(x):  # q, k, v, MLP: axis 0 is the input
    return x.reshape(x.shape[0], -1).T


def _save_out_last(x):  # o: the last axis is the output
    return x.reshape(-1, x.shape[-1]).T


def _pairs_to_halves(x, shape):
    d, n, h = shape
    return x.reshape(d, n, h // 2, 2).swapaxes(2, 3).reshape(shape)


def _halves_to_pairs(x):
    d, n, h = x.shape
    return x.reshape(d, n, 2, h // 2).swapaxes(2, 3).reshape(d, n * h)


def _table(
    names: Mapping[str, str], qk: tuple, in_first: tuple, out_last: tuple
) -> tuple[convert.Rule, ...]:
    """Every layout has the same twelve parameters; (load, save) pairs say how kernels differ."""
    return (
        convert.Rule("embed/table", names["embed"]),
        convert.Rule("layers/attn_norm/scale", names["attn_norm"]),
        convert.Rule("layers/attn/q/kernel", names["q"], *qk),
        convert.Rule("layers/attn/k/kernel", names["k"], *qk),
        convert.Rule("layers/attn/v/kernel", names["v"], *in_first),
        convert.Rule("layers/attn/o/kernel", names["o"], *out_last),
        convert.Rule("layers/mlp_norm/scale", names["mlp_norm"]),
        convert.Rule("layers/mlp/gate/kernel", names["gate"], *in_first),
        convert.Rule("layers/mlp/up/kernel", names["up"], *in_first),
        convert.Rule("layers/mlp/down/kernel", names["down"], *in_first),
        convert.Rule("final_norm/scale", names["final_norm"]),
        convert.Rule("lm_head/kernel", names["lm_head"], *in_first),
    )


# Matrices as torch stores them, (out, in); q and k with pairs of a rotation side by side.
_OUT_IN = dict(in_first=(_transposed, _save_in_first), out_last=(_transposed, _save_out_last))
_INTERLEAVED = (lambda x, shape: _pairs_to_halves(x.T, shape), lambda x: _halves_to_pairs(x).T)

_HF_LAYER = "model.layers.{layer}."
HF_RULES = _table(
    dict(
        embed="model.embed_tokens.weight",
        attn_norm=_HF_LAYER + "input_layernorm.weight",
        q=_HF_LAYER + "self_attn.q_proj.weight",
        k=_HF_LAYER + "self_attn.k_proj.weight",
        v=_HF_LAYER + "self_attn.v_proj.weight",
        o=_HF_LAYER + "self_attn.o_proj.weight",
        mlp_norm=_HF_LAYER + "post_attention_layernorm.weight",
        gate=_HF_LAYER + "mlp.gate_proj.weight",
        up=_HF_LAYER + "mlp.up_proj.weight",
        down=_HF_LAYER + "mlp.down_proj.weight",
        final_norm="model.norm.weight",
        lm_head="lm_head.weight",
    ),
    qk=_OUT_IN["in_first"],
    **_OUT_IN,
)

_EASYLM_LAYER = "transformer/h/{layer}/"
EASYLM_RULES = _table(
    dict(
        embed="transformer/wte/embedding",
        attn_norm=_EASYLM_LAYER + "attention_norm/kernel",
        q=_EASYLM_LAYER + "attention/wq/kernel",
        k=_EASYLM_LAYER + "attention/wk/kernel",
        v=_EASYLM_LAYER + "attention/wv/kernel",
        o=_EASYLM_LAYER + "attention/wo/kernel",
        mlp_norm=_EASYLM_LAYER + "ffn_norm/kernel",
        gate=_EASYLM_LAYER + "feed_forward/w1/kernel",
        up=_EASYLM_LAYER + "feed_forward/w3/kernel",
        down=_EASYLM_LAYER + "feed_forward/w2/kernel",
        final_norm="transformer/ln_f/kernel",
        lm_head="lm_head/kernel",
    ),
    qk=(_pairs_to_halves, _halves_to_pairs),
    in_first=(lambda x, shape: x.reshape(shape), lambda x: x.reshape(x.shape[0], -1)),
    out_last=(lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1, x.shape[-1])),
)

_GGUF_LAYER = "blk.{layer}."
GGUF_RULES = _table(
    dict(
        embed="token_embd.weight",
        attn_norm=_GGUF_LAYER + "attn_norm.weight",
        q=_GGUF_LAYER + "attn_q.weight",
        k=_GGUF_LAYER + "attn_k.weight",
        v=_GGUF_LAYER + "attn_v.weight",
        o=_GGUF_LAYER + "attn_output.weight",
        mlp_norm=_GGUF_LAYER + "ffn_norm.weight",
        gate=_GGUF_LAYER + "ffn_gate.weight",
        up=_GGUF_LAYER + "ffn_up.weight",
        down=_GGUF_LAYER + "ffn_down.weight",
        final_norm="output_norm.weight",
        lm_head="output.weight",
    ),
    qk=_INTERLEAVED,
    **_OUT_IN,
)

_META_LAYER = "layers.{layer}."
META_RULES = _table(
    dict(
        embed="tok_embeddings.weight",
        attn_norm=_META_LAYER + "attention_norm.weight",
        q=_META_LAYER + "attention.wq.weight",
        k=_META_LAYER + "attention.wk.weight",
        v=_META_LAYER + "attention.wv.weight",
        o=_META_LAYER + "attention.wo.weight",
        mlp_norm=_META_LAYER + "ffn_norm.weight",
        gate=_META_LAYER + "feed_forward.w1.weight",
        up=_META_LAYER + "feed_forward.w3.weight",
        down=_META_LAYER + "feed_forward.w2.weight",
        final_norm="norm.weight",
        lm_head="output.weight",
    ),
    qk=_INTERLEAVED,
    **_OUT_IN,
)

RULES = {"hf": HF_RULES, "easylm": EASYLM_RULES, "gguf": GGUF_RULES, "meta": META_RULES}
_SIGNS = {  # a name that only this layout has, wherever it stands
    "model.embed_tokens.weight": "hf",
    "transformer/wte/embedding": "easylm",
    "token_embd.weight": "gguf",
    "tok_embeddings.weight": "meta",
    "embed/table": "native",
}


def layout_of(tensors: convert.Tensors) -> str:
    """One of "hf", "easylm", "gguf", "meta", "native"; WeightsError when the names tell nothing."""
    for sign, layout in _SIGNS.items():
        if any(name == sign or name.endswith("/" + sign) for name in tensors):
            return layout
    raise errors.WeightsError(
        f"{convert.source_of(tensors)}: not a LLaMA checkpoint: none of "
        f"{list(_SIGNS)} among its tensors {sorted(tensors)[:5]} ..."
    )


def below_params(tensors: convert.Tensors) -> convert.Tensors:
    """Drops `params/params/` (training state) or `params/` (variables) in front of every name."""
    for prefix in ("params/params/", "params/"):
        if any(name.startswith(prefix) for name in tensors):
            return tensors.renamed(operator.methodcaller("removeprefix", prefix))
    return tensors


def head_of(tensors: convert.Tensors, rules: tuple[convert.Rule, ...]) -> str:
    """The head of a file: "none", "tied" where it repeats the embedding, "own"; "" is unknown."""
    theirs = {rule.ours: rule.theirs for rule in rules}
    table, head = theirs.get("embed/table"), theirs.get("lm_head/kernel")
    if table not in tensors:
        return ""
    if head not in tensors:
        return "none"
    x, y = tensors[head], tensors[table]
    x = x.T if rules is EASYLM_RULES else x
    return "tied" if x.shape == y.shape and np.array_equal(x, y) else "own"


def first_blocks(tensors: convert.Tensors, depth: int) -> lazy.Tensors:
    """The tensors without the blocks from `depth` on; nothing is loaded. Any layout.

    Raises:
      WeightsError: depth below 1, or fewer blocks than that in the checkpoint.
    """
    native, blocks, kept = {}, set(), {}
    for name in tensors:
        kept[name] = functools.partial(tensors.__getitem__, name)
        if match := _BLOCK.search(name[:200]):
            blocks.add(int(match[1]))
            if int(match[1]) >= depth:
                del kept[name]
        elif "layers/" in name:  # ours: stacked
            native[name] = kept[name]
    found = len(blocks) or min((len(load()) for load in native.values()), default=0)
    if not 1 <= depth <= found:
        source = convert.source_of(tensors)
        raise errors.WeightsError(f"{source}: {depth} blocks asked for, {found} are there")
    for name, load in native.items():
        kept[name] = lambda load=load: load()[:depth]
    return lazy.Tensors(kept, convert.source_of(tensors), getattr(tensors, "metadata", None))


def first_tokens(tensors: convert.Tensors, count: int) -> lazy.Tensors:
    """The tensors without the table's and head's rows from `count` on: padding behind a vocabulary.

    Shorter tables stay as they are; nothing is loaded. Any layout.
    """
    layout = layout_of(tensors)
    rules = RULES.get(layout, convert.NATIVE_RULES)
    theirs = {rule.ours: rule.theirs for rule in rules if isinstance(rule.theirs, str)}
    table, head = (theirs.get(path, path) for path in ("embed/table", "lm_head/kernel"))
    by_column = layout in ("easylm", "native")

    def cut(name):
        x = tensors[name]
        return x[:, :count] if by_column and name.endswith(head) else x[:count]

    loaders = {
        name: (lambda name=name: cut(name))
        if name.endswith((table, head))
        else lazy.item(tensors, name)
        for name in tensors
    }
    return lazy.Tensors(loaders, convert.source_of(tensors), getattr(tensors, "metadata", None))
