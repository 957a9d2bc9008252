"""The routed experts' feed-forward defined by a plain loop over the experts, in numpy, with float64 sums."""

import numpy as np

from moe_jax.kernels.grouped_matmul.reference import as_array


def _groups(group_sizes_E):
    ends = np.cumsum(np.asarray(group_sizes_E))
    return enumerate(slice(end - size, end) for end, size in zip(ends, np.asarray(group_sizes_E)))


def forward(rows_SD, gate_up_LEIFD, down_LEDF, group_sizes_E, layer):
    """Runs each group of rows through its expert: down(silu(gate(row)) * up(row)).

    Args:
        rows_SD: rows sorted by expert; those after the last group belong to no expert.
        gate_up_LEIFD: the two input matrices of each layer and expert, the gate first; may be in eight bits.
        down_LEDF: the output matrix of each; may be in eight bits.
        group_sizes_E: rows of each expert, in order.
        layer: which layer of the stacks.

    Returns:
        out_SD in float64; zero for rows of no expert.
    """
    rows_SD, gate_up_EIFD, down_EDF = (
        np.asarray(x, np.float64) for x in (rows_SD, as_array(gate_up_LEIFD)[layer], as_array(down_LEDF)[layer])
    )
    out_SD = np.zeros_like(rows_SD)
    for expert, own in _groups(group_sizes_E):
        gate, up = (rows_SD[own] @ matrix_FD.T for matrix_FD in gate_up_EIFD[expert])
        out_SD[own] = (gate / (1 + np.exp(-gate)) * up) @ down_EDF[expert].T
    return out_SD


def backward(rows_SD, gate_up_LEIFD, down_LEDF, group_sizes_E, layer, out_grad_SD):
    """The gradients of `forward` for rows, gate_up and down, in float64, given the gradient of its output."""
    rows_SD, gate_up_LEIFD, down_LEDF, out_grad_SD = (
        np.asarray(x, np.float64) for x in (rows_SD, gate_up_LEIFD, down_LEDF, out_grad_SD)
    )
    rows_grad_SD, gate_up_grad, down_grad = map(np.zeros_like, (rows_SD, gate_up_LEIFD, down_LEDF))
    for expert, own in _groups(group_sizes_E):
        gate_FD, up_FD = gate_up_LEIFD[layer, expert]
        gate, up = rows_SD[own] @ gate_FD.T, rows_SD[own] @ up_FD.T
        sigmoid = 1 / (1 + np.exp(-gate))
        hidden_grad = out_grad_SD[own] @ down_LEDF[layer, expert]
        up_grad = hidden_grad * gate * sigmoid
        gate_grad = hidden_grad * up * sigmoid * (1 + gate * (1 - sigmoid))
        rows_grad_SD[own] = gate_grad @ gate_FD + up_grad @ up_FD
        gate_up_grad[layer, expert] = gate_grad.T @ rows_SD[own], up_grad.T @ rows_SD[own]
        down_grad[layer, expert] = out_grad_SD[own].T @ (gate * sigmoid * up)
    return rows_grad_SD, gate_up_grad, down_grad
