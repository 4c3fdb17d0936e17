"""The inspector: a REST service and a page over the traces and folders of runs. Needs neither Ray, torch nor vLLM.

``app.py`` puts it together, ``models.py`` defines the answers, ``guard.py`` checks who may send requests, and
``server.py`` binds the address.
"""
