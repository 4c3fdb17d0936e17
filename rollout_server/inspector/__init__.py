"""The inspector: a REST service and a page over the traces and folders of runs. Needs neither Ray, torch nor vLLM.

``app.py`` puts it together, ``models.py`` says what it answers, ``guard.py`` who may ask, ``server.py`` where it
listens.
"""
