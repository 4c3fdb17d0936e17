"""A small task and two small models on which every method of the project can be tried on one core."""
