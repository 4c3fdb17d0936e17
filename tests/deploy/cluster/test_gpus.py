"""What nvidia-smi says of a machine's GPUs."""

from deploy.cluster.gpus import Gpu, gpus_of_this_machine, parse_gpus


def test_names_and_sizes_are_read() -> None:
    answer = "NVIDIA H100 80GB HBM3, 81559\nNVIDIA A10, with a comma, 23028\n"
    assert parse_gpus(answer) == [
        Gpu(name="NVIDIA H100 80GB HBM3", gib=81559 / 1024),
        Gpu(name="NVIDIA A10, with a comma", gib=23028 / 1024),
    ]


def test_what_names_no_size_is_left_out() -> None:
    assert parse_gpus("NVIDIA GB10, [N/A]\n\nNo devices were found\n") == []


def test_a_machine_without_nvidia_smi_has_none(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus_of_this_machine() == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpus_of_this_machine() == []
    program.write_text("#!/bin/sh\necho 'NVIDIA L4, 23034'\n")
    assert gpus_of_this_machine() == [Gpu(name="NVIDIA L4", gib=23034 / 1024)]
