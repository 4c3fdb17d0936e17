"""An engine behind a Ray actor: the client beside the controller, the server beside the engine."""
