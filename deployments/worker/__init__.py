"""One replica of a model: claims jobs, renders them, publishes their outputs, keeps its lease."""
