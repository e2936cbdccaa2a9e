"""Names of all metrics, in one place: what the services count, the dashboards show and the alerts watch.

Prometheus has them with underscores for dots, the unit behind (`_seconds`, `_ratio`), and `_total` behind a counter.
Names of OpenTelemetry's conventions for generative AI where they exist; see `attributes.py` for their source.
"""

from __future__ import annotations

from typing import Final

from services.common.metrics import Name

# --- tokenizer -------------------------------------------------------------------------------------------------
REQUEST_DURATION: Final = Name("gen_ai.server.request.duration", "s", "From a call's arrival to its last event.")
TIME_TO_FIRST_TOKEN: Final = Name("gen_ai.server.time_to_first_token", "s", "From a call's arrival to its first token.")
TIME_PER_OUTPUT_TOKEN: Final = Name(
    "gen_ai.server.time_per_output_token", "s", "Mean time per token after the first, once per request."
)
TOKEN_LATENCY: Final = Name("fermata.token.latency", "s", "Between two tokens of a choice as they leave the tokenizer.")
TOKEN_PART: Final = Name("fermata.token.part", "s", "One part of the time between two tokens (R25), by `part`.")
FIRST_TOKEN_PART: Final = Name("fermata.first_token.part", "s", "One part of the time to the first token, by `part`.")
STREAMS: Final = Name("fermata.streams", "{call}", "Calls that read a generation now.")
FINISHED: Final = Name("fermata.finished", "{choice}", "Choices that ended, by `finish_reason`.")
FAILED_CALLS: Final = Name("fermata.calls.failed", "{call}", "Calls that ended with an error, by `error_type`.")
TOLD_TOKENS: Final = Name("fermata.tokens.told", "{token}", "Tokens that readers were sent.")
RESUMED: Final = Name("fermata.resumes", "{call}", "Calls of Resume.")
REATTACHED: Final = Name("fermata.reattachments", "{event}", "Readers that went on at an orchestrator after a break.")

# --- orchestrator ----------------------------------------------------------------------------------------------
GENERATIONS: Final = Name("fermata.generations", "{generation}", "Generations in memory.")
OPENED: Final = Name("fermata.generations.opened", "{generation}", "Generations that were made here.")
COMMIT_LAG: Final = Name("fermata.commit.lag", "s", "From a token's arrival to its acknowledgement by the store.")
STORE_CALLS: Final = Name("fermata.store.calls", "{call}", "Calls of the session store.")
STORED_TOKENS: Final = Name("fermata.store.tokens", "{token}", "Tokens that the session store acknowledged.")
STORE_CUT_OFF: Final = Name("fermata.store.cut_off", "1", "1 while the session store is out of reach.")
WASTED_TOKENS: Final = Name("fermata.tokens.wasted", "{token}", "Drawn beyond a stop string or a cancel.")
TAKEOVERS: Final = Name("fermata.takeovers", "{generation}", "Generations taken over from another process.")
READMISSIONS: Final = Name("fermata.readmissions", "{choice}", "Choices that went on at a shard after the first.")

# --- shard -----------------------------------------------------------------------------------------------------
STEP_DURATION: Final = Name("fermata.step.duration", "s", "From the begin of a step to the last of its tokens.")
STEP_SEQUENCES: Final = Name("fermata.step.sequences", "{sequence}", "Sequences in a step: the batch size.")
STEP_TOKENS: Final = Name("fermata.step.tokens", "{token}", "Tokens computed in a step.")
RUNNING: Final = Name("fermata.sequences.running", "{sequence}", "Sequences that have KV blocks.")
WAITING: Final = Name("fermata.sequences.waiting", "{sequence}", "Sequences that wait for KV blocks.")
KV_BLOCKS: Final = Name("fermata.kv.blocks", "{block}", "KV blocks that there are.")
KV_USAGE: Final = Name("fermata.kv.usage", "1", "Share of the KV blocks that sequences hold.")
COMPUTED_TOKENS: Final = Name("fermata.tokens.computed", "{token}", "Tokens computed, prompts included.")
DRAWN_TOKENS: Final = Name("fermata.tokens.drawn", "{token}", "Tokens drawn.")
PREFIX_TOKENS: Final = Name("fermata.prefix.tokens", "{token}", "Prompt tokens that were found in the KV cache.")
PREEMPTIONS: Final = Name("fermata.preemptions", "{sequence}", "Sequences that lost their blocks to others.")
ENGINE_CPU: Final = Name("fermata.engine.cpu", "s", "CPU time of the engine's thread.")

# --- every process ---------------------------------------------------------------------------------------------
PROCESS_CPU: Final = Name("process.cpu.time", "s", "CPU time of the process.")
PROCESS_MEMORY: Final = Name("process.memory.usage", "By", "Resident memory of the process.")
SPANS_DROPPED: Final = Name("fermata.spans.dropped", "{span}", "Spans that could not be handed on.")
SPANS_EXPORTED: Final = Name("fermata.spans.exported", "{span}", "Spans that the collector took.")
