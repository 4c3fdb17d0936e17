"""The inspector: a REST service and a web page for the traces and folders of runs. Needs neither Ray, torch nor vLLM.

``app.py`` assembles it, ``models.py`` defines the responses, ``guard.py`` checks who may send requests, and
``server.py`` binds the address.
"""
