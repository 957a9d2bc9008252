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
        ("mesh['data'=2,'expert'=1,'tensor'=8] {'tensor':(1)2}", 2),
        ("mesh['data'=2,'expert'=1,'tensor'=8] {'data','tensor':(2)4}", 8),
    ],
)
def test_the_devices_of_a_group(groups, devices):
    (found,) = collectives(LINE.replace("GROUPS", groups))
    assert found == Collective("all-reduce", devices, 4 * 2 * 64)
    assert found.sent_bytes == 2 * (devices - 1) / devices * 512


def test_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="expected replica_groups in a form that is known"):
        collectives(LINE.replace("GROUPS", "all"))


PROGRAM = """
%body (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
}
%above (x: s32[]) -> pred[] {
  %x = s32[] parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%x, %limit), direction=LT
}
%outer (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  ROOT %inner = f32[8]{0} while(%x), condition=%above, body=%body
}
%stop (x: f32[8]) -> pred[] {
  %count = s32[] get-tuple-element(%x), index=0
  ROOT %less = pred[] compare(%x, %count), direction=LT
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %all = f32[16]{0} all-gather(%x), replica_groups=[1,2]<=[2], dimensions={0}
  %known = f32[8]{0} while(%x), condition=%stop, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %last = f32[8]{0} while(%known), condition=%stop, body=%body
}
"""


def test_loops_are_counted_where_the_program_says_how_often_they_run():
    """Five passes within three, and one of a loop that ends by data."""
    found = {one.name: one for one in collectives(PROGRAM)}
    assert found["all-reduce"].times == 3 * 5 + 1
    assert found["all-gather"] == Collective("all-gather", 2, 64, 1)


@pytest.mark.parametrize(
    ("line", "array_bytes"),
    [
        ("(bf16[4,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8]", 512),
        ("(bf16[32,8]{1,0}, bf16[4,8]{1,0}) reduce-scatter-start(%x), replica_groups=[1,8]<=[8]", 512),
        ("bf16[4,8]{1,0} reduce-scatter(%x), replica_groups=[1,8]<=[8]", 512),
        ("f8e4m3fn[4,8]{1,0} reduce-scatter(%x), replica_groups=[1,8]<=[8]", 256),
        ("f32[4,8]{1,0} all-reduce-start(%x), replica_groups=[1,8]<=[8]", 128),
    ],
)
def test_the_larger_of_operand_and_result(line, array_bytes):
    (found,) = collectives(f"  %one = {line}")
    assert found.array_bytes == array_bytes and found.devices == 8
