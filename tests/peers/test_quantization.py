"""Block-scaled FP8 against torch's own eight-bit floats, at DeepSeek-V3's block size.

pip install -r requirements-peers.txt && python -m pytest -m peers tests/peers
"""

import ml_dtypes
import numpy as np
import pytest

import moe_jax
from moe_jax.checkpoint import filling
from moe_jax.checkpoint.quantization import Blocks
from moe_jax.checkpoint.safetensors_file import read_table
from tests.family_variants import VARIANTS, write

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (200, 300), (1, 129), (127, 1), (576, 7168)])
def test_torch_writes_and_multiplies_alike(tmp_path, shape):
    import safetensors.torch
    import torch

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).mul(50).to(torch.float8_e4m3fn)
    scale = torch.rand([-(-size // 128) for size in shape], generator=generator) / 100
    safetensors.torch.save_file({"w": weight, "w_scale_inv": scale}, tmp_path / "a.safetensors")
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: shape[0], : shape[1]]
    expected = weight.to(torch.float32) * spread
    stored = read_table(tmp_path / "a.safetensors")
    for dtype, narrow in ((np.dtype(np.float32), torch.float32), (np.dtype(ml_dtypes.bfloat16), torch.bfloat16)):
        got = filling.allocate(shape, dtype)
        filling.fill([filling.Source("w", stored["w"], got, stored["w_scale_inv"], Blocks(128, 128))])
        np.testing.assert_array_equal(got.astype(np.float32), expected.to(narrow).to(torch.float32).numpy())


def test_transformers_reads_experts_that_were_saved_in_fp8(tmp_path):
    """Its kernels for FP8 need a GPU; without one it dequantises, by the scales and the list of other modules."""
    import torch
    import transformers

    write(tmp_path / "wide", VARIANTS["qwen3_moe"])
    model = moe_jax.load(tmp_path / "wide", dtype="float32", expert_dtype="float8_e4m3fn")
    model.save(tmp_path / "narrow")
    tokens_BT = np.random.default_rng(0).integers(0, 64, (2, 9))
    settings = transformers.FineGrainedFP8Config(dequantize=True, weight_block_size=(128, 128))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "narrow", dtype=torch.float32, quantization_config=settings
    )
    with torch.no_grad():
        expected_BTV = theirs(input_ids=torch.tensor(tokens_BT)).logits.numpy()
    difference = np.linalg.norm(model.logits(tokens_BT) - expected_BTV) / np.linalg.norm(expected_BTV)
    assert difference < 1e-5
    wide = moe_jax.load(tmp_path / "wide", dtype="float32").logits(tokens_BT)
    assert np.linalg.norm(wide - expected_BTV) > 1e-3 * np.linalg.norm(expected_BTV)  # what is read is narrow
