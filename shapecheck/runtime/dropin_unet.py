"""A session in the place of a pipeline's UNet."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from shapecheck.runtime.dropin import UNSUPPORTED, DropIn, DropInSession, UnsupportedError
from shapecheck.runtime.readiness import find_ready


class DropInUNet(DropIn, UNet2DConditionModel, replaces=UNet2DConditionModel):  # type: ignore[misc]
    """A UNet whose forward is a session: `pipe.unet = DropInUNet(session)`. `shapecheck.load` makes one.

    It is called as diffusers' `UNet2DConditionModel` is, and as StreamDiffusion calls a TensorRT engine. Every call is checked:
    an argument that is not an input of the file is an error, and so are residuals that are missing, of another shape, dtype
    or device, or passed without their other half. Without residuals every slot gets zeros, and so does every feature of a
    T2I-Adapter in a file that was exported for one; the list of features stays whole. With `finite` an image that is not all
    finite numbers is an error that names the slot the NaN came in by; on a GPU that waits for the image.
    """

    def __init__(self, session: DropInSession, *, finite: bool = True, own_outputs: bool = True) -> None:
        nn.Module.__init__(self)  # and not UNet2DConditionModel's, which builds one
        self._set_up(session, "unet", finite=finite, own_outputs=own_outputs)
        self.stream = None  # StreamDiffusion knows an engine by its `engine` and `stream`, and calls it in another way
        self.encoder_hid_proj = None
        widths = self.config.get("projection_class_embeddings_input_dim")
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=widths)) if widths else None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        down_block_additional_residuals: Any = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Any = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        **added: Any,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Return the predicted noise, (batch, channels, height, width).

        Arguments are diffusers'. `text_embeds` and `time_ids` may be passed as keywords too, as StreamDiffusion does. Raises
        CallError with all that is wrong.
        """
        arguments = {
            "sample": sample,
            "encoder_hidden_states": encoder_hidden_states,
            "class_labels": class_labels,
            "timestep_cond": timestep_cond,
            "attention_mask": attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs or None,
            "encoder_attention_mask": encoder_attention_mask,
        }
        conditions = {**(added_cond_kwargs or {}), **added}
        ready = None
        if getattr(self.engine, "begins_early", False) and not self.is_converted:
            ready = find_ready([*arguments.values(), *conditions.values(), timestep], self.device)
        engine: Any = self.engine
        with engine.begin_after(ready) if ready is not None else nullcontext():
            inputs = self._arguments.base(arguments, conditions, timestep)
        inputs |= self._arguments.residuals(down_block_additional_residuals, mid_block_additional_residual, sample)
        inputs |= self._arguments.features(down_intrablock_additional_residuals, sample)
        (image,) = self._run(inputs, **({"ready": ready} if ready is not None else {})).values()
        return UNet2DConditionOutput(sample=image) if return_dict else (image,)

    def disable_freeu(self) -> None:
        """Do nothing: FreeU is never on."""

    def load_lora_adapter(self, state_dict: Mapping[str, Any], prefix: str | None = "unet", **_: Any) -> None:
        """Refuse a LoRA that has a part for the UNet; one for the text encoder alone does not concern it."""
        if any(prefix is None or key.startswith(f"{prefix}.") for key in state_dict):
            raise UnsupportedError(f"load_lora_weights: {UNSUPPORTED['load_lora_adapter']}")
