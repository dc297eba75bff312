"""SAM weights in the layouts of Meta and of Hugging Face.

    ours                      Meta                            Hugging Face
    q, k, v [d, n, h]         attn.qkv.weight (3 n h, d)      the same
    o [n, h, d]               proj, out_proj (d, n h)         the same
    two-way q, k, v           q_proj.weight (n h, d)          the same
    upscale [2, 2, in, out]   (in, out, 2, 2), transposed convolutions
    norms of a layer          norm1 ... norm4                 layer_norm1 ... layer_norm4
    layers of an MLP          layers.0, 1, 2                  proj_in, layers.0, proj_out

Where one tensor there is three here, the converter sees names with `#q`, `#k`, `#v` behind them, as
in `weights.clip`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlm_jax.models import sam
from vlm_jax.weights import bounds, clip, convert, errors, lazy, readers

_FUSED = re.compile(r".*\.attn\.qkv\.(weight|bias)")
_LINEAR = (lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(x.shape[0], -1).T)
_OUT = (lambda x, shape: x.T.reshape(shape), lambda x: x.reshape(-1, x.shape[-1]).T)
_FLAT = (lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1))
_CONV = (lambda x, shape: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
_TRANSPOSED_CONV = (lambda x, shape: x.transpose(2, 3, 0, 1), lambda x: x.transpose(2, 3, 0, 1))
_ROW = (lambda x, shape: x.reshape(shape), lambda x: x[None])


def _pair(ours: str, theirs: str, how: tuple = ()) -> tuple[convert.Rule, ...]:
    """A kernel and its bias."""
    return (
        convert.Rule(ours + "/kernel", theirs + ".weight", *how),
        convert.Rule(ours + "/bias", theirs + ".bias"),
    )


def _norm(ours: str, theirs: str) -> tuple[convert.Rule, ...]:
    return (
        convert.Rule(ours + "/scale", theirs + ".weight"),
        convert.Rule(ours + "/bias", theirs + ".bias"),
    )


def _block(stem: str, norm: str) -> tuple[convert.Rule, ...]:
    block, name = r"image_encoder/blocks/(\d+)/", stem + r"\1."
    return (
        convert.Rule(block + "attn/([qkv])/kernel", name + r"attn.qkv.weight#\2", *_LINEAR),
        convert.Rule(block + "attn/([qkv])/bias", name + r"attn.qkv.bias#\2", *_FLAT),
        *_pair(block + "attn/o", name + "attn.proj", _OUT),
        convert.Rule(block + "attn/rows", name + "attn.rel_pos_h"),
        convert.Rule(block + "attn/cols", name + "attn.rel_pos_w"),
        *_norm(block + "attn_norm", name + norm + "1"),
        *_norm(block + "mlp_norm", name + norm + "2"),
        *_pair(block + "mlp/up", name + "mlp.lin1", _LINEAR),
        *_pair(block + "mlp/down", name + "mlp.lin2", _LINEAR),
    )


def _two_way(norm: str) -> tuple[convert.Rule, ...]:
    ours, theirs = "mask_decoder/two_way/", "mask_decoder.transformer."
    layer, name = ours + r"layers/(\d+)/", theirs + r"layers.\1."
    places = (
        (layer + "read_tokens", name + "self_attn", r"\2"),
        (layer + "read_image", name + "cross_attn_token_to_image", r"\2"),
        (layer + "image_reads", name + "cross_attn_image_to_token", r"\2"),
        (ours + "read_image", theirs + "final_attn_token_to_image", r"\1"),
    )
    rules = []
    for path, stem, third in places:
        projection = f"{stem}.{third}_proj"
        rules += [
            convert.Rule(path + "/([qkv])/kernel", projection + ".weight", *_LINEAR),
            convert.Rule(path + "/([qkv])/bias", projection + ".bias", *_FLAT),
            *_pair(path + "/o", stem + ".out_proj", _OUT),
        ]
    for i in range(4):
        rules += _norm(f"{layer}norms/{i}", f"{name}{norm}{i + 1}")
    return (
        *rules,
        *_pair(layer + "mlp/up", name + "mlp.lin1", _LINEAR),
        *_pair(layer + "mlp/down", name + "mlp.lin2", _LINEAR),
    )


def _meta_layer(match: re.Match, part: str, kind: str) -> str:
    *head, layer = match.groups()
    return f"mask_decoder.{part.format(*head)}.layers.{layer}.{kind}"


def _hf_layer(match: re.Match, part: str, kind: str) -> str:
    *head, layer = match.groups()
    name = {"0": "proj_in", "1": "layers.0", "2": "proj_out"}[layer]
    return f"mask_decoder.{part.format(*head)}.{name}.{kind}"


def _perceptrons(name: Callable[[re.Match, str, str], str]) -> tuple[convert.Rule, ...]:
    rules = []
    for path, part in (
        (r"mask_heads/(\d+)/layers/(\d+)", "output_hypernetworks_mlps.{}"),
        (r"iou_head/layers/(\d+)", "iou_prediction_head"),
    ):
        for ours, theirs, how in (("kernel", "weight", _LINEAR), ("bias", "bias", ())):

            def full(match, part=part, theirs=theirs):
                return name(match, part, theirs)

            rules.append(convert.Rule(f"mask_decoder/{path}/{ours}", full, *how))
    return tuple(rules)


_META = dict(
    patches="image_encoder.patch_embed.proj",
    positions="image_encoder.pos_embed",
    blocks="image_encoder.blocks.",
    norm="norm",
    convs=("image_encoder.neck.0", "image_encoder.neck.2"),
    norms=("image_encoder.neck.1", "image_encoder.neck.3"),
    gaussian="prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    kinds="prompt_encoder.point_embeddings.{layer}.weight",
    mask_convs=tuple(f"prompt_encoder.mask_downscaling.{i}" for i in (0, 3, 6)),
    mask_norms=tuple(f"prompt_encoder.mask_downscaling.{i}" for i in (1, 4)),
    last_norm="mask_decoder.transformer.norm_final_attn",
    upscale=tuple(f"mask_decoder.output_upscaling.{i}" for i in (0, 3)),
    upscale_norm="mask_decoder.output_upscaling.1",
    layer=_meta_layer,
)
_HF = dict(
    patches="vision_encoder.patch_embed.projection",
    positions="vision_encoder.pos_embed",
    blocks="vision_encoder.layers.",
    norm="layer_norm",
    convs=("vision_encoder.neck.conv1", "vision_encoder.neck.conv2"),
    norms=("vision_encoder.neck.layer_norm1", "vision_encoder.neck.layer_norm2"),
    gaussian="shared_image_embedding.positional_embedding",
    kinds="prompt_encoder.point_embed.{layer}.weight",
    mask_convs=tuple(f"prompt_encoder.mask_embed.conv{i}" for i in (1, 2, 3)),
    mask_norms=tuple(f"prompt_encoder.mask_embed.layer_norm{i}" for i in (1, 2)),
    last_norm="mask_decoder.transformer.layer_norm_final_attn",
    upscale=tuple(f"mask_decoder.upscale_conv{i}" for i in (1, 2)),
    upscale_norm="mask_decoder.upscale_layer_norm",
    layer=_hf_layer,
)


def _rules(names: Mapping[str, Any]) -> tuple[convert.Rule, ...]:
    encoder, prompts, decoder = "image_encoder/", "prompt_encoder/", "mask_decoder/"

    def numbered(make, ours, theirs, *how):
        pairs = [make(f"{ours}/{i}", name, *how) for i, name in enumerate(theirs)]
        return [rule for pair in pairs for rule in pair]

    neck = [
        convert.Rule(f"{encoder}neck/kernels/{i}", name + ".weight", *_CONV)
        for i, name in enumerate(names["convs"])
    ]
    return (
        *_pair(encoder + "patches", names["patches"], _CONV),
        convert.Rule(encoder + "positions", names["positions"], *_ROW),
        *_block(names["blocks"], names["norm"]),
        *neck,
        *numbered(_norm, encoder + "neck/norms", names["norms"]),
        convert.Rule(prompts + "gaussian", names["gaussian"]),
        convert.Rule(prompts + "kinds", names["kinds"], *_ROW),
        convert.Rule(prompts + "not_a_point", prompts[:-1] + ".not_a_point_embed.weight", *_ROW),
        convert.Rule(prompts + "no_mask", prompts[:-1] + ".no_mask_embed.weight", *_ROW),
        *numbered(_pair, prompts + "mask/convs", names["mask_convs"], _CONV),
        *numbered(_norm, prompts + "mask/norms", names["mask_norms"]),
        convert.Rule(decoder + "iou_token", "mask_decoder.iou_token.weight"),
        convert.Rule(decoder + "mask_tokens", "mask_decoder.mask_tokens.weight"),
        *_two_way(names["norm"]),
        *_norm(decoder + "two_way/norm", names["last_norm"]),
        *numbered(_pair, decoder + "upscale/layers", names["upscale"], _TRANSPOSED_CONV),
        *_norm(decoder + "upscale/norm", names["upscale_norm"]),
        *_perceptrons(names["layer"]),
    )


META_RULES, HF_RULES = _rules(_META), _rules(_HF)
_RULES = {"meta": META_RULES, "hf": HF_RULES}
# transformers stores the matrix of places a second time.
IGNORED = (r"prompt_encoder\.shared_embedding\.positional_embedding",)


def layout_of(tensors: convert.Tensors) -> str:
    """ "meta" or "hf"; WeightsError when the names tell nothing."""
    for layout, names in (("meta", _META), ("hf", _HF)):
        if names["positions"] in tensors:
            return layout
    raise errors.WeightsError(
        f"{convert.source_of(tensors)}: not a SAM checkpoint: neither {_META['positions']} nor "
        f"{_HF['positions']} among its tensors {sorted(tensors)[:5]} ..."
    )


def read(path: str | os.PathLike) -> lazy.Tensors:
    """`readers.read`, fused projections cut into three."""
    return cut(readers.read(path))


def cut(tensors: convert.Tensors) -> lazy.Tensors:
    """The same tensors, every `attn.qkv.*` as three: `...#q`, `...#k`, `...#v`."""
    return clip.cut(tensors, _FUSED)


def join(loaders: Mapping[str, Callable[[], np.ndarray]]) -> dict[str, Callable[[], np.ndarray]]:
    """Inverse of `cut`, on functions that return arrays."""
    return clip.join(loaders)


def join_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes of what `join` makes."""
    return clip.join_shapes(shapes)


def abstract_params(cfg: sam.SamConfig) -> Mapping[str, Any]:
    """The tree that the converters fill."""
    return sam.make(cfg).abstract()


def from_tensors(tensors: convert.Tensors, cfg: sam.SamConfig, shardings=None) -> dict[str, Any]:
    """Tensors in either layout -> our parameters; see `convert.convert` for the errors."""
    fused = any(_FUSED.fullmatch(name) for name in tensors)
    rules = _RULES[layout_of(tensors)]
    whole = cut(tensors) if fused else tensors
    return convert.convert(whole, rules, abstract_params(cfg), IGNORED, shardings)


def to_meta(params: Mapping[str, Any]) -> dict[str, Callable]:
    """Our parameters -> Meta's name -> function returning the array."""
    return join(convert.revert(params, META_RULES))


def to_hf(params: Mapping[str, Any], cfg: sam.SamConfig) -> dict[str, Callable]:
    """Our parameters -> Hugging Face name -> function returning the array."""
    del cfg
    return join(convert.revert(params, HF_RULES))


def config_of(tensors: convert.Tensors) -> sam.SamConfig:
    """Sizes from the shapes; the number of heads from the tables of relative positions."""
    names = _META if layout_of(tensors) == "meta" else _HF
    whole = cut(tensors) if any(_FUSED.fullmatch(name) for name in tensors) else tensors
    _, grid, _, width = tensors[names["positions"]].shape
    stem, depth = names["blocks"], 0
    tables = {}
    while f"{stem}{depth}.attn.rel_pos_h" in tensors:
        tables[depth] = tensors[f"{stem}{depth}.attn.rel_pos_h"].shape
        depth += 1
    if not depth:
        raise errors.WeightsError(
            f"{convert.source_of(tensors)}: no {stem}0.attn.rel_pos_h; SAM without relative "
            "positions is not supported"
        )
    wide = {i for i, (length, _) in tables.items() if length == 2 * grid - 1}
    windows = {(length + 1) // 2 for i, (length, _) in tables.items() if i not in wide}
    if len(windows) > 1:
        raise errors.WeightsError(f"{convert.source_of(tensors)}: windows of sizes {windows}")
    heads = width // tables[0][1]
    prompt_width = tensors["mask_decoder.iou_token.weight"].shape[1]
    layer = "mask_decoder.transformer.layers."
    decoder_depth = len({name.split(".")[3] for name in tensors if name.startswith(layer)})
    patch = tensors[names["patches"] + ".weight"].shape[2]
    iou_head = names["layer"](re.match("(0)", "0"), "iou_prediction_head", "weight")
    return bounds.make_config(
        sam.SamConfig,
        width=width,
        depth=depth,
        num_heads=heads,
        global_blocks=tuple(sorted(wide)),
        mlp_width=whole[f"{stem}0.mlp.lin1.weight"].shape[0],
        window=windows.pop() if windows else 14,
        image_size=grid * patch,
        patch_size=patch,
        prompt_width=prompt_width,
        decoder_depth=decoder_depth,
        # Shapes do not tell; all of Meta's have 8 for a width of 256.
        decoder_heads=max(1, prompt_width // 32),
        decoder_mlp_width=tensors[f"{layer}0.mlp.lin1.weight"].shape[0],
        num_masks=tensors["mask_decoder.mask_tokens.weight"].shape[0] - 1,
        mask_channels=tensors[names["mask_convs"][1] + ".weight"].shape[0],
        iou_width=tensors[iou_head].shape[0],
    )


def load(
    path: str | os.PathLike, cfg: sam.SamConfig | None = None
) -> tuple[sam.SamConfig, dict[str, Any]]:
    """A file or folder in either layout: (config, parameters)."""
    tensors = readers.read(path)
    cfg = cfg or config_of(tensors)
    return cfg, from_tensors(tensors, cfg)
