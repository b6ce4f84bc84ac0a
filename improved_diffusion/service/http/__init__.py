"""The HTTP service: FastAPI over the engine. Needs the extra `serve`."""
