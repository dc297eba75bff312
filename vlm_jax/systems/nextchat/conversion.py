"""Conversions of NExT-Chat; see `weights.conversion`."""

from __future__ import annotations

import argparse

from vlm_jax.systems.nextchat import network
from vlm_jax.systems.nextchat import weights as nextchat
from vlm_jax.weights import conversion, convert, export, readers

FORMATS = ("upstream",)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Where parts come from that a folder may lack."""
    parser.add_argument("--clip", default="", help="the CLIP file or folder of the image tower")
    parser.add_argument("--sam", default="", help="the SAM file or folder")


def read(args: argparse.Namespace) -> conversion.Weights:
    """A folder of the released layout."""
    tensors = nextchat.read(args.source, args.clip)
    if args.sam:
        tensors = nextchat.over_sam(tensors, readers.read(args.sam))
    cfg = nextchat.config_of(tensors, args.source)
    skipped = convert.ignored(tensors, nextchat.IGNORED)
    cfg, dtype, found = conversion.described(args, cfg, tensors, skipped, "upstream")
    params = nextchat.from_tensors(tensors, network.make(cfg).abstract())
    return conversion.Weights(cfg, params, dtype, found, skipped, tensors.source)


def write(args: argparse.Namespace, weights: conversion.Weights) -> tuple[int, dict[str, str]]:
    """A folder that the released program loads; the tokenizer's files are the reader's."""
    checkpoint = nextchat.checkpoint(weights.params, weights.cfg, weights.dtype)
    return len(checkpoint.shapes), export.write(args.target, checkpoint)
