import os

from jaxlib.version import __version_info__ as JAXLIB

# no test reaches a real hub: tests of hub names run a server of their own
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
# Compilation takes most of the time. Small programs run as fast without LLVM's optimisations; each test process has a
# core, so threads gain nothing; and before 0.11 there is a code generator that is four times as fast.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if JAXLIB < (0, 11) else ""),
)

import hypothesis
import jax

from moe_jax import command

command.configure_jax()  # compilation takes most of the time; the next run finds the programs in the cache
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("moe_jax", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("moe_jax")
