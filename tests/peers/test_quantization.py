"""Block-scaled FP8 against torch's own eight-bit floats, at DeepSeek-V3's block size.

pip install -r requirements-peers.txt && python -m pytest -m peers tests/peers
"""

import ml_dtypes
import numpy as np
import pytest

from moe_jax.checkpoint import filling
from moe_jax.checkpoint.quantization import Blocks
from moe_jax.checkpoint.safetensors_file import read_table

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
