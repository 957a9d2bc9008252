import pytest

from tests import tiny_model, tiny_training
from tests.training.finetuned import IDLE


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Modules to train on and held-out text; a test that changes a file restores it."""
    return tiny_training.write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model in float32, as in fine-tuning, so that untrained weights stay bit-identical."""
    params = tiny_model.random_params()
    params["moe"]["router"]["bias_LE"][:, IDLE] = -100
    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny", params=params)
