"""Live generation: one sequence under any policy, streamed to a user by a run's own engines during training."""
