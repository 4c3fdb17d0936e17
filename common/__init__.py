"""Types and helpers that learner and rollout server share. Imports no other package of ours.

Words, one meaning each:

prompt            token ids a sequence starts from, with the sample's seed and the dataset answer, if there is one
student, teacher  the small model that is trained, and the large model that it learns from
proposal          student tokens that have not been scored yet
scores            the teacher's top-k log-probs at the proposal's positions, and at the one after
divergence        nats, per position: how far the student's next-token distribution is from the teacher's
threshold         nats, per position: a divergence above it makes the teacher take over
decision          per token: keep the student's, or take the teacher's
switch            a position where the teacher takes over; the token at that position is the teacher's
exploration       the phase in which the student generates
guidance          the phase in which the teacher generates
mixed sequence    prompt, tokens, and for each token its source, divergence and log-probs
trace             the stored decisions of a run, in Parquet segments
weight version    number of the student's weights when it proposed; counts up from 0
weight sync       send + load + probe
actor             a Ray actor, never a policy network
policy            a switch policy, never a network
learner           the training side of the student
position          index of a new token, 0 for the first one after the prompt
"""
