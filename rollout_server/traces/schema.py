"""The columns of a segment, and the name of its folder. Independent of writing and reading.

A column's meaning and unit are stored with it (Arrow field metadata ``description``). Missing values are null: the NaN
and -1 of the records in memory are never written.
"""

import re

import pyarrow as pa

SCHEMA_VERSION = 1
VERSION_KEY = b"adaswitch.schema_version"
SEQUENCES_FILE = "sequences.parquet"
TOKENS_FILE = "tokens.parquet"

_SEGMENT_NAME = re.compile(r"step-(\d{6,})(?:\.([1-9]\d*))?")


def segment_name(step: int, attempt: int) -> str:
    """``step-000012``; if the step is collected again, its replacement is ``step-000012.1``, and so on."""
    return f"step-{step:06d}.{attempt}" if attempt else f"step-{step:06d}"


def parse_segment_name(name: str) -> tuple[int, int] | None:
    """(step, attempt), or None for anything that is not a finished segment."""
    match = _SEGMENT_NAME.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _schema(*columns: tuple[str, pa.DataType, bool, str]) -> pa.Schema:
    """From (name, type, may be null, description) of each column."""
    return pa.schema(
        [
            pa.field(name, data_type, nullable=nullable, metadata={"description": description})
            for name, data_type, nullable, description in columns
        ],
        metadata={VERSION_KEY: str(SCHEMA_VERSION)},
    )


_NAME = pa.dictionary(pa.int32(), pa.string())

SEQUENCES = _schema(
    ("sequence_id", pa.string(), False, "prompt id, epoch and sample index, joined by dots; unique in a run"),
    ("prompt_id", pa.string(), False, "id of the prompt in the data"),
    ("epoch", pa.int32(), False, "pass over the data, from 0"),
    ("sample_index", pa.int32(), False, "which sample of this prompt in this epoch, from 0"),
    ("step", pa.int32(), False, "training step it was collected for"),
    ("policy", _NAME, False, "switch policy"),
    ("prompt_text", pa.string(), False, "the prompt, decoded"),
    ("completion_text", pa.string(), False, "all new tokens, decoded together"),
    ("answer", pa.string(), True, "expected answer, if the data has one"),
    ("finish_reason", _NAME, False, "stop: a stop token was generated; length: max_new_tokens was reached"),
    ("num_tokens", pa.int32(), False, "new tokens"),
    ("num_student_tokens", pa.int32(), False, "new tokens that the student generated"),
    ("num_teacher_tokens", pa.int32(), False, "new tokens that the teacher generated"),
    ("num_switches", pa.int32(), False, "number of switches to the teacher"),
    ("first_switch", pa.int32(), True, "position of the first switch"),
    ("switches", pa.list_(pa.int32()), False, "positions of all switches, ascending"),
    ("num_wasted_tokens", pa.int32(), False, "student tokens generated after a switch and discarded"),
    ("mean_divergence", pa.float32(), True, "nats; mean over the positions where the student proposed"),
    ("weight_version_min", pa.int32(), True, "oldest student weights that proposed; null without proposals"),
    ("weight_version_max", pa.int32(), True, "newest student weights that proposed; null without proposals"),
    ("seed", pa.int64(), False, "seed of this sample"),
)

TOKENS = _schema(
    ("sequence_id", _NAME, False, "sequence of the token"),
    ("step", pa.int32(), False, "training step it was collected for"),
    ("position", pa.int32(), False, "index among the new tokens, from 0"),
    ("token_id", pa.int32(), False, "id in the vocabulary"),
    ("text", _NAME, False, "text of this token alone; with a byte-level vocabulary it may be part of a character"),
    ("source", _NAME, False, "student or teacher, whichever generated it; dataset for a token of a dataset answer"),
    ("is_switch", pa.bool_(), False, "the teacher takes over here"),
    ("divergence", pa.float32(), True, "nats; null where the student made no proposal"),
    ("threshold", pa.float32(), True, "nats; null if the policy has none"),
    ("student_rank", pa.int32(), True, "rank of the student's proposal in the teacher's list, 0 is best, k if outside"),
    ("student_logprob", pa.float32(), True, "nats, of this token; null if the student did not generate it"),
    ("teacher_logprob", pa.float32(), True, "nats, of this token; null if outside the teacher's list"),
    ("student_covered_mass", pa.float32(), True, "total probability of the student's whole list"),
    ("teacher_covered_mass", pa.float32(), True, "total probability of the teacher's whole list"),
    ("student_top_ids", pa.list_(pa.int32()), True, "the student's most probable tokens, best first"),
    ("student_top_logprobs", pa.list_(pa.float32()), True, "nats, of student_top_ids"),
    ("teacher_top_ids", pa.list_(pa.int32()), True, "the teacher's most probable tokens, best first"),
    ("teacher_top_logprobs", pa.list_(pa.float32()), True, "nats, of teacher_top_ids"),
    ("weight_version", pa.int32(), True, "student weights that proposed at this position"),
)
