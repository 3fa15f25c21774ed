"""How soon `shapecheck explain` answers: `python tests/bench/explain.py`. Ratios to a bare start of the command, in one run."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from hostile import FAMOUS, HOSTILE

ROUNDS = 5
UP = "Sizes of tensors must match except in dimension 1. Expected size 16 but got size 32 for tensor number 1 in the list."
NORM = "got weight of shape [2560] and input of shape [2, 1920, 16, 16]"
META = (
    "Attempting to broadcast a dimension of length 640 at -3! Mismatching argument at index 1 had "
    "torch.Size([2, 640, 32, 32]); but expected shape should be broadcastable to [2, 320, 32, 32]"
)
TEXTS = {"the famous text": FAMOUS, "one of the meta device": META, "a concatenation": UP, "a norm": NORM}


def seconds(*arguments: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "shapecheck", *arguments], capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        commands = {"`shapecheck --version`": ["--version"]}
        for name, text in TEXTS.items():
            commands[f"{name}, on sd15"] = ["explain", text, "--model", "sd15"]
            commands[f"{name}, on every preset"] = ["explain", text]
        for name, text in HOSTILE.items():
            path = Path(folder) / name
            path.write_text(text, encoding="utf-8", errors="surrogatepass")
            commands[f"hostile: {name}, on every preset"] = ["explain", str(path)]
        took: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(ROUNDS):
            for name, arguments in commands.items():
                took[name].append(seconds(*arguments))
    rows = {name: statistics.median(each) for name, each in took.items()}
    start = rows["`shapecheck --version`"]
    table = [(name, f"{each:.2f}", f"{each / start:.1f}") for name, each in rows.items()]
    print(tabulate(table, ("asked", "seconds", "ratio"), tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
