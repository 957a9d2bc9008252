import os

# no test reaches a real hub: those of names serve one themselves
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}

import hypothesis
import jax

from moe_jax import command

command.configure_jax()  # compiling is most of what the tests do, and the next run finds it done
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("moe_jax", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("moe_jax")
