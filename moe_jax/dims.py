"""The dimension letters that array names carry.

`x_BTD` is batch by time by model width. A letter means the same thing in every file. Inside
`shard_map`, a name carries `_local_` before its letters.
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
    "I": "gate and up: 2 in stored weights, 2 * F once flattened",
    "C": "capacity: slots that one expert accepts",
    "H": "query heads",
    "G": "key and value heads",
    "Q": "query heads that share one key and value head, H / G",
    "M": "memory: positions in a cache",
    "A": "width of one attention head; where values have another width, that of queries and keys",
    "X": "width of one value head",
    "U": "width of the query latent",
    "Z": "width of the key-value latent",
    "W": "key-value latent and shared rotary key, concatenated",
    "O": "one head's key without its rotary part, and its value, concatenated",
    "R": "expert groups of a group-limited router",
    "Y": "labels that are scored",
    "J": "documents of a text",
    "P": "policies",
}
