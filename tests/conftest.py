import os

# no test reaches a real hub: tests of hub names run a server of their own
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
# compilation takes most of the time, and small programs run as fast without LLVM's optimisations
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis
import jax

from moe_jax import command

command.configure_jax()  # compilation takes most of the time; the next run finds the programs in the cache
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("moe_jax", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("moe_jax")
