import hypothesis
import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("moe_jax", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("moe_jax")
