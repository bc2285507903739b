"""The programme for one GPU: `python -m benchmarks gpu`.

Parts (`parts.PARTS`) check or measure one thing each, in items that are small enough to be lost.
`programme` gives every part a process and a budget of time, and writes each item's result to
`gpu.json` as it comes (`book`); what is there is kept when it is started again. With `--tiny` the
same parts go through small shapes, on a CPU too.
"""
