"""The engine that draws for the web page and for the HTTP service."""
