"""Messages to values and back: the only place of this room where both meet, besides the packing of hot messages.

Knows the shape of protos and dataclasses; decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from google.rpc import status_pb2

from fermata.v1 import common_pb2, sampling_pb2, session_pb2
from services.common.timings import FirstMoments, StepMoments
from services.common.tracing import TraceContext, new_trace, unpack
from services.common.types import Cursor, Fingerprint, SamplingProgram, StopRules, Tail, pack_ids
from services.orchestrator.generation import Generation, GenerationSpec, known_ids
from services.orchestrator.sequence import Sequence
from services.orchestrator.session_records import (
    IDLE,
    PARKED,
    RUNNING,
    GenerationRecord,
    SessionRecord,
    join_generation_id,
)
from services.orchestrator.v1 import orchestrator_pb2
from services.shard.v1 import shard_pb2


def fingerprint_from_message(message: common_pb2.Fingerprint) -> Fingerprint:
    """Message to value."""
    return Fingerprint(
        model=message.model,
        weights=message.weights,
        kernels=message.kernels,
        tokenizer=message.tokenizer,
        parallel_degree=message.parallel_degree,
        noise_version=message.noise_version,
    )


def fingerprint_to_message(fingerprint: Fingerprint) -> common_pb2.Fingerprint:
    """Value to message."""
    return common_pb2.Fingerprint(
        model=fingerprint.model,
        weights=fingerprint.weights,
        kernels=fingerprint.kernels,
        tokenizer=fingerprint.tokenizer,
        parallel_degree=fingerprint.parallel_degree,
        noise_version=fingerprint.noise_version,
    )


def step_moments(step: shard_pb2.Step, *, shard: str, sent_ns: int, arrived_ns: int) -> StepMoments:
    """When a step did what (R25)."""
    return StepMoments(
        shard,
        step.number,
        step.started_ns,
        step.schedule_ns,
        step.forward_ns,
        step.sample_ns,
        step.departed_ns,
        sent_ns,
        arrived_ns,
    )


def write_moments(message: orchestrator_pb2.TokenMoments, step: StepMoments | None, visible_ns: int) -> None:
    """Value to message."""
    message.visible_ns = visible_ns
    if step is not None:
        written = message.step
        written.shard, written.number = step.shard, step.number
        written.started_ns, written.departed_ns, written.sent_ns = step.started, step.departed, step.sent
        written.schedule_ns, written.forward_ns, written.sample_ns = step.schedule, step.forward, step.sample
        written.arrived_ns = step.arrived


def write_first_moments(message: orchestrator_pb2.FirstMoments, first: FirstMoments) -> None:
    """Value to message."""
    message.opened_ns, message.claimed_ns, message.placed_ns = first.opened, first.claimed, first.placed
    message.admitted_ns, message.started_ns = first.admitted, first.started


def spec_from_message(message: orchestrator_pb2.GenerationSpec) -> GenerationSpec:
    """Message to value. The tokenizer has filled in every default."""
    sampling, stop, output = message.sampling, message.stop, message.output
    return GenerationSpec(
        sampling=_program(sampling, message.bad_words),
        stop=StopRules(
            max_tokens=stop.max_tokens,
            min_tokens=stop.min_tokens,
            strings=tuple(stop.strings),
            token_ids=tuple(stop.token_ids),
            include_stop_string=stop.include_stop_string,
            ignore_eos=stop.ignore_eos,
        ),
        choices=message.n or 1,
        logprobs=output.logprobs or output.top_logprobs > 0,
        top_logprobs=output.top_logprobs,
        timings=output.timings,
        committed=message.durability == common_pb2.DURABILITY_COMMITTED,
        detach=message.detach,
        time_limit=message.time_limit_ms / 1000,
        exact=message.exact,
        priority=message.priority,
        fingerprint=fingerprint_from_message(message.fingerprint) if message.HasField("fingerprint") else None,
        trace=unpack(message.trace_context) or new_trace(sampled=False),
    )


def _program(sampling: sampling_pb2.SamplingParams, bad_words: Items[common_pb2.TokenIds]) -> SamplingProgram:
    return SamplingProgram(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=dict(sampling.logit_bias),
        allowed_token_ids=tuple(sampling.allowed_token_ids.ids) if sampling.HasField("allowed_token_ids") else None,
        bad_words=tuple(tuple(word.ids) for word in bad_words),
        seed=sampling.seed,
    )


def admit_message(
    generation: Generation, sequence: Sequence, *, grant: int, fork_of: int | None, context: TraceContext
) -> shard_pb2.Admit:
    """What a shard needs to run one choice from where its log stands (R11, R24). The link sets the attempt."""
    spec = generation.spec
    program = spec.sampling
    message = shard_pb2.SamplingProgram(
        temperature=program.temperature,
        top_k=program.top_k,
        top_p=program.top_p,
        min_p=program.min_p,
        repetition_penalty=program.repetition_penalty,
        presence_penalty=program.presence_penalty,
        frequency_penalty=program.frequency_penalty,
        logit_bias=program.logit_bias,
        bad_words=[common_pb2.TokenIds(ids=word) for word in program.bad_words],
        seed=program.seed,
    )
    if program.allowed_token_ids is not None:
        message.allowed_token_ids.ids.extend(program.allowed_token_ids)
    return shard_pb2.Admit(
        generation_id=generation.name.generation_id,
        choice=sequence.choice,
        epoch=generation.epoch,
        tenant=generation.name.tenant,
        token_ids=pack_ids(known_ids(generation, sequence)),
        output_start=generation.position,
        sampling=message,
        stop_token_ids=spec.stop.token_ids,
        min_tokens=spec.stop.min_tokens,
        max_count=sequence.max_count,
        grant=grant,
        fork_of=fork_of,
        priority=spec.priority,
        logprobs=spec.logprobs,
        top_logprobs=spec.top_logprobs,
        trace_context=context.pack(),
    )


def opened_message(generation: Generation) -> orchestrator_pb2.Opened:
    """What readers are told first."""
    return orchestrator_pb2.Opened(
        session_id=generation.name.session,
        generation_id=generation.name.generation_id,
        spec=orchestrator_pb2.GenerationSpec.FromString(generation.record.spec),
        prompt_tokens=generation.position,
        cached_tokens=generation.cached_tokens,
        fingerprint=fingerprint_to_message(generation.fingerprint) if generation.fingerprint else None,
    )


def terminal_message(sequence: Sequence) -> orchestrator_pb2.Terminal:
    """How a choice ended. It must have."""
    ending = sequence.ending
    assert ending is not None
    message = orchestrator_pb2.Terminal(
        choice=sequence.choice,
        finish_reason=common_pb2.FinishReason.ValueType(ending.reason),
        count=ending.count,
        cut_bytes=ending.cut_bytes,
        running_hash=sequence.running_hash(ending.count),
        prompt_tokens=ending.prompt_tokens,
        cached_tokens=ending.cached_tokens,
        error=status_pb2.Status.FromString(ending.error) if ending.error else None,
    )
    if ending.stop_token_id is not None:
        message.stop_token_id = ending.stop_token_id
    elif ending.stop_string is not None:
        message.stop_string = ending.stop_string
    return message


def cursors_from_messages(messages: Items[common_pb2.Cursor]) -> list[Cursor]:
    """Messages to values."""
    return [Cursor(message.choice, message.count, message.running_hash) for message in messages]


def tails_from_messages(messages: Items[common_pb2.Tail]) -> list[Tail]:
    """Messages to values."""
    return [Tail(message.choice, message.first_offset, list(message.token_ids)) for message in messages]


def session_message(session: SessionRecord, records: Items[GenerationRecord]) -> session_pb2.Session:
    """A session as the public API shows it; `records` may be left out."""
    message = session_pb2.Session(
        session_id=session.session,
        state={
            IDLE: session_pb2.SESSION_STATE_IDLE,
            RUNNING: session_pb2.SESSION_STATE_RUNNING,
            PARKED: session_pb2.SESSION_STATE_PARKED,
        }[session.state],
        generation_count=len(session.generations),
        labels=session.labels,
        generations=[_session_generation(record) for record in records],
    )
    message.create_time.FromMilliseconds(session.created_ms)
    message.expire_time.FromMilliseconds(session.expires_ms)
    return message


def _session_generation(record: GenerationRecord) -> session_pb2.SessionGeneration:
    parent = record.parent
    reasons = [record.terminals[choice].reason if choice in record.terminals else 0 for choice in range(record.choices)]
    message = session_pb2.SessionGeneration(
        generation_id=join_generation_id(record.session, record.generation),
        parent_generation_id=join_generation_id(record.session, parent.generation) if parent.generation else "",
        parent_choice=parent.choice,
        parent_count=parent.count,
        prompt_tokens=len(record.prompt_ids),
        output_tokens=[len(token_ids) for token_ids in record.logs],
        finish_reasons=[common_pb2.FinishReason.ValueType(reason) for reason in reasons],
    )
    message.create_time.FromMilliseconds(record.created_ms)
    return message
