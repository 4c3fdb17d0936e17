"""In which order a run's processes are started, and what becomes of a start that fails."""

import asyncio

from deploy.supervision.workers import Process, in_turn


def process(name: str, bundle: int | None) -> Process:
    return Process(name=name, handle=None, bundle=bundle)


async def test_those_of_one_bundle_start_one_after_the_other_and_others_beside_them() -> None:
    under_way: set[str] = set()
    together: set[frozenset[str]] = set()

    async def start(each: Process) -> str:
        under_way.add(each.name)
        await asyncio.sleep(0.02)
        together.add(frozenset(under_way))
        under_way.remove(each.name)
        return each.name.upper()

    processes = [process("teacher", 0), process("student", 0), process("other", 1), process("controller", None)]
    answers = await asyncio.gather(*in_turn(processes, start))
    assert {name: text for answer in answers for name, text in answer.items()} == {
        each.name: each.name.upper() for each in processes
    }
    assert not any({"teacher", "student"} <= names for names in together)
    assert any({"teacher", "other", "controller"} & names == {"teacher", "other", "controller"} for names in together)


async def test_a_start_that_fails_keeps_the_rest_of_its_bundle_from_starting_and_no_others() -> None:
    started: list[str] = []

    async def start(each: Process) -> None:
        await asyncio.sleep(0)
        if each.name == "teacher":
            raise RuntimeError("no memory")
        await asyncio.sleep(0.02)
        started.append(each.name)

    calls = in_turn([process("teacher", 0), process("student", 0), process("other", 1)], start)
    shared, alone = await asyncio.gather(*calls, return_exceptions=True)
    assert isinstance(shared, RuntimeError)
    assert alone == {"other": None}
    assert started == ["other"]
