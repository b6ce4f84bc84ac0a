"""The web page: a tab for each job, on the engine that the HTTP service uses too."""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing is sent anywhere
