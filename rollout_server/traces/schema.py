"""The columns of a segment, and how its folder is named. Knows neither how it is written nor how it is read.

A column's meaning and unit are stored with it (Arrow field metadata ``description``). null stands for what does not
exist: NaN and the -1 of the records in memory never reach a file.
"""

import re

import pyarrow as pa

SCHEMA_VERSION = 1
VERSION_KEY = b"adaswitch.schema_version"
SEQUENCES_FILE = "sequences.parquet"
TOKENS_FILE = "tokens.parquet"

_SEGMENT_NAME = re.compile(r"step-(\d{6,})(?:\.([1-9]\d*))?")


def segment_name(step: int, attempt: int) -> str:
    """``step-000012``; ``step-000012.1`` for what replaced it when the step was collected again, and so on."""
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
    ("policy", _NAME, False, "switch policy that decided"),
    ("prompt_text", pa.string(), False, "the prompt, decoded"),
    ("completion_text", pa.string(), False, "all new tokens, decoded together"),
    ("answer", pa.string(), True, "expected answer, where the data has one"),
    ("finish_reason", _NAME, False, "stop: a stop token was written; length: max_new_tokens was reached"),
    ("num_tokens", pa.int32(), False, "new tokens"),
    ("num_student_tokens", pa.int32(), False, "new tokens the student wrote"),
    ("num_teacher_tokens", pa.int32(), False, "new tokens the teacher wrote"),
    ("num_switches", pa.int32(), False, "how often the teacher took over"),
    ("first_switch", pa.int32(), True, "position of the first switch"),
    ("switches", pa.list_(pa.int32()), False, "positions of all switches, ascending"),
    ("num_wasted_tokens", pa.int32(), False, "student tokens written past a switch and dropped"),
    ("mean_divergence", pa.float32(), True, "nats; mean over the positions the student proposed"),
    ("weight_version_min", pa.int32(), True, "oldest student weights that proposed; null if the student never did"),
    ("weight_version_max", pa.int32(), True, "newest student weights that proposed; null if the student never did"),
    ("seed", pa.int64(), False, "seed of this sample"),
)

TOKENS = _schema(
    ("sequence_id", _NAME, False, "sequence it belongs to"),
    ("step", pa.int32(), False, "training step it was collected for"),
    ("position", pa.int32(), False, "place among the new tokens, from 0"),
    ("token_id", pa.int32(), False, "id in the vocabulary"),
    ("text", _NAME, False, "the token alone; a piece of a byte-level vocabulary may be part of a character"),
    ("source", _NAME, False, "who wrote it: student or teacher; dataset for a token of a given answer"),
    ("is_switch", pa.bool_(), False, "the teacher takes over here"),
    ("divergence", pa.float32(), True, "nats; null where the student did not propose"),
    ("threshold", pa.float32(), True, "nats; null where the policy has none"),
    ("student_rank", pa.int32(), True, "place of the student's proposal in the teacher's list, 0 the best, k outside"),
    ("student_logprob", pa.float32(), True, "nats, of this token; null if the student did not write it"),
    ("teacher_logprob", pa.float32(), True, "nats, of this token; null if outside the teacher's list"),
    ("student_covered_mass", pa.float32(), True, "probability the student's whole list holds"),
    ("teacher_covered_mass", pa.float32(), True, "probability the teacher's whole list holds"),
    ("student_top_ids", pa.list_(pa.int32()), True, "the student's most probable tokens, best first"),
    ("student_top_logprobs", pa.list_(pa.float32()), True, "nats, of student_top_ids"),
    ("teacher_top_ids", pa.list_(pa.int32()), True, "the teacher's most probable tokens, best first"),
    ("teacher_top_logprobs", pa.list_(pa.float32()), True, "nats, of teacher_top_ids"),
    ("weight_version", pa.int32(), True, "student weights that proposed here"),
)
