import pytest

from deploy.cluster.shortage import describe_shortage

BUNDLES = [{"CPU": 0.25, "GPU": 1}, {"CPU": 0.25, "GPU": 4}, {"CPU": 0.25}]


@pytest.mark.parametrize(
    ("strategy", "nodes", "free", "said"),
    [
        ("PACK", [{"CPU": 8}], {"CPU": 8}, "5 GPU needed, the cluster has 0; one actor needs 4 GPU on one node, the "),
        ("PACK", [{"CPU": 8, "GPU": 8}], {"CPU": 8, "GPU": 3}, "5 GPU needed, 3 of 8 free"),
        ("PACK", [{"CPU": 8, "GPU": 2}] * 4, {"CPU": 32, "GPU": 8}, "one actor needs 4 GPU on one node, the largest"),
        ("STRICT_PACK", [{"CPU": 8, "GPU": 4}] * 2, {"CPU": 16, "GPU": 8}, "STRICT_PACK needs 5 GPU on one node, the "),
        ("STRICT_SPREAD", [{"CPU": 8, "GPU": 8}] * 2, {"CPU": 16, "GPU": 16}, "STRICT_SPREAD needs a node for each of"),
        ("PACK", [{"CPU": 8, "GPU": 4}] * 2, {"CPU": 16, "GPU": 6}, "16 CPU, 6 GPU are free, but PACK can't place"),
        ("PACK", [], {}, "5 GPU needed, the cluster has 0"),
    ],
)
def test_what_is_missing_is_named(strategy, nodes, free, said) -> None:
    assert said in describe_shortage(BUNDLES, strategy=strategy, nodes=nodes, free=free)


def test_what_there_is_enough_of_is_not_named() -> None:
    text = describe_shortage(BUNDLES, strategy="PACK", nodes=[{"CPU": 8, "GPU": 8}], free={"CPU": 8, "GPU": 3})
    assert text == "5 GPU needed, 3 of 8 free"
