"""From data to a revision: find what to edit in a model, fit the edit, and judge it before anyone releases it."""
