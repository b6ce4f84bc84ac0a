<<<<<<< HEAD
"""What the web page and the HTTP service share."""
=======
"""One engine behind two doors: the web page and the HTTP service."""
>>>>>>> s4-web
