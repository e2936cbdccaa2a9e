"""Ids and encodings of what the session store keeps (R13, R14)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import GenerationNotFound, InvalidRequest, SessionNotFound
from services.common.types import GENERATION_PATTERN, SESSION_PATTERN, FinishReason
from services.orchestrator import session_encoding as encoding
from services.orchestrator.session_records import (
    Terminal,
    derived_ids,
    join_generation_id,
    random_ids,
    split_generation_id,
)

TEXT = st.text(st.characters(codec="utf-8"))
terminals = st.builds(
    Terminal,
    choice=st.just(3),
    reason=st.sampled_from(FinishReason),
    count=st.integers(0, 2**32),
    cut_bytes=st.integers(0, 2**16),
    stop_token_id=st.none() | st.integers(0, 2**32 - 1),
    stop_string=st.none() | TEXT,
    error=st.binary(max_size=64),
    prompt_tokens=st.integers(0, 2**32),
    cached_tokens=st.integers(0, 2**32),
)


@given(terminals, terminals)
def test_terminals_are_equal_exactly_when_their_bytes_are(terminal: Terminal, other: Terminal) -> None:
    stored = encoding.encode_terminal(terminal)
    assert encoding.decode_terminal(3, stored) == terminal
    assert (encoding.encode_terminal(other) == stored) == (other == terminal)


def test_ids_have_the_form_of_r14() -> None:
    for session, generation in (random_ids(), derived_ids(b"secret", "tenant", "request")):
        assert SESSION_PATTERN.fullmatch(session) and GENERATION_PATTERN.fullmatch(generation)
        assert split_generation_id(join_generation_id(session, generation)) == (session, generation)


def test_derived_ids_are_those_of_hmac_sha256() -> None:
    """Computed with another implementation: openssl dgst -sha256 -hmac secret over 00000006 'tenant' 'request'."""
    assert derived_ids(b"secret", "tenant", "request") == ("tlfh2qkdx757mxbz3eoob5r4te", "cf366db33131b1b5")


@given(*[TEXT] * 4)
def test_no_two_requests_share_ids(tenant: str, request_id: str, other_tenant: str, other_request: str) -> None:
    same = (tenant, request_id) == (other_tenant, other_request)
    assert (derived_ids(b"s", tenant, request_id) == derived_ids(b"s", other_tenant, other_request)) == same


@given(TEXT, TEXT)
def test_no_two_tenants_share_keys(tenant: str, other: str) -> None:
    session, _ = random_ids()
    prefix = encoding.session_prefix(tenant, session)
    assert prefix.count("{") == prefix.count("}") == 1 and prefix.count(":") == 3
    assert (prefix == encoding.session_prefix(other, session)) == (tenant == other)
    member = f"{prefix[3:-2]}.{'0' * 16}".encode()
    assert encoding.split_member(member) == (tenant, session, "0" * 16)


@pytest.mark.parametrize("session", ["", "a" * 25, "a" * 27, "a" * 25 + "1", "A" * 26, "a" * 26 + "\n", "}" * 26])
def test_impossible_sessions_have_no_key(session: str) -> None:
    with pytest.raises(SessionNotFound):
        encoding.session_prefix("tenant", session)
    with pytest.raises(GenerationNotFound):
        split_generation_id(f"{session}.{'0' * 16}")


@pytest.mark.parametrize("generation", ["", "0" * 15, "0" * 17, "g" * 16, "A" * 16, "0" * 16 + "\n"])
def test_impossible_generations_are_not_found(generation: str) -> None:
    with pytest.raises(GenerationNotFound):
        encoding.check_generation("a" * 26, generation)
    with pytest.raises(GenerationNotFound):
        split_generation_id(f"{'a' * 26}.{generation}")


@given(st.text())
def test_page_tokens_are_ours_or_refused(token: str) -> None:
    if token:
        with pytest.raises(InvalidRequest):
            encoding.decode_page_token(token)
    ours = encoding.encode_page_token(b"1700000000000", b"a" * 26)
    assert encoding.decode_page_token(ours) == ("1700000000000", "a" * 26)
