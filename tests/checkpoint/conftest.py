import numpy as np
import pytest

from moe_jax.checkpoint import huggingface
from tests.checkpoint.tiny_folder import TINY, random_params


@pytest.fixture
def folder(tmp_path):
    """A valid checkpoint to break."""
    huggingface.write_checkpoint(
        tmp_path / "model", TINY, huggingface.nested(random_params(TINY, np.float32)), dtype="float32"
    )
    return tmp_path / "model"
