"""Presets that keep their topology and lose their size, so that a CPU runs them in a second."""

from __future__ import annotations


def narrowed(config):
    """A preset's config at a fortieth of its width and of little depth; levels, kinds of blocks and inputs are kept.

    Transformers are at most two layers deep, and levels one, but where each layer of a level has a depth of its own.
    """
    first, heads = config["block_out_channels"][0], config["attention_head_dim"]
    depths = config.get("transformer_layers_per_block") or 1
    shallow = lambda depth: [shallow(each) for each in depth] if isinstance(depth, list) else min(depth, 2)  # noqa: E731
    uneven = isinstance(depths, list) and any(isinstance(each, list) for each in depths)
    return config | {
        "block_out_channels": [8 * width // first for width in config["block_out_channels"]],
        "attention_head_dim": 4 if heads == 64 else 2 if isinstance(heads, int) else [1, 2, 4, 4][: len(heads)],
        "norm_num_groups": 4,
        "layers_per_block": config["layers_per_block"] if uneven else 1,
        "transformer_layers_per_block": shallow(depths),
    }
