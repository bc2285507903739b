"""What is faster here, by how much, against what: run from the root of the repository.

Not part of the installed package.
"""
