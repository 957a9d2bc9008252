"""The systems that are compared: each a class in a process of its own, all with the same methods.

System(folder, threads, **options): loads the checkpoint.

logits(tokens_T): logits_V after the last token, to check that all run the same model.

prefill(tokens_T): seconds until the logits after the last token are there; None if it cannot be done.

decode(tokens_BT, prompt, steps): seconds of each step, which reads the next token of every row. The first call of a
number of rows reads the prompts, later ones go on where it stood.

For `benchmarks/long_prompts.py`, which llama.cpp has no part in:

whole(tokens_T): seconds until the logits after every position are on the host, and those of some positions.

peak_memory_bytes(): the most memory that the process has held.
"""
