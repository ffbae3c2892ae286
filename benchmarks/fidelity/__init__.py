"""Published attacks at their published settings, beside what their papers and codes state.

`python -m benchmarks fidelity` computes the record of `results/fidelity`. `rows` declares what is
compared with what, `declare` says what a row consists of, `samples` where its images and sentences
come from, `experiments` and `networks` what is run, `beside` a second implementation of it,
`record` and `verdict` what is kept and said of it, `page` how it is shown.
"""
