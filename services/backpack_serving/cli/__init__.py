"""The command line: `backpack`."""
