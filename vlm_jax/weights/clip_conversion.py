"""Conversions of CLIP alone, which is a network and no system; see `weights.conversion`."""

from __future__ import annotations

import argparse

from vlm_jax.weights import clip, conversion, export

_NETWORK = conversion.Network("clip", clip, clip.read)
FORMATS = ("hf", "upstream")
read = _NETWORK.read


def write(args: argparse.Namespace, weights: conversion.Weights) -> tuple[int, dict[str, str]]:
    """A folder that transformers reads, or a file in OpenAI's names."""
    if args.format == "hf":
        return _NETWORK.write(args, weights)
    checkpoint = clip.openai_checkpoint(weights.params, weights.dtype)
    return len(checkpoint.shapes), export.write_file(args.target, checkpoint)
