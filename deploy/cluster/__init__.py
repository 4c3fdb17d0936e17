"""A run on Ray: plan, placement, reservation, actors, and jobs on a cluster."""
