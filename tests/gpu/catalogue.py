"""Every part and check of ``make verify-gpu``, by name: what is run, in which order, and what it shows.

The modules of the parts bind functions to these names. Plain values only: the documentation is made from them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What runs in a process of its own."""

    letter: str
    name: str
    title: str
    checks: dict[str, str]  # name -> what it shows, in the order in which they run

    @property
    def module(self) -> str:
        return f"tests.gpu.{self.name}"


PARTS = (
    Part(
        letter="a",
        name="learner",
        title="Learner on CUDA",
        checks={
            "loss_float64": "every loss's value and gradients in float64 equal those of a plain loss on the processor",
            "step_float64": "two whole steps in float64 equal plain ones on the processor, one text at a time",
            "bfloat16": "a bfloat16 step's loss and gradient stay near the float32 step's",
            "packing": "sequences packed into one row, kept apart by a mask, have the gradient of padded ones",
            "packing_flash": "the same with flash attention, in bfloat16",
            "activation_checkpointing": "layers computed twice give the same gradient, and what that saves and costs",
            "loss_cost": "memory and time of the chunked loss beside a plain one",
            "loss_beside_liger": "cross-entropy beside Liger's fused one: value, memory, time",
            "throughput": "tokens/s of a training step and its share of the GPU's peak",
            "ranks_nccl": "two ranks on two GPUs have the gradient, the weights and the checkpoint of one",
        },
    ),
    Part(
        letter="b",
        name="engines",
        title="Engines without Ray",
        checks={
            "score_rows": "rows read in float32 equal Hugging Face's, whatever part of the text is cached",
            "self_test": "the engine passes the self-test that a run starts with",
            "resumed_requests": "paused, and ended and taken up again, requests write the same greedy tokens",
            "seeds": "a seed gives its tokens again, alone and in company; another one gives others",
            "score_rows_bfloat16": "rows read in bfloat16 beside Hugging Face's in bfloat16 and float32",
            "top_k_cost": "tokens/s written and read at k = 1, 16, 64, 256, 1024",
            "chunked_prefill": "a prompt read in pieces has the rows of one read whole",
            "prompt_logprob_memory": "memory of a full step of prompt log-probs beside the arithmetic of it",
        },
    ),
    Part(
        letter="c",
        name="sync",
        title="Weight sync",
        checks={
            "host_memory": "weights through shared memory into an engine with CUDA graphs; probe before and after",
            "ipc": "the same through CUDA's inter-process memory, on one GPU",
            "nccl": "the same through NCCL, between two GPUs",
        },
    ),
    Part(
        letter="d",
        name="train",
        title="Whole runs",
        checks={
            "demo_one_gpu": "the demo on one GPU for all",
            "demo_shared_student": "the demo with the teacher on a GPU of its own",
            "demo_spread": "the demo with a GPU for each",
            "shaped_one_gpu": "a pair shaped like Qwen2-0.5B on one GPU for all; tokens/s beside offline vLLM",
            "shaped_shared_student": "that pair with the teacher on a GPU of its own",
            "shaped_spread": "that pair with a GPU for each",
        },
    ),
)

CATALOGUE = [(part.name, check) for part in PARTS for check in part.checks]


def part_named(name: str) -> Part:
    """By letter or name. KeyError where there is none."""
    return {key: part for part in PARTS for key in (part.letter, part.name)}[name]
