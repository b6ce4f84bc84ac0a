"""One engine behind two doors: the web page and the HTTP service."""
