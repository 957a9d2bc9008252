"""The dimension letters that array names carry.

`x_BTD` is batch by time by model width. A letter means the same thing in every file; inside `shard_map` a
name carries `_local_` before its letters.
"""

LETTERS = {
    "B": "batch: requests, or packed sequences",
    "T": "time: positions of one sequence",
    "N": "tokens, B * T flattened",
    "D": "model width",
    "V": "vocabulary",
    "L": "layers of one stack",
    "E": "routed experts",
    "K": "slots per token: the static width k_max",
    "S": "slots, N * K flattened",
    "F": "hidden width of an expert, or of a dense feed-forward",
    "I": "gate beside up: 2 in stored weights, 2 * F once flattened",
    "C": "capacity: slots that one expert accepts",
    "H": "query heads",
    "G": "key and value heads",
    "Q": "query heads that share one key and value head, H / G",
    "M": "memory: positions that a cache holds",
    "A": "width of one attention head: of a query and a key where values have another",
    "X": "width of one value head",
    "U": "width of the latent that queries go through",
    "Z": "width of the latent that keys and values are made of",
    "W": "a key-value latent beside the rotary key that all heads share",
    "O": "the position-free part of one head's key beside its value",
    "R": "expert groups of a group-limited router",
    "Y": "labels that are scored",
    "J": "documents of a text",
    "P": "policies",
}
