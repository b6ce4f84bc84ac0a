"""The web page: a tab for each job, on the engine that the HTTP service uses too."""
