import random
from collections import Counter

import pytest

from tests.chaos.faults import DISK, DRIVER, EVERY_FAULT, SUPERVISED, parse_fault, plan, share_out


def test_twenty_kills_come_with_each_kind_of_fault_on_each_kind_of_process() -> None:
    faults = plan(20, random.Random(1))
    assert sum(fault.act in ("kill", "damage") for fault in faults) == 20
    assert set(faults) == set(EVERY_FAULT)
    assert {(fault.act, fault.target) for fault in faults} >= {
        *((act, target) for act in ("kill", "stop") for target in SUPERVISED),
        ("kill", DRIVER),
        ("damage", DRIVER),
        ("fill", DISK),
    }


@pytest.mark.parametrize("num_kills", [1, 10, 19, 60])
def test_every_fault_is_drawn_and_no_kill_much_more_often_than_others(num_kills: int) -> None:
    times = Counter(plan(num_kills, random.Random(2)))
    of_kills = [times[fault] for fault in EVERY_FAULT if fault.is_kill]
    assert sum(of_kills) == max(num_kills, len(of_kills))
    assert max(of_kills) - min(of_kills) <= 1
    assert all(times[fault] == 1 for fault in EVERY_FAULT if not fault.is_kill)


def test_a_seed_gives_the_same_faults_in_the_same_order() -> None:
    assert plan(20, random.Random(3)) == plan(20, random.Random(3)) != plan(20, random.Random(4))


def test_every_fault_goes_to_one_run() -> None:
    faults = plan(20, random.Random(5))
    shares = share_out(faults, 5)
    assert Counter(fault for share in shares for fault in share) == Counter(faults)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_fault_can_be_named_and_a_wrong_name_is_answered_with_all_there_are() -> None:
    assert [parse_fault(str(fault)) for fault in EVERY_FAULT] == list(EVERY_FAULT)
    with pytest.raises(ValueError, match=r"no fault 'kill:everyone'; there are: .*stop:teacher core"):
        parse_fault("kill:everyone")
