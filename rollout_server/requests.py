"""What a sequence asks of an engine at its present end: same sequence, same position, same request. Pure."""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import Sampling
from common.seeds import derive_seed
from rollout_server.engines.protocol import WriteRequest, Written
from rollout_server.sequence_builder import SequenceBuilder


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """The run's sampling settings as requests."""

    sampling: Sampling
    stop_token_ids: tuple[int, ...]  # every token that ends a text of either engine

    def after(
        self,
        builder: SequenceBuilder,
        role: Literal["student", "teacher"],
        *,
        max_tokens: int,
        pause_after: int | None = None,
    ) -> WriteRequest:
        """Continue the builder's text. The seed depends on the prompt, the role and the position alone."""
        return WriteRequest(
            prefix=builder.text,
            max_tokens=max_tokens,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=derive_seed(builder.prompt.seed, role, len(builder)),
            chunk_tokens=self.sampling.chunk_tokens,
            stop_token_ids=self.stop_token_ids,
            sequence_id=builder.prompt.sequence_id,
            pause_after=pause_after,
        )

    def as_one_token(self, token: Written) -> Written:
        """One token of the teacher's, with the finish reason of a request for no more than that token."""
        return replace(token, finish_reason="stop" if int(token.token_ids[0]) in self.stop_token_ids else "length")
