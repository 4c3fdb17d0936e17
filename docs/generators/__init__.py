"""What users can set, call and read, as Markdown, from the code itself: the generated half of the documentation.

``docs/conf.py`` puts these pages into the built documentation. Nothing that runs imports this package.
"""
