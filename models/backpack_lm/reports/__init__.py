"""Pages and tables that people read: of experiments, of a word, of a generation. Each is one file."""
