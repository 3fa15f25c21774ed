"""Calibrate a pipeline for fp8: run it on the user's own prompts, and note the largest magnitude that goes into each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from shapecheck.contract import ShapecheckError
from shapecheck.models.adapters import remove_adapters
from shapecheck.models.calibration_record import CalibratedModel, Calibration, digest_model
from shapecheck.models.diffusers_models import is_union
from shapecheck.models.forward_call import unwrap_compiled
from shapecheck.observe.subject import resolve_subject
from shapecheck.pipelines.model_owners import ModelOwners, require_exchangeable
from shapecheck.progress import Progress, silent


def calibrate(
    pipe: Any,
    prompts: str | Sequence[str],
    *,
    steps: int | None = None,
    image: Any = None,
    progress: Progress = silent,
    **call: Any,
) -> Calibration:
    """Run a diffusers pipeline once a prompt, in PyTorch, and return what goes into each layer of its UNet and ControlNets.

    Give the kind of call that is to be fast: prompts like those to come (eight to thirty), its `steps`, the `image` of its
    ControlNets, and in `call` whatever else the pipeline takes (`guidance_scale`, `height`, `negative_prompt`, `generator`).
    Nothing is decoded, and each prompt has its own seed, unless `call` says otherwise. The pipeline stays as it is.

    Raises ShapecheckError if the pipeline holds no UNet in PyTorch, never calls it, or computes what is not finite; whatever
    the pipeline itself raises passes through.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ShapecheckError("calibrate needs prompts: give some that are like those to come")
    owners = ModelOwners(pipe)
    if not callable(pipe):
        raise ShapecheckError(f"calibrate calls a diffusers pipeline, not a {type(pipe).__name__}: give the pipeline in it")
    # a union's images change from call to call: it is never exported, and stays as it is
    nets = [net for net in owners.controlnets if not is_union(unwrap_compiled(net))]
    for net in nets:
        require_exchangeable(net, "ControlNet")
    arguments = {"output_type": "latent"} | call
    arguments |= {} if steps is None else {"num_inference_steps": steps}
    arguments |= {} if image is None else {"image": image}

    modules = [unwrap_compiled(module) for module in (owners.unet, *nets)]
    calls, asked = 0, ""

    def count_call(*_: object) -> None:
        nonlocal calls
        calls += 1
        progress(f"calibrating with {asked}, call {calls} of the UNet")

    with ExitStack() as watching:  # nothing remains, whatever the pipeline raises
        watching.enter_context(torch.compiler.set_stance("force_eager"))  # hooks act in no code that was compiled without them
        watching.callback(modules[0].register_forward_pre_hook(count_call).remove)
        seen = [_watch(module, watching) for module in modules]
        for number, prompt in enumerate(texts, 1):
            asked = f"prompt {number} of {len(texts)}"
            seeded = {} if "generator" in arguments else {"generator": torch.Generator().manual_seed(number)}
            pipe(prompt, **arguments, **seeded)
    if not calls:
        raise ShapecheckError(f"{type(pipe).__name__} did not call its UNet")

    progress("observing the contracts")
    models: dict[str, CalibratedModel] = {}
    for module, magnitudes in zip(modules, seen, strict=True):
        model = _describe(module, magnitudes)
        known = models.get(model.contract)
        models[model.contract] = _join(known, model) if known else model
    versions = tuple((name, version(name)) for name in ("diffusers", "torch"))
    return Calibration(tuple(models.values()), len(texts), calls, versions)


def _watch(module: nn.Module, watching: ExitStack) -> dict[str, Tensor]:
    """Note from now on the largest magnitude that goes into each layer: numbers that stay on its device until they are read."""
    seen: dict[str, Tensor] = {}

    def watch_layer(name: str, layer: nn.Module) -> None:
        def note(_layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and inputs[0].numel():
                magnitude = torch.linalg.vector_norm(inputs[0].detach(), float("inf"), dtype=torch.float32)
                seen[name] = torch.maximum(seen[name], magnitude) if name in seen else magnitude  # a NaN stays one

        watching.callback(layer.register_forward_pre_hook(note).remove)

    for name, layer in remove_adapters(module).named_modules():  # names as in a file, into which LoRAs are merged
        if isinstance(layer, nn.Linear | nn.Conv2d):
            watch_layer(name, module.get_submodule(name))
    return seen


def _describe(module: nn.Module, seen: Mapping[str, Tensor]) -> CalibratedModel:
    magnitudes = {name: float(value) for name, value in seen.items()}
    name = type(module).__name__
    if wrong := [layer for layer, magnitude in magnitudes.items() if not magnitude < float("inf")]:
        more = f" and of {len(wrong) - 1} more layers" if len(wrong) > 1 else ""
        raise ShapecheckError(
            f"what goes into {wrong[0]} of the {name}{more} is not finite: the pipeline computes NaN or Inf in this precision"
        )
    subject = resolve_subject(module)
    contract = subject.contract("float32", control=True)
    return CalibratedModel(
        subject.role, name, digest_model(contract), tuple((layer, value) for layer, value in magnitudes.items() if value > 0)
    )


def _join(one: CalibratedModel, other: CalibratedModel) -> CalibratedModel:
    """Return what was seen of two models of one architecture: of each layer the larger magnitude."""
    first, second = dict(one.layers), dict(other.layers)
    layers = tuple((name, max(first.get(name, 0.0), second.get(name, 0.0))) for name in first | second)
    return CalibratedModel(one.role, one.name, one.contract, layers)
