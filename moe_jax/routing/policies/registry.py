"""All kinds of policies. To add one, write its class in a new file and list it here."""

from moe_jax.routing.policies.budget import Budget
from moe_jax.routing.policies.capacity import Capacity
from moe_jax.routing.policies.kind import Kind
from moe_jax.routing.policies.mass import Mass
from moe_jax.routing.policies.median import Median
from moe_jax.routing.policies.opportunistic import Opportunistic
from moe_jax.routing.policies.ratio import Ratio
from moe_jax.routing.policies.renormalize import Renormalize
from moe_jax.routing.policies.reroute import Reroute
from moe_jax.routing.policies.schedule import ModelOwn, Schedule, TopK, TopKPerLayer

# In the order in which they act, and in which a spec lists them.
KINDS: tuple[type[Kind], ...] = (
    *(ModelOwn, TopK, Schedule, TopKPerLayer),
    *(Ratio, Median, Mass),
    *(Opportunistic, Budget, Reroute, Capacity),
    Renormalize,
)
