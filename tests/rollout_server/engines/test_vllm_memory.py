import pytest

from rollout_server.engines.vllm_memory import GIB, Scoring, batched_tokens


def scoring(vocabulary: int = 152_000, *, k: int = 64, dtype_bytes: int = 2, in_pieces: bool = True) -> Scoring:
    return Scoring(vocabulary=vocabulary, top_logprobs=k, dtype_bytes=dtype_bytes, in_pieces=in_pieces)


def tokens(of: Scoring, *, gpu_gib: float, share: float = 0.9, setting: int | None = None, num_seqs: int = 64) -> int:
    gpu_bytes = int(gpu_gib * GIB)
    engine_bytes = int(share * gpu_bytes)
    return batched_tokens(of, setting=setting, gpu_bytes=gpu_bytes, engine_bytes=engine_bytes, max_num_seqs=num_seqs)


@pytest.mark.parametrize(
    ("num_tokens", "of", "gib"),
    [
        (8192, scoring(in_pieces=False, k=0), 6.96 + 0.0002),  # the figure of vLLM's pull request 52054
        (2048, scoring(in_pieces=False, k=0), 1.74),
        (8192, scoring(k=0), 0.87),
        (16384, scoring(k=0), 0.87),
        (512, scoring(k=0), 0.435),
        (8192, scoring(32_000, k=0), 0.183),
        (8192, scoring(dtype_bytes=4, k=0), 1.74),
        (8192, scoring(32_000, k=1024), 0.183 + 2 * 8192 * 1025 * 12 / GIB),
    ],
)
def test_what_scoring_takes_beside_the_forward_pass(num_tokens: int, of: Scoring, gib: float) -> None:
    assert of.bytes_for(num_tokens) / GIB == pytest.approx(gib, rel=0.01)


@pytest.mark.parametrize(
    ("gpu_gib", "share", "of", "expected"),
    [
        (79.6, 0.9, scoring(), 16384),  # an H100
        (69.9, 0.9, scoring(), 8192),
        (44.4, 0.9, scoring(), 8192),  # an L40S
        (23.6, 0.9, scoring(), 8192),  # a 4090, an L4
        (14.7, 0.9, scoring(), 8192),  # a T4
        (14.7, 0.9, scoring(262_144), 2048),  # 1.5 GiB of 13.3
        (23.6, 0.3, scoring(), 2048),  # a small part of a GPU
        (23.6, 0.3, scoring(49_152), 8192),
        (79.6, 0.3, scoring(), 16384),
        (79.6, 0.9, scoring(in_pieces=False), 8192),
        (44.4, 0.9, scoring(in_pieces=False), 4096),
        (23.6, 0.9, scoring(in_pieces=False), 2048),
        (23.6, 0.9, scoring(k=152_000), 2048),
    ],
)
def test_steps_are_long_where_the_memory_allows_it(gpu_gib: float, share: float, of: Scoring, expected: int) -> None:
    assert tokens(of, gpu_gib=gpu_gib, share=share) == expected


def test_a_setting_is_taken_as_it_is() -> None:
    assert tokens(scoring(), gpu_gib=16, setting=123) == 123


def test_a_step_holds_a_token_of_each_sequence() -> None:
    assert tokens(scoring(), gpu_gib=23.6, share=0.3, num_seqs=4000) == 4000
