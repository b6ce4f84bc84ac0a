"""What the web page and the HTTP service share."""
