"""Texts that nobody means well with, and the texts that are the most work."""

from __future__ import annotations

FAMOUS = "The size of tensor a (320) must match the size of tensor b (640) at non-singleton dimension 1"
HOSTILE = {
    "megabytes": FAMOUS * 60_000,
    "no newline": "The size of tensor a (" * 300_000,
    "one name": "Required inputs (['" * 300_000 + " are missing from",
    "nested": "[" * 3_000_000 + "(" * 2_000_000,
    "colours": "\x1b[" * 2_000_000,
    "digits": f"The size of tensor a ({10**30}) must match the size of tensor b ({10**300}) at non-singleton dimension 1",
    "minus": "Expected size -1 but got size 99999999999999999999 for tensor number 1 in the list",
    "shapes": "control could not be applied torch.Size([" + "9, " * 100_000 + "]) torch.Size([])",
    "large": "The size of tensor a (999999999) must match the size of tensor b (999999998) at non-singleton dimension 3",
    "zero": "The size of tensor a (0) must match the size of tensor b (0) at non-singleton dimension 2",
    "prefixes": "E1126 13:31:09.187000 5375 torch/fake_tensor.py:3090] " * 50_000,
    "surrogates": "\ud800 The size of tensor a (\udfff)",
}
_ON_THE_WAY_UP = (
    "Sizes of tensors must match except in dimension 1. Expected size {} but got size {} for tensor number 1 in the list.\n"
)
HOSTILE["many questions"] = "".join(_ON_THE_WAY_UP.format(2 * size, size) for size in range(8, 64, 4))
HOSTILE["many frames"] = "Traceback (most recent call last):\n" + 'File "a.py", line 1, in f ' * 50_000 + FAMOUS
HOSTILE["one path"] = "/a" * 2_000_000 + ".py:1: in f " + FAMOUS
