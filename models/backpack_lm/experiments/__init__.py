"""The paper's experiments (Hewitt et al. 2023, sections 4 to 6), each on any model folder."""
