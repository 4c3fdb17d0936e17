"""NVIDIA's tools, as they print."""

from deploy.doctor.facts import Link, parse_links

TOPOLOGY = """\
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV12\tSYS\tPXB\t0-23,48-71\t0\t\tN/A
GPU1\tNV12\t X \tPHB\tPXB\t0-23,48-71\t0\t\tN/A
GPU2\tSYS\tPHB\t X \tSYS\t24-47,72-95\t1\t\tN/A
NIC0\tPXB\tPXB\tSYS\t X \t\t\t\t

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def test_links_are_read_once_a_pair_and_without_network_cards() -> None:
    assert parse_links(TOPOLOGY) == (
        Link(first=0, second=1, kind="NV12"),
        Link(first=0, second=2, kind="SYS"),
        Link(first=1, second=2, kind="PHB"),
    )


def test_one_gpu_has_no_links() -> None:
    assert parse_links("") == ()
    assert parse_links("\tGPU0\tCPU Affinity\tNUMA Affinity\nGPU0\t X \t0-15\t0\n") == ()
