"""Conversions of NXTP; see `weights.conversion`."""

from __future__ import annotations

import argparse
import pathlib

from vlm_jax.systems.nxtp import network
from vlm_jax.systems.nxtp import weights as nxtp
from vlm_jax.weights import conversion, convert

FORMATS = ("upstream",)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What a released file leaves out, and what to leave out."""
    parser.add_argument("--clip", default="", help="the CLIP file of a released checkpoint")
    parser.add_argument("--llama", default="", help="folder with LLaMA's params.json")
    parser.add_argument("--released", action="store_true", help="the trained tensors alone")


def read(args: argparse.Namespace) -> conversion.Weights:
    """A checkpoint of the reference, complete or as released."""
    tensors = nxtp.read(args.source, args.clip)
    sizes = pathlib.Path(args.llama).expanduser() / "params.json" if args.llama else ""
    decoder = nxtp.decoder_config_of(tensors, sizes)
    cfg = network.NxtpConfig(nxtp.vision_config_of(tensors), decoder)
    skipped = convert.ignored(tensors, nxtp.IGNORED)
    cfg, dtype, found = conversion.described(args, cfg, tensors, skipped, "upstream")
    params = nxtp.from_tensors(tensors, network.make(cfg).abstract())
    return conversion.Weights(cfg, params, dtype, found, skipped, tensors.source)


def write(args: argparse.Namespace, weights: conversion.Weights) -> tuple[int, dict[str, str]]:
    """A file in the reference's names.

    Raises:
      ValueError: the tower is not CLIP's.
    """
    params = weights.params
    if "blocks" not in params["vision"]:
        raise ValueError("the reference has CLIP's tower; a run with another has no such layout")
    digests = nxtp.save(args.target, params, released=args.released, dtype=weights.dtype)
    return len(nxtp.to_upstream(params, released=args.released)), digests
