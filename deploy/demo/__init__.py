"""A small task and two small models for trying every method of the project on one core."""
