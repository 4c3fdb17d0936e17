"""A run on Ray: placement, reservation, actors, and jobs on a cluster."""
