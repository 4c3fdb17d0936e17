"""For learners of tests and benchmarks whose engines do not hold the learner's own model."""

from collections.abc import Sequence

from common.sequence import Ids, TopLogprobs
from trainer.probe_statistics import ProbeReport


class Unprobed:
    """A learner that does not look whether the engine says what it says itself."""

    async def read_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> None: ...

    async def check_probe(self, texts: Sequence[Ids], rows_of_engines: Sequence[Sequence[TopLogprobs]]) -> ProbeReport:
        return self.report()

    @staticmethod
    def report() -> ProbeReport:
        return ProbeReport(
            rms=0.0,
            p99=0.0,
            max_difference=0.0,
            text_index=0,
            position=1,
            token_id=0,
            engine_logprob=0.0,
            learner_logprob=0.0,
            num_compared=1,
        )
