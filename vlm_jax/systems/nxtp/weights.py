"""NXTP weights in the layout of the reference: complete, or as released.

    vision_encoder.*       OpenAI's CLIP tower, `proj` (out, in) in place of CLIP's own projection
    language_decoder.*     Meta's LLaMA, tables with two more rows

A released .pth holds the trained tensors alone; the rest comes from the CLIP file that training
started from. Names may have `module.` in front. Of `tok_embeddings` the converter sees three
parts, `#base` (the vocabulary), `#image` and `#empty` (the added rows), since only one is trained;
of a fused projection, as in `weights.clip`, `#q`, `#k`, `#v`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from vlm_jax.models import clip as clip_model
from vlm_jax.models import llama as llama_model
from vlm_jax.weights import clip, convert, errors, export, lazy, llama, readers

_VISION, _DECODER = "vision_encoder.", "language_decoder."
_TABLE, _HEAD = _DECODER + "tok_embeddings.weight", _DECODER + "output.weight"
_ROWS = {"#base": slice(0, -2), "#image": -2, "#empty": -1}
_SCALE = _VISION + "logit_scale"  # copied from CLIP, read by nobody
# Patterns of tensors that nobody reads.
IGNORED = (re.escape(_SCALE), r"language_decoder\.rope\.freqs")

_LACKS_CLIP = (
    "{} holds the trained tensors alone (or is no NXTP checkpoint). Give the CLIP file it was "
    "trained from as well: OpenAI's ViT-L-14.pt"
)

RULES = (
    *clip.openai_vision("vision/", _VISION),
    convert.Rule("projection/kernel", _VISION + "proj.weight", lambda x, shape: x.T, lambda x: x.T),
    convert.Rule("decoder/embed/table", _TABLE + "#base"),
    convert.Rule("decoder/embed/(image|empty)", _TABLE + r"#\1"),
    *(
        convert.Rule(f"decoder/{rule.ours}", _DECODER + rule.theirs, rule.load, rule.save)
        for rule in llama.META_RULES
        if rule.ours != "embed/table"
    ),
)


def first_trained(num_vision_blocks: int) -> int:
    """The first trained block of a tower: its last quarter is; upstream: 18 of ViT-L's 24."""
    return num_vision_blocks - max(num_vision_blocks // 4, 1)


def trained(num_vision_blocks: int) -> str:
    """A regex of our parameters that a released file holds, apart from the frozen table."""
    blocks = "|".join(str(i) for i in range(first_trained(num_vision_blocks), num_vision_blocks))
    return (
        rf"^(vision/(blocks/({blocks})|post_norm)/|projection/|decoder/"
        r"(layers|final_norm|lm_head)/|decoder/embed/image$)"
    )


def read(path: str | os.PathLike, clip_path: str | os.PathLike = "") -> lazy.Tensors:
    """A checkpoint of the reference, laid over the tower of a CLIP file.

    Raises:
      FileNotFoundError, WeightsError: see `readers.read`.
    """
    tensors = readers.read(path)
    if not clip_path:
        return tensors
    return over_clip(tensors, clip.read(clip_path))


def over_clip(tensors: convert.Tensors, clip_tensors: convert.Tensors) -> lazy.Tensors:
    """The tensors, and CLIP's image tower where they have none of that name.

    Raises:
      WeightsError: the CLIP file is not in OpenAI's layout.
    """
    if clip.layout_of(clip_tensors) != "openai":
        clip_tensors = _as_openai(clip_tensors)
    loaders = {}
    for name in clip_tensors:
        if name.startswith("visual.") and name != "visual.proj":
            renamed = _VISION + name.removeprefix("visual.")
            loaders[renamed] = functools.partial(clip_tensors.__getitem__, name)
    own = clip.cut(tensors)
    loaders |= {name: functools.partial(own.__getitem__, name) for name in own}
    source = f"{convert.source_of(tensors)} over {convert.source_of(clip_tensors)}"
    return lazy.Tensors(loaders, source)


def _as_openai(tensors: convert.Tensors) -> lazy.Tensors:
    """The image tower of another layout under OpenAI's names."""
    source = convert.source_of(tensors)
    cfg = clip.vision_config_of(tensors, source)
    if cfg.activation != "quick_gelu":
        raise errors.WeightsError(
            f"{source} was trained with {cfg.activation}; the reference's tower is OpenAI's, with "
            "quick_gelu"
        )
    params = {"vision": clip.vision_from_tensors(tensors, cfg)}
    return lazy.Tensors(convert.revert(params, clip.OPENAI_RULES), source)


def from_tensors(
    tensors: convert.Tensors, abstract: Mapping[str, Any], shardings=None
) -> dict[str, Any]:
    """The reference's tensors -> our parameters; see `convert.convert` for the errors.

    Args:
      tensors: complete, or a released file over CLIP: `read`.
      abstract: our tree.
      shardings: see `convert.convert`.

    Raises:
      ConversionError: as there; a released file without its CLIP is told what it lacks.
    """
    source = convert.source_of(tensors)
    if not (_SCALE in tensors or _VISION + "class_embedding" in tensors):
        raise errors.WeightsError(_LACKS_CLIP.format(source))
    ignored = IGNORED
    if "lm_head" not in abstract["decoder"] and _HEAD in tensors and _TABLE in tensors:
        if not np.array_equal(tensors[_HEAD][:-2], tensors[_TABLE][:-2]):
            raise errors.WeightsError(
                f"{source}: its head is not its embedding, but the model ties them; set "
                "model.decoder.tie_embeddings=False"
            )
        ignored = (*IGNORED, re.escape(_HEAD))
    return convert.convert(_cut(tensors), RULES, abstract, ignored, shardings)


def _cut(tensors: convert.Tensors) -> lazy.Tensors:
    """Fused tensors as parts; see the module."""
    whole = clip.cut(tensors)
    loaders = {name: functools.partial(whole.__getitem__, name) for name in whole}
    if _TABLE in loaders:
        load = loaders.pop(_TABLE)
        for part, rows in _ROWS.items():
            loaders[_TABLE + part] = lambda rows=rows: load()[rows]
    return lazy.Tensors(loaders, convert.source_of(tensors))


def to_upstream(params: Mapping[str, Any], *, released: bool = False) -> dict[str, Callable]:
    """Our parameters -> the reference's name -> function returning the array.

    The reference knows no tied heads: one is written out, zero for the two added tokens.

    Args:
      params: complete.
      released: the trained tensors alone, `module.` in front, as the released files are. The
        complete form has `logit_scale` too, at the value of every released CLIP, log(100).
    """
    loaders = clip.join(convert.revert(params, RULES))
    parts = [loaders.pop(_TABLE + part) for part in _ROWS]
    loaders[_TABLE] = lambda: np.concatenate(
        [parts[0](), parts[1]()[None], parts[2]()[None]], axis=0
    )
    if _HEAD not in loaders:
        loaders[_HEAD] = lambda: np.pad(parts[0](), ((0, 2), (0, 0)))
    if not released:
        return loaders | {_SCALE: lambda: np.float32(np.log(100)).reshape(())}
    names = released_names(loaders, _num_vision_blocks(params))
    return {f"module.{name}": loaders[name] for name in names}


def shapes(abstract: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The reference's name -> shape of every tensor of the complete form; allocates nothing."""
    found = clip.join_shapes(convert.reverted_shapes(abstract, RULES))
    base = found.pop(_TABLE + "#base")
    for part in ("#image", "#empty"):
        found.pop(_TABLE + part)
    rows = base[0] + 2, base[1]
    return found | {_TABLE: rows, _HEAD: rows, _SCALE: ()}


def released_names(names: Iterable[str], num_vision_blocks: int) -> list[str]:
    """Which of the reference's names a released file holds."""
    first = first_trained(num_vision_blocks)
    kept = []
    for name in names:
        block = re.match(r"vision_encoder\.transformer\.resblocks\.(\d+)\.", name)
        other = name.startswith((_VISION + "proj.", _VISION + "ln_post.", _DECODER))
        if other or (block and int(block[1]) >= first):
            kept.append(name)
    return kept


def _num_vision_blocks(params: Mapping[str, Any]) -> int:
    return len(params["vision"]["blocks"])


def checkpoint(params: Mapping[str, Any], *, released: bool = False, dtype="float16"):
    """What `export.write` writes: the reference's names in a safetensors file."""
    tensors = to_upstream(params, released=released)
    all_shapes = shapes(params)
    sizes = {name: all_shapes[name.removeprefix("module.")] for name in tensors}
    return export.Checkpoint(tensors, sizes, np.dtype(dtype), "nxtp", {"format": "pt"}, {})


def save(
    path: str | os.PathLike, params: Mapping[str, Any], *, released: bool = True, dtype="float16"
) -> dict[str, str]:
    """Writes one file in the reference's names; its suffix says the format.

    Args:
      path: .pth, what the reference loads, or .safetensors.
      params: complete.
      released: see `to_upstream`.
      dtype: of the file.

    Returns, raises: as `export.write_file`.
    """
    beside = {"epoch": 0, "global_step": 0}  # upstream reads both
    return export.write_file(path, checkpoint(params, released=released, dtype=dtype), beside)


# ---- where training starts -------------------------------------------------------------------


def decoder_from_llama(
    tensors: convert.Tensors, cfg: llama_model.LlamaConfig, seed: int = 0
) -> dict[str, Any]:
    """The first blocks of a language model in any layout, with the two added tokens.

    A table may be longer than our vocabulary, as those padded to a multiple of 64 are: the task
    checks that the tokenizer has just our ids, so the rows behind them are never read.

    Both vectors in the table are standard normal. Of the head, the marker's column is uniform
    within 1/sqrt(width) and the other zero; upstream: models/llama.py extends the tables so.

    Args:
      tensors: of the language model, deeper or not.
      cfg: of our decoder, the added tokens counted.
      seed: of the random rows.
    """
    base = dataclasses.replace(cfg, vocab_size=cfg.vocab_size - 2, scan_layers=True, fused=False)
    wanted = llama.first_tokens(llama.first_blocks(tensors, cfg.depth), base.vocab_size)
    params = llama.from_tensors(wanted, base)
    rng = np.random.default_rng(seed)
    dtype = np.dtype(cfg.param_dtype)
    vectors = rng.standard_normal((2, cfg.width)).astype(dtype)
    params["embed"] |= {"image": vectors[0], "empty": vectors[1]}
    if not cfg.tie_embeddings:
        bound = cfg.width**-0.5
        column = rng.uniform(-bound, bound, (cfg.width, 1)).astype(dtype)
        head = [params["lm_head"]["kernel"], column, np.zeros_like(column)]
        params["lm_head"]["kernel"] = np.concatenate(head, axis=1)
    return params


# ---- sizes -----------------------------------------------------------------------------------


def vision_config_of(tensors: convert.Tensors) -> clip_model.VisionConfig:
    """Sizes of the image tower from the shapes of a complete checkpoint."""
    names = {
        name.replace(_VISION, "visual.", 1): name for name in tensors if name.startswith(_VISION)
    }
    loaders = {new: functools.partial(tensors.__getitem__, old) for new, old in names.items()}
    tower = lazy.Tensors(loaders, convert.source_of(tensors))
    if "visual.class_embedding" not in tower:
        raise errors.WeightsError(_LACKS_CLIP.format(convert.source_of(tensors)))
    return clip.vision_config_of(tower)


def decoder_config_of(
    tensors: convert.Tensors, params_json: str | os.PathLike = ""
) -> llama_model.LlamaConfig:
    """Sizes of the decoder: from LLaMA's params.json, else those of LLaMA 7B if the widths fit.

    Raises:
      WeightsError: the shapes are not 7B's, and no params.json tells the number of heads.
    """
    if _TABLE not in tensors:
        raise errors.WeightsError(f"{convert.source_of(tensors)}: no {_TABLE}; not NXTP's")
    vocab_size, width = tensors[_TABLE].shape
    pattern = re.compile(re.escape(_DECODER) + r"layers\.(\d+)\.attention_norm\.weight")
    depth = sum(pattern.fullmatch(name) is not None for name in tensors)
    if params_json:
        from_meta = functools.partial(llama.config_from_meta, vocab_size=vocab_size)
        file = pathlib.Path(params_json)
        cfg = readers.read_config(file, llama_model.LlamaConfig, from_meta)
        return dataclasses.replace(cfg, depth=depth)
    if width != 4096:
        raise errors.WeightsError(
            f"{convert.source_of(tensors)}: a decoder of width {width} is not LLaMA 7B's; give the "
            "folder with LLaMA's params.json, which tells the number of heads"
        )
    return llama_model.LlamaConfig(vocab_size, width, depth, 11008, 32, rms_eps=1e-5)
