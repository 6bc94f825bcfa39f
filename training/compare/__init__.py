"""One table of methods, bits and tasks on equal seeds: ``dcqfa compare``."""
