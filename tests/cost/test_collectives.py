"""What devices send each other, read from lines as XLA writes them."""

import pytest

from moe_jax.cost.collectives import Collective, collectives

LINE = "  %sum.1 = f32[2,64]{1,0} all-reduce(%x), channel_id=1, replica_groups=GROUPS, use_global_device_ids=true"


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[2,4]<=[8]", 4),
        ("mesh['data'=2,'expert'=4] {'expert'}", 4),
        ("mesh['data'=2,'expert'=4] {'data','expert'}", 8),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
    ],
)
def test_the_devices_of_a_group(groups, devices):
    (found,) = collectives(LINE.replace("GROUPS", groups))
    assert found == Collective("all-reduce", devices, 4 * 2 * 64)
    assert found.sent_bytes == 2 * (devices - 1) / devices * 512


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="expected replica_groups in a form that is known"):
        collectives(LINE.replace("GROUPS", "all"))
