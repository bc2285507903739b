"""Faults planted in the training rooms, one at a time: which of them does no test notice?

`python -m tests.mutants` from the root of the repository applies each entry of the tables to a
temporary copy, runs the tests that it names, and says which faults were found. Entries are single
plausible mistakes: a wrong sign, a missing sum over ranks, a state that is not saved. The table is
data; `apply` knows how an entry changes a file; `__main__` runs them and writes down the outcome.

Not here: faults made by rule (swap every `<`). They are many, and most say little about tests.
"""
