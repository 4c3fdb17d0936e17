"""What nvidia-smi says of a machine's GPUs."""

from deploy.cluster.gpus import Gpu, gpus_of_this_machine, parse_gpus, smallest_gib

H100 = Gpu(index=0, name="NVIDIA H100 80GB HBM3", gib=81559 / 1024, used_gib=4 / 1024, compute_capability=(9, 0))
A10 = Gpu(index=1, name="NVIDIA A10, with a comma", gib=23028 / 1024, compute_capability=(8, 6), is_mig=True)
GB10 = Gpu(index=2, name="NVIDIA GB10", gib=None, compute_capability=(12, 1))


def test_gpus_are_read() -> None:
    answer = "0, 81559, 4, 9.0, Disabled, NVIDIA H100 80GB HBM3\n1, 23028, 0, 8.6, Enabled, NVIDIA A10, with a comma\n"
    assert parse_gpus(answer) == [H100, A10]


def test_what_is_not_told_is_left_open() -> None:
    assert parse_gpus("2, [N/A], [N/A], 12.1, [N/A], NVIDIA GB10\n\nNo devices were found\n") == [GB10]
    assert parse_gpus("3, 11441, 0, [Not Supported], [N/A], Tesla K80\n")[0].compute_capability is None


def test_the_smallest_is_known_where_all_say_their_size() -> None:
    assert smallest_gib([H100, A10]) == A10.gib
    assert smallest_gib([H100, GB10]) is None
    assert smallest_gib([]) is None


def test_a_machine_without_nvidia_smi_has_none(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus_of_this_machine() == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpus_of_this_machine() == []
    program.write_text("#!/bin/sh\necho '0, 23034, 0, 8.9, [N/A], NVIDIA L4'\n")
    assert gpus_of_this_machine() == [Gpu(index=0, name="NVIDIA L4", gib=23034 / 1024, compute_capability=(8, 9))]
