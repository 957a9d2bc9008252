"""The same checkpoint in transformers: loading, logits, and the tokens for which no choice of an expert is close."""

import numpy as np

GAP = 1e-4  # a choice between scores closer than this may go either way


def load_model(transformers, path, **options):
    """Loads a model with transformers; no tensor may be missing, unexpected or mismatched."""
    import torch

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def gap_at(score_NE, kept):
    """The gap between the last kept score and the first that is not kept; None if all are kept."""
    ordered_NE = -np.sort(-score_NE, axis=1)
    return ordered_NE[:, kept - 1] - ordered_NE[:, kept] if kept < score_NE.shape[1] else None


def gaps(router_logits_NE, bias_E, moe, k):
    """The smallest gap in each token's choices of groups and of k experts."""
    logits_NE = router_logits_NE.astype(np.float64)
    if moe.score == "softmax":
        score_NE = np.exp(logits_NE - logits_NE.max(axis=1, keepdims=True))
        score_NE = score_NE / score_NE.sum(axis=1, keepdims=True)
    else:
        score_NE = 1 / (1 + np.exp(-logits_NE))
    score_NE = score_NE + bias_E
    found = []
    if moe.num_groups > 1:
        ordered_NRE = np.sort(score_NE.reshape(len(score_NE), moe.num_groups, -1), axis=2)
        group_score_NR = ordered_NRE[:, :, -1 if moe.group_score == "best" else -2 :].sum(axis=2)
        found.append(gap_at(group_score_NR, moe.num_groups_kept))
        worst_N1 = -np.sort(-group_score_NR, axis=1)[:, moe.num_groups_kept - 1 : moe.num_groups_kept]
        kept_NE = np.repeat(group_score_NR >= worst_N1, moe.num_experts // moe.num_groups, axis=1)
        score_NE = np.where(kept_NE, score_NE, -np.inf)
    found.append(gap_at(score_NE, k))
    return np.min([gap for gap in found if gap is not None], axis=0)


def observe(model, moe, k, shape):
    """Hooks the routers; returns an array that says for each token whether every choice was clear, and the hooks."""
    clear_BT = np.ones(shape, bool)

    def look(gate, inputs, output):
        bias_E = gate.e_score_correction_bias.detach().numpy() if hasattr(gate, "e_score_correction_bias") else 0.0
        found_N = gaps(output[0].detach().numpy(), bias_E, moe, k)
        np.logical_and(clear_BT, (found_N > GAP).reshape(shape), out=clear_BT)

    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    assert gates
    return clear_BT, [gate.register_forward_hook(look) for gate in gates]


def logits(model, tokens_BT, valid_BT, moe, k=None):
    """Returns the peer's logits, and the tokens for which no choice, here or earlier in the row, was close."""
    import torch

    clear_BT, hooks = observe(model, moe, k or moe.k, tokens_BT.shape)
    with torch.no_grad():
        mask = torch.tensor(valid_BT.astype(np.int64))
        logits_BTV = model(input_ids=torch.tensor(tokens_BT.astype(np.int64)), attention_mask=mask).logits
    for hook in hooks:
        hook.remove()
    return logits_BTV.numpy(), np.logical_and.accumulate(clear_BT, axis=1)


def clear_tokens(model, architecture, shape, k=None):
    """Picks tokens for which every choice is clear: a choice that goes the other way gives another gradient.

    Token 1 is left out: the peer takes it for OLMoE's padding, whose embedding it gives no gradient.
    """
    for seed in range(200):
        tokens_BT = np.random.default_rng(seed).integers(2, architecture.decoder.vocab_size, shape, dtype=np.int32)
        _, clear_BT = logits(model, tokens_BT, np.ones(shape, bool), architecture.moe, k)
        if clear_BT.all():
            return tokens_BT
    raise AssertionError("no tokens are clear")
