"""What a program switched on in a live model, and no graph holds, is refused by name with what undoes it."""

from __future__ import annotations

import pytest
import small
import torch
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0

import shapecheck
from shapecheck.models.patches import refuse_patches


def replace_forward(unet):
    old = unet.down_blocks[0].forward
    unet.down_blocks[0].forward = lambda *given, **named: old(*given, **named)


def set_pag(unet):
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.processor = PAGCFGIdentitySelfAttnProcessor2_0()


def load_ip_adapter(unet):
    width, layers = unet.config.cross_attention_dim, {}
    image = {"proj.weight": torch.zeros(4 * width, 20), "proj.bias": torch.zeros(4 * width)}
    image |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    names = [name for name in unet.attn_processors if not name.endswith("attn1.processor")]
    for number, name in enumerate(names):
        inner = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        layers |= {f"{2 * number + 1}.to_{letter}_ip.weight": torch.zeros(inner, width) for letter in "kv"}
    unet._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": layers}])


PATCHES = {
    r"attention slicing is on: pipe\.disable_attention_slicing\(\)": lambda unet: unet.set_attention_slice(1),
    r"FreeU is on.*pipe\.disable_freeu\(\)": lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    r"an IP-Adapter is loaded.*pipe\.unload_ip_adapter\(\)": load_ip_adapter,
    r"\(PAG\).*unet\.set_default_attn_processor\(\)": set_pag,
    r"the forward of down_blocks\.0 is replaced.*DeepCache": replace_forward,
    r"tomesd\.remove_patch\(pipe\)": lambda unet: setattr(unet, "_tome_info", {}),
}


@pytest.mark.parametrize("words", PATCHES)
def test_patch_is_refused_by_name(words, tmp_path):
    unet = small.unet(**small.TINY)
    PATCHES[words](unet)
    for use in (shapecheck.probe, lambda model: shapecheck.export(model, tmp_path / "unet.onnx")):
        with pytest.raises(shapecheck.ShapecheckError, match=words):
            use(unet)
    assert not any(tmp_path.iterdir())


def test_undone_patch_is_accepted():
    unet = small.unet(**small.TINY)
    refuse_patches(unet)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    unet.disable_freeu()
    unet.set_attention_slice(1)
    unet.set_attention_slice(None)
    unet.mid_block.attentions[0].norm.forward = torch.nn.Identity().forward  # of a norm: it is observed as it is
    refuse_patches(unet)
