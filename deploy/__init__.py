"""Starting, configuring and watching whole runs; the only package that knows all the others."""
