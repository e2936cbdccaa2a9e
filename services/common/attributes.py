"""Names of attributes: OpenTelemetry's where it has one, ours where it has none.

Source: open-telemetry/semantic-conventions-genai at commit 004902b (development), and semantic-conventions 1.42 for
`rpc`, `error` and `service`. They are written down here because the names in OpenTelemetry's Python package are marked
as deprecated. Nothing here may carry text of a prompt or of an answer.
"""

from __future__ import annotations

from typing import Final

# --- generative AI ---------------------------------------------------------------------------------------------
OPERATION_NAME: Final = "gen_ai.operation.name"
PROVIDER_NAME: Final = "gen_ai.provider.name"
PROVIDER: Final = "fermata"
CONVERSATION_ID: Final = "gen_ai.conversation.id"
REQUEST_MODEL: Final = "gen_ai.request.model"
REQUEST_CHOICE_COUNT: Final = "gen_ai.request.choice.count"
REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
REQUEST_SEED: Final = "gen_ai.request.seed"
REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
REQUEST_TOP_K: Final = "gen_ai.request.top_k"
REQUEST_TOP_P: Final = "gen_ai.request.top_p"
REQUEST_FREQUENCY_PENALTY: Final = "gen_ai.request.frequency_penalty"
REQUEST_PRESENCE_PENALTY: Final = "gen_ai.request.presence_penalty"
REQUEST_STREAM: Final = "gen_ai.request.stream"
RESPONSE_ID: Final = "gen_ai.response.id"
RESPONSE_MODEL: Final = "gen_ai.response.model"
RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
RESPONSE_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
USAGE_CACHE_READ_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"

# --- calls and errors ------------------------------------------------------------------------------------------
RPC_SYSTEM: Final = "rpc.system.name"
RPC_METHOD: Final = "rpc.method"
RPC_STATUS: Final = "rpc.response.status_code"
ERROR_TYPE: Final = "error.type"

# --- ours ------------------------------------------------------------------------------------------------------
GENERATION_ID: Final = "fermata.generation.id"
CHOICE: Final = "fermata.choice"
EPOCH: Final = "fermata.epoch"
"""Of an ownership (R10)."""
SHARD: Final = "fermata.shard"
"""Process id of a shard, as its `Describe` tells it."""
CACHED_TOKENS: Final = "fermata.cached_tokens"
FIRST_OFFSET: Final = "fermata.token.first_offset"
"""Of the first token of a `decode` span."""
TOKEN_OFFSET: Final = "fermata.token.offset"
TOKEN_DEPARTED: Final = "fermata.token.departed_us"
"""Of a `decode` span, for each token: when it left the tokenizer, in microseconds since the begin of the span."""
TOKEN_STEP: Final = "fermata.token.step"
"""For each token, the number of the shard's step that drew it; 0 where it is not known."""
TOKEN_SHARD: Final = "fermata.token.shard"
"""For each token, the place of its shard in `SHARDS`; -1 where it is not known."""
SHARDS: Final = "fermata.shards"
"""Process ids of the shards that drew the tokens."""
STEP_NUMBER: Final = "fermata.step.number"
STEP_TOKENS: Final = "fermata.step.tokens"
"""Tokens computed in a step, of all sequences."""
STEP_GENERATIONS: Final = "fermata.step.generations"
"""Whose sequences were in a step."""
STEP_LENGTHS: Final = "fermata.step.lengths"
"""Tokens computed in a step of each of these: 1 is a step of decoding, more is a part of a prompt."""
STEP_DEVICE: Final = "fermata.step.device_us"
"""Of a step that a GPU computed: what the GPU took of its `forward`, in microseconds by its own clock."""


def part(name: str) -> str:
    """Of a `decode` span, for each token: a part of its latency in microseconds (R25); of a `token` span, one."""
    return f"fermata.token.{name}_us"
