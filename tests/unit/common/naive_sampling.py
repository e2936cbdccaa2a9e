"""R21 and R22 once more, in the simplest code that computes them: one row, plain numbers, no shortcut.

`services/common/sampling.py` is held to this. It shares no code with it, so that a mistake there cannot repeat itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from services.common.sampling import Row
from services.common.types import SamplingProgram

WORD = (1 << 32) - 1


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 as the paper writes it."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high_1, low_1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high_1 ^ c[1] ^ k[0], low_1, high_0 ^ c[3] ^ k[1], low_0]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def gumbel(seed: int, token_id: int, position: int, choice: int, purpose: int) -> float:
    word = philox((token_id, position, choice, purpose), (seed & WORD, seed >> 32))[0]
    return -math.log(-math.log((word + 0.5) * 2.0**-32))


def edited(logits: Sequence[float], row: Row) -> list[float]:
    """The float32 logits after bias, bans and penalties."""
    program, result = row.program, list(logits)
    output = list(row.token_ids[row.output_start :])
    for token_id, bias in program.logit_bias.items():
        result[token_id] = float(np.float32(result[token_id] + bias))
    if program.allowed_token_ids is not None:
        result = [z if i in program.allowed_token_ids else -math.inf for i, z in enumerate(result)]
    for word in program.bad_words:
        if len(word) == 1 or list(row.token_ids)[-(len(word) - 1) :] == list(word[:-1]):
            result[word[-1]] = -math.inf
    for token_id in row.stop_token_ids:
        if len(output) < row.min_tokens:
            result[token_id] = -math.inf
    for token_id in set(row.token_ids):
        z, penalty = result[token_id], program.repetition_penalty
        result[token_id] = float(np.float32(z * penalty if z < 0 else z / penalty))
    for token_id in set(output):
        amount = program.presence_penalty + program.frequency_penalty * output.count(token_id)
        result[token_id] = float(np.float32(result[token_id] - amount))
    return result


def survivors(logits: Sequence[float], program: SamplingProgram) -> list[int]:
    """Ids that the filters leave of edited logits, in order."""
    peak = max(logits)
    if peak == -math.inf:
        return []
    weight = [math.exp((z - peak) / program.temperature) for z in logits]
    total = math.fsum(weight)
    result: list[int] = []
    before = 0.0
    for token_id in sorted(range(len(logits)), key=lambda i: (-logits[i], i)):
        if (
            logits[token_id] == -math.inf
            or (program.top_k and len(result) >= program.top_k)
            or (program.top_p < 1 and not before < program.top_p * total)
            or weight[token_id] < program.min_p
        ):
            break
        result.append(token_id)
        before += weight[token_id]
    return result


def draw(logits: Sequence[float], row: Row) -> int:
    """The next token; -1 where there is none."""
    if not all(math.isfinite(z) for z in logits):
        return -1
    program, z = row.program, edited(logits, row)
    peak = max(z)
    if peak == -math.inf:
        return -1
    if program.temperature == 0:
        return z.index(peak)

    def score(token_id: int) -> float:
        return (z[token_id] - peak) / program.temperature

    def noise(token_id: int, purpose: int) -> float:
        return gumbel(program.seed, token_id, len(row.token_ids), row.choice, purpose)

    candidates = survivors(z, program)
    if not (program.top_k or program.top_p < 1 or program.min_p or program.allowed_token_ids is not None):
        blocks = [range(start, min(start + 512, len(z))) for start in range(0, len(z), 512)]
        masses = [math.fsum(math.exp(score(i)) for i in block) for block in blocks]
        chances = [math.log(mass) + noise(b, 1) if mass else -math.inf for b, mass in enumerate(masses)]
        candidates = list(blocks[chances.index(max(chances))])
    return max(candidates, key=lambda i: score(i) + noise(i, 0))
