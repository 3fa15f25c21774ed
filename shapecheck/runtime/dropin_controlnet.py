"""A session in the place of a pipeline's ControlNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetOutput
from torch import Tensor

from shapecheck.contract.naming import match_residuals
from shapecheck.runtime.combine import combined
from shapecheck.runtime.dropin import DropIn, DropInSession
from shapecheck.runtime.readiness import note_ready


class DropInControlNet(DropIn, ControlNetModel, replaces=ControlNetModel):  # type: ignore[misc]
    """A ControlNet whose forward is a session: `pipe.controlnet = DropInControlNet(session)`. `shapecheck.load` makes one.

    Pipelines tell one ControlNet from several by its class, so it is a `ControlNetModel`, without weights. It fits into a
    `MultiControlNetModel`, beside others in PyTorch. `conditioning_scale` is an input of the file: it may change in every call.
    StreamDiffusion calls it as it does a ControlNet in PyTorch: it has no `stream`, which marks an engine there.
    """

    def __init__(self, session: DropInSession, *, finite: bool = True, own_outputs: bool = True) -> None:
        torch.nn.Module.__init__(self)  # and not ControlNetModel's, which builds one
        self._set_up(session, "controlnet", finite=finite, own_outputs=own_outputs)
        self._residuals = [slot.name for slot in session.contract.slots]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        guess_mode: bool = False,
        return_dict: bool = True,
        **added: Any,
    ) -> ControlNetOutput | tuple[list[Tensor], Tensor]:
        """Return one residual a slot, (batch, channels, height, width) each, in diffusers' form.

        Arguments are diffusers'; `text_embeds` and `time_ids` may be passed as keywords too. Raises CallError with all that
        is wrong.
        """
        arguments = {
            "sample": sample,
            "encoder_hidden_states": encoder_hidden_states,
            "controlnet_cond": controlnet_cond,
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "attention_mask": attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs or None,
        }
        conditions = {**(added_cond_kwargs or {}), **added}
        note_ready([sample, timestep, encoder_hidden_states, *conditions.values()], self.device)  # a UNet may begin with these
        inputs = self._arguments.base(arguments, conditions, timestep)
        weighted = guess_mode and not self.config.get("global_pool_conditions")
        scale = self._arguments.place_number("conditioning_scale", 1.0 if weighted else conditioning_scale, 1)
        inputs["conditioning_scale"] = scale.reshape(1)
        outputs = self._run(inputs)
        # a file may call its outputs otherwise: by a scheme, else it has them in the order of the slots
        names = match_residuals(self._residuals, tuple(outputs)).values() or outputs
        *downs, mid = (outputs[name] for name in names)
        if weighted:
            downs, mid = combined([(downs, mid)], [conditioning_scale], guess_mode=True)
        return ControlNetOutput(downs, mid) if return_dict else (downs, mid)
