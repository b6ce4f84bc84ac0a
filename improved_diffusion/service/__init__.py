"""The engine that the web page and the HTTP service share: models by name, fair turns, batches of several requests."""
