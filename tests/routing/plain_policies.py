"""Every policy as a plain loop over tokens, from its formula, with Python lists and floats.

A row of a step is (score_E, mix_E, group); the kept slots are a list of [expert, weight], in order.
"""

import math


def ranked(score):
    """Experts that can be chosen, best first; the lower index wins a tie."""
    return [e for e in sorted(range(len(score)), key=lambda e: (-score[e], e)) if score[e] > -math.inf]


def topk(score, mix, k):
    return [[e, mix[e]] for e in ranked(score)[:k]]


def heaviest_first(slots):
    return sorted(slots, key=lambda slot: -slot[1])  # stable: ties keep the router's order


def ratio(slots, t, least):
    kept = []
    for number, slot in enumerate(heaviest_first(slots)):
        if number < least or slot[1] >= t * heaviest_first(slots)[0][1]:
            kept.append(slot)
    return [slot for slot in slots if slot in kept]


def mass(slots, p, least):
    total, before, kept = sum(weight for _, weight in slots), 0.0, []
    for number, slot in enumerate(heaviest_first(slots)):
        if number < least or before < p * total or p >= 1:
            kept.append(slot)
        before += slot[1]
    return [slot for slot in slots if slot in kept]


def weighted(slots, score, mix, own_k, normalize, scaling, rule):
    """[[expert, final weight]]; `rule` None is the model's own."""
    own = sum(weight for _, weight in topk(score, mix, own_k))
    kept = sum(weight for _, weight in slots)
    rule = rule or ("one" if normalize else "none")
    target = {"one": 1.0, "own": 1.0 if normalize else own}.get(rule)
    result = []
    for expert, weight in slots:
        full = weight / own if normalize else weight
        result.append([expert, (full if target is None else weight / kept * target) * scaling])
    return result


def fill_from(pool, score, mix, count):
    return [[e, mix[e]] for e in ranked(score) if e in pool][:count]


def opportunistic(rows, kept, k0):
    result = []
    for (score, mix, group), slots in zip(rows, kept):
        pool = {e for other, theirs in zip(rows, kept) if other[2] == group for e, _ in theirs[:k0]}
        result.append(fill_from(pool, score, mix, len(slots)) if k0 < len(slots) else slots)
    return result


def budget(rows, kept, m, floor):
    result = []
    for (score, mix, group), slots in zip(rows, kept):
        together = [(other, theirs) for other, theirs in zip(rows, kept) if other[2] == group]
        pool = {e for _, theirs in together for e, _ in theirs[:floor]}
        total = [sum(other[1][e] for other, _ in together if other[0][e] > -math.inf) for e in range(len(score))]
        for expert in sorted(range(len(score)), key=lambda e: (-total[e], e)):
            if len(pool) >= m:
                break
            pool.add(expert)
        result.append(fill_from(pool, score, mix, len(slots)) if m < len(score) else slots)
    return result


def reroute(rows, kept, k0, least, similarity):
    result = []
    for (score, _, group), slots in zip(rows, kept):
        primary = {e for other, theirs in zip(rows, kept) if other[2] == group for e, _ in theirs[:k0]}
        targets = [p for p in sorted(primary) if score[p] > -math.inf]
        merged = []
        for expert, weight in slots:
            if expert not in primary and targets:
                nearest = max(targets, key=lambda p: (similarity[expert][p], -p))
                if similarity[expert][nearest] >= least:
                    expert = nearest
            for slot in merged:
                if slot[0] == expert:
                    slot[1] += weight
                    break
            else:
                merged.append([expert, weight])
        result.append(merged)
    return result


def ask(weights, requests, served, room):
    """Experts take the requests with the largest weights while there is room; in a tie the earlier row."""
    for b, expert in sorted(requests, key=lambda request: (-weights[request[0]][request[1]], request[0])):
        if sum(expert in experts for experts in served.values()) < room:
            served[b].append(expert)


def capacity(rows, kept, gamma, overflow):
    num_experts = len(rows[0][0])
    result = [None] * len(rows)
    for group in {row[2] for row in rows}:
        members = [b for b, row in enumerate(rows) if row[2] == group]
        room = math.ceil(gamma * sum(len(kept[b]) for b in members) / num_experts)
        asked = {b: [e for e, _ in kept[b]] for b in members}
        served = {b: [] for b in members}
        weights = {b: dict(enumerate(rows[b][1])) | dict(kept[b]) for b in members}

        ask(weights, [(b, e) for b in members for e in asked[b]], served, room)
        full = {b: len(served[b]) == len(asked[b]) for b in members}
        if overflow == "next":
            for rank in range(2 * max(len(asked[b]) for b in members)):
                requests = []
                for b in members:
                    order = ranked(rows[b][0])[: 2 * len(asked[b])]
                    if len(served[b]) < len(asked[b]) and rank < len(order) and order[rank] not in asked[b]:
                        requests.append((b, order[rank]))
                ask(weights, requests, served, room)
        for b in members:
            if full[b]:
                result[b] = kept[b]
            elif overflow == "drop":
                result[b] = [slot for slot in kept[b] if slot[0] in served[b]]
            else:
                result[b] = [[e, weights[b][e]] for e in ranked(rows[b][0]) if e in served[b]]
    return result
