import random
from collections import Counter

import pytest

from tests.chaos.faults import DISK, DRIVER, EVERY_FAULT, SUPERVISED, parse_fault, plan, share_out


def test_twenty_faults_are_each_kind_of_fault_on_each_kind_of_process() -> None:
    faults = plan(20, random.Random(1))
    assert sum(fault.counts for fault in faults) == 20
    assert set(faults) == set(EVERY_FAULT)
    assert {(fault.act, fault.target) for fault in faults} >= {
        *((act, target) for act in ("kill", "stop") for target in SUPERVISED),
        ("kill", DRIVER),
        ("damage", DRIVER),
        ("fill", DISK),
    }


@pytest.mark.parametrize("num_faults", [1, 4, 19, 60])
def test_as_many_are_drawn_as_were_asked_for_and_none_much_more_often_than_others(num_faults: int) -> None:
    times = Counter(fault for fault in plan(num_faults, random.Random(2)) if fault.counts)
    assert times.total() == num_faults
    assert max(times.values()) - min(times[fault] for fault in EVERY_FAULT if fault.counts) <= 1


def test_a_seed_gives_the_same_faults_in_the_same_order() -> None:
    assert plan(20, random.Random(3)) == plan(20, random.Random(3)) != plan(20, random.Random(4))


def test_every_fault_goes_to_one_run() -> None:
    faults = plan(20, random.Random(5))
    shares = share_out(faults, 5)
    assert Counter(fault for share in shares for fault in share) == Counter(faults)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_fault_can_be_named_and_a_wrong_name_is_answered_with_all_there_are() -> None:
    assert [parse_fault(str(fault)) for fault in EVERY_FAULT] == list(EVERY_FAULT)
    with pytest.raises(ValueError, match=r"no fault 'kill:everyone'; there are: .*stop:teacher worker"):
        parse_fault("kill:everyone")
