"""The engine requests of a sequence. The same sequence at the same position gives the same request. Pure functions."""

from dataclasses import dataclass, replace
from typing import Literal

from common.config import Sampling
from common.seeds import derive_seed
from rollout_server.engines.protocol import WriteRequest, Written
from rollout_server.sequence_builder import SequenceBuilder


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Builds requests with the run's sampling settings."""

    sampling: Sampling
    stop_token_ids: tuple[int, ...]  # every token that ends the generation of either engine

    def after(
        self,
        builder: SequenceBuilder,
        role: Literal["student", "teacher"],
        *,
        max_tokens: int,
        pause_after: int | None = None,
    ) -> WriteRequest:
        """A request that continues the builder's text. Its seed depends only on prompt, role and position."""
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
        """A single teacher token, with the finish reason of a request with max_tokens=1."""
        return replace(token, finish_reason="stop" if int(token.token_ids[0]) in self.stop_token_ids else "length")
