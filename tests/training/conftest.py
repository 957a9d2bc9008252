import pytest

from tests import tiny_model, tiny_training
from tests.training.finetuned import IDLE


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Modules to train on and held-out text; what changes a file puts it back."""
    return tiny_training.write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """In float32, as it is tuned, so that what was not trained comes back bit for bit."""
    params = tiny_model.random_params()
    params["moe"]["router"]["bias_LE"][:, IDLE] = -100
    return tiny_model.write_model(tmp_path_factory.mktemp("models") / "tiny", params=params)
