"""Columns and filter that all queries about sequences share. Values are always bound as parameters."""

from dataclasses import fields

from rollout_server.traces.records import SequenceRecord

COLUMNS = ", ".join(field.name for field in fields(SequenceRecord))
Row = tuple[object, ...]

# Parameters: the fields of SequenceFilter.
MATCHES = """WHERE (CAST($first_step AS BIGINT) IS NULL OR step >= $first_step)
    AND (CAST($last_step AS BIGINT) IS NULL OR step <= $last_step)
    AND (CAST($switched AS BOOLEAN) IS NULL OR (num_switches > 0) = $switched)
    AND (CAST($first_switch_min AS BIGINT) IS NULL OR first_switch >= $first_switch_min)
    AND (CAST($first_switch_max AS BIGINT) IS NULL OR first_switch <= $first_switch_max)
    AND (CAST($policy AS VARCHAR) IS NULL OR policy = $policy)
    AND (CAST($finish_reason AS VARCHAR) IS NULL OR finish_reason = $finish_reason)
    AND (CAST($text AS VARCHAR) IS NULL
         OR contains(lower(prompt_text), lower($text)) OR contains(lower(completion_text), lower($text)))"""


def sequence_record(row: Row) -> SequenceRecord:
    """Convert a row of COLUMNS."""
    return SequenceRecord(**dict(zip(SequenceRecord.__slots__, row, strict=True)))  # type: ignore[arg-type]
