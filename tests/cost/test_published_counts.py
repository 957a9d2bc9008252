"""Parameters of the published models, total and active, against their publishers' figures; nothing is allocated.

Publishers print few digits and count in different ways. A row says which embeddings its active figure includes;
where a figure differs from ours by more than 1%, it has to be ours as printed to its digits: rounded, or cut off.
"""

import decimal
import pathlib
from typing import NamedTuple

import pytest

from moe_jax.checkpoint.families import FAMILIES
from moe_jax.config import gin
from moe_jax.model import parameters

MODELS = pathlib.Path(__file__).parents[2] / "configs" / "models"


class Published(NamedTuple):
    """Figures in billions, as printed."""

    family: str
    total: str
    active: str
    total_embeddings: int  # how many of the input embedding and the head the total includes
    active_embeddings: int
    source: str


PUBLISHED = {
    "olmoe_1b_7b": Published("olmoe", "6.9", "1.3", 2, 2, "arXiv 2409.02060, section 2"),
    "qwen1_5_moe_a2_7b": Published("qwen2_moe", "14.3", "2.7", 2, 2, "card of Qwen/Qwen1.5-MoE-A2.7B"),
    # 3.35 with both embeddings: the card cuts off.
    "qwen3_30b_a3b": Published("qwen3_moe", "30.5", "3.3", 2, 2, "card of Qwen/Qwen3-30B-A3B"),
    "qwen3_235b_a22b": Published("qwen3_moe", "235", "22", 2, 2, "card of Qwen/Qwen3-235B-A22B"),
    # DeepSeek's active figures leave out the input embedding, of which a token reads one row.
    "deepseek_v2_lite": Published("deepseek_v2", "15.7", "2.4", 2, 1, "arXiv 2405.04434, appendix B"),
    "deepseek_v2": Published("deepseek_v2", "236", "21", 2, 1, "arXiv 2405.04434, abstract"),
    # 671 leaves out the 14 of the multi-token prediction module; 36.6 is "including 0.9B for the output Head".
    "deepseek_v3": Published("deepseek_v3", "671", "36.6", 2, 1, "README_WEIGHTS.md of deepseek-ai/DeepSeek-V3-Base"),
    "moonlight_16b_a3b": Published("deepseek_v3", "15.29", "2.24", 0, 0, "arXiv 2502.16982: without embeddings"),
    # The card says 1 T, the report 1.04 T, 1.3% more than the files hold: this is the hub's count of the files.
    "kimi_k2": Published("kimi_k2", "1026.5", "32.6", 2, 2, "files of moonshotai/Kimi-K2-Instruct; arXiv 2507.20534"),
    # The report leaves both embeddings out.
    "glm_4_5_air": Published("glm4_moe", "106", "12", 0, 0, "arXiv 2508.06471, table 1"),
    "mixtral_8x7b": Published("mixtral", "46.7", "12.9", 2, 2, "arXiv 2401.04088; mistral.ai/news/mixtral-of-experts"),
}


def counted(architecture, count, embeddings):
    trunk = architecture.decoder
    assert not trunk.tie_embeddings
    return count(architecture) - (2 - embeddings) * trunk.vocab_size * trunk.d_model


def agrees(ours: int, printed: str) -> bool:
    """Within 1%, or the same when ours is rounded or cut off to the digits that are printed."""
    billions, given = decimal.Decimal(ours) / 10**9, decimal.Decimal(printed)
    if abs(billions - given) <= given / 100:
        return True
    digit = decimal.Decimal(1).scaleb(given.as_tuple().exponent)
    return given in (billions.quantize(digit, mode) for mode in (decimal.ROUND_HALF_UP, decimal.ROUND_DOWN))


def test_every_model_has_published_figures():
    assert {path.stem for path in MODELS.glob("*.gin")} == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_agree_with_the_publishers(name):
    published = PUBLISHED[name]
    architecture = gin.read_config(MODELS / f"{name}.gin").architecture
    total = counted(architecture, parameters.count, published.total_embeddings)
    active = counted(architecture, parameters.count_active, published.active_embeddings)
    assert agrees(total, published.total), f"{total / 1e9:.3f} B"
    assert agrees(active, published.active), f"{active / 1e9:.3f} B"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_family_expresses_the_model(name):
    architecture = gin.read_config(MODELS / f"{name}.gin").architecture
    family = FAMILIES[PUBLISHED[name].family]
    assert family.architecture(family.config_json(architecture)) == architecture


def test_agreement():
    assert agrees(3_353_000_000, "3.3") and agrees(3_353_000_000, "3.4") and agrees(12_170_000_000, "12")
    assert not agrees(3_453_000_000, "3.3") and not agrees(3_249_000_000, "3.3") and not agrees(13_100_000_000, "12")
