"""`python -m pipeline.lab`: break one safeguard of distributed training on purpose, see the symptom, then the cure.

world <- frame <- {data, gradients, averaging, evaluation, waiting} <- runner <- report <- __main__
"""
