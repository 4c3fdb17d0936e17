"""An engine behind a Ray actor: the client runs next to the controller, the server next to the engine."""
