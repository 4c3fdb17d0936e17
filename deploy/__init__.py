"""Configures, starts and monitors whole runs. The only package that knows all the others."""
