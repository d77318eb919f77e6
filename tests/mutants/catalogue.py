"""Seeded mutants: for each invariant, a change that breaks it and the test that must notice.

A mutant replaces one text that occurs exactly once in its file. Its test must pass without the change and fail with
it; so a test that stopped guarding its invariant is found out. Whoever changes the guarded line moves the mutant along.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Mutant:
    """One broken invariant.

    Attributes:
        name: What the change does.
        guards: The invariant.
        file: Relative to the checkout.
        old: Text that occurs exactly once; ``new`` takes its place.
        test: The test that must fail, as pytest names it (without parameters).
    """

    name: str
    guards: str
    file: str
    old: str
    new: str
    test: str

    def apply(self, root: Path) -> None:
        """Change the file under ``root``.

        Raises:
            LookupError: The text does not occur exactly once.
        """
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise LookupError(
                f"mutant {self.name!r}: its text occurs {count} times in {self.file}; move it with the code"
            )
        path.unlink()  # may be a hard link
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


HANDOFF, KV = "mooncake_plugins/handoff", "mooncake_plugins/kv"
TRANSFER, TRANSPORTS, WIRE = "mooncake_plugins/transfer", "mooncake_plugins/transports", "mooncake_plugins/wire"
DIALECTS = "conductor/mooncake_conductor/dialects"

MUTANTS = (
    # --- only right bytes are believed ---
    Mutant(
        "checksums are not compared",
        "a block counts only if its checksum matches",
        f"{HANDOFF}/_pull.py",
        "equal = (theirs == ours) if self._verify else",
        "equal = (theirs == theirs) if self._verify else",
        "tests/handoff/test_faults.py::test_a_flipped_bit_on_the_wire_is_one_mismatch_and_one_bad_block",
    ),
    Mutant(
        "the comparison of checksums is inverted",
        "a block counts only if its checksum matches",
        f"{HANDOFF}/_pull.py",
        "equal = (theirs == ours) if self._verify else",
        "equal = (theirs != ours) if self._verify else",
        "tests/handoff/test_pull.py::test_a_block_whose_checksum_differs_is_named_and_counted",
    ),
    Mutant(
        "checksums do not depend on the place of the block",
        "right bytes in the wrong place are as visible as wrong bytes",
        f"{KV}/_checksum.py",
        "(root + layers[:, None] + blocks[None, :])",
        "(root + 0 * layers[:, None] + 0 * blocks[None, :])",
        "tests/kv/test_checksum.py::test_equal_blocks_in_different_places_have_different_checksums",
    ),
    Mutant(
        "checksums do not depend on the transfer",
        "a commit of one transfer proves nothing in another",
        f"{KV}/_checksum.py",
        "xxhash.xxh3_64_intdigest(transfer_id.encode())",
        "0",
        "tests/kv/test_checksum.py::test_two_transfers_have_no_seed_in_common",
    ),
    Mutant(
        "data counts as soon as it was read",
        "data without a commit is worth nothing",
        f"{HANDOFF}/_pull.py",
        "        self._fetched[(event.attempt, event.seq)] = (span, event.checksums)\n",
        "        self._fetched[(event.attempt, event.seq)] = (span, event.checksums)\n"
        "        self._good[self._place(span)] = True\n",
        "tests/handoff/test_pull.py::test_data_without_a_commit_is_worth_nothing",
    ),
    Mutant(
        "a commit is sent although the blocks were taken away",
        "a commit is sent only if the lease held after the data was read out",
        f"{HANDOFF}/_source_service.py",
        "if not self._is_valid(transfer, action.message.attempt):",
        "if False:",
        "tests/handoff/test_faults.py::test_a_commit_is_withheld_when_the_blocks_were_taken_away_before_it_is_sent",
    ),
    Mutant(
        "the engine thread does not void an attempt before it overwrites its blocks",
        "a commit is sent only if the lease held after the data was read out",
        f"{HANDOFF}/_source_service.py",
        "self._void_below[transfer] += 1",
        "self._void_below[transfer] += 0",
        "tests/handoff/test_faults.py::test_a_commit_is_withheld_when_the_blocks_were_taken_away_before_it_is_sent",
    ),
    Mutant(
        "a block is announced before it is full",
        "only computed blocks are announced",
        f"{HANDOFF}/_source.py",
        "blocks = min(event.blocks, len(self._block_ids))",
        "blocks = min(event.blocks + 1, len(self._block_ids))",
        "tests/handoff/test_source.py::test_a_partly_filled_last_block_is_announced_only_when_the_engine_counts_it",
    ),
    Mutant(
        "blocks of the prefix cache are announced when the request is scheduled",
        "only computed blocks are announced",
        f"{HANDOFF}/_source.py",
        "        self._ready[:] = 0\n        actions: list[SourceAction] = []\n",
        "        self._ready[:] = len(event.block_ids)\n        actions: list[SourceAction] = []\n",
        "tests/handoff/test_source.py::test_blocks_of_the_prefix_cache_are_announced_with_the_layer_that_proves_them",
    ),
    Mutant(
        "a restart keeps what was good",
        "data of an attempt whose blocks were taken away is discarded",
        f"{HANDOFF}/_pull.py",
        "        self._announced[:] = False\n        self._good[:] = False\n",
        "        self._announced[:] = False\n",
        "tests/handoff/test_pull.py::test_a_restart_discards_what_was_good",
    ),
    Mutant(
        "a new attempt does not wait for reads of the old one",
        "no two reads write one block",
        f"{HANDOFF}/_pull.py",
        "if any(attempt != self._attempt for attempt, _ in self._reading):",
        "if False:",
        "tests/handoff/test_simulation.py::test_random_walks_with_preemptions_always_end_well",
    ),
    Mutant(
        "a block that is announced twice is read twice",
        "no two reads write one block",
        f"{HANDOFF}/_pull.py",
        "        if cells.any():\n",
        "        if False:\n",
        "tests/handoff/test_pull.py::test_a_block_that_is_announced_twice_is_not_read_twice",
    ),
    Mutant(
        "a worker with another prompt is served late",
        "decode gets the KV of its own prompt",
        f"{HANDOFF}/_source.py",
        "if self.state is not SourceState.EXPECTED and self._puller_prompt != self._prompt:",
        "if False:",
        "tests/handoff/test_source.py::test_a_worker_with_another_prompt_is_refused",
    ),
    Mutant(
        "a worker with another prompt is served early",
        "decode gets the KV of its own prompt",
        f"{HANDOFF}/_source.py",
        "if self._puller is not None and self._puller_prompt != self._prompt:",
        "if False:",
        "tests/handoff/test_source.py::test_a_worker_with_another_prompt_is_refused",
    ),
    Mutant(
        "prompts are named without what else changes their KV",
        "decode gets the KV of its own prompt",
        f"{KV}/_digest.py",
        "        digest.update(encoded)\n",
        "",
        "tests/kv/test_digest.py::test_extras_count_in_their_order",
    ),
    Mutant(
        "fingerprints are not compared",
        "only engines with equal KV exchange it",
        f"{HANDOFF}/_source_service.py",
        "        if differences:\n",
        "        if False:\n",
        "tests/handoff/test_refusals.py::test_another_fingerprint_is_refused_with_both_values",
    ),
    Mutant(
        "coordinates are not compared",
        "a rank pulls from its own rank",
        f"{HANDOFF}/_source_service.py",
        "if isinstance(message, wire.Attach) and message.coordinate != str(self._identity.coordinate):",
        "if False:",
        "tests/handoff/test_refusals.py::test_another_coordinate",
    ),
    # --- nothing lands late ---
    Mutant(
        "a failure is reported while reads are under way",
        "a transfer is reported only when nothing lands any more",
        f"{HANDOFF}/_pull.py",
        "return [CancelReads(), *self._finish_when_fenced()] if self._reading else self._end()",
        "return [CancelReads(), *self._end()]",
        "tests/handoff/test_faults.py::test_a_cancelled_pull_is_reported_only_when_nothing_lands_any_more",
    ),
    Mutant(
        "a failure is reported when the first of several reads has ended",
        "a transfer is reported only when nothing lands any more",
        f"{HANDOFF}/_pull.py",
        "return [] if self._reading else self._end()",
        "return self._end()",
        "tests/handoff/test_pull.py::test_a_failure_is_reported_only_when_the_last_read_has_ended",
    ),
    Mutant(
        "a read that its engine has not ended counts as ended",
        "a transfer is reported only when nothing lands any more",
        f"{HANDOFF}/_pull_service.py",
        "while status is BatchStatus.PENDING:",
        "while False:",
        "tests/handoff/test_faults.py::test_a_read_that_its_engine_does_not_end_is_not_reported",
    ),
    Mutant(
        "bad blocks are not zeroed",
        "blocks that are named bad hold zeros",
        f"{HANDOFF}/_pull_service.py",
        "        self._cache.zero(bad)\n",
        "",
        "tests/handoff/test_faults.py::test_a_flipped_bit_on_the_wire_is_one_mismatch_and_one_bad_block",
    ),
    Mutant(
        "a cancelled batch is terminal while a mover works on it",
        "a batch is terminal only when no local memory is touched any more",
        f"{TRANSFER}/_batch_machine.py",
        "if self.active or self.is_terminal:",
        "if self.is_terminal:",
        "tests/transfer/test_batch_machine.py::test_failed_only_once_the_other_works_have_ended",
    ),
    Mutant(
        "a chunk may land after its grant was revoked",
        "nothing lands under a revoked grant",
        f"{TRANSFER}/_grants.py",
        "            if not self.is_open:\n                return False\n",
        "",
        "tests/transfer/test_grants.py::test_no_chunk_begins_after_revoke",
    ),
    Mutant(
        "a grant is fenced while a chunk is landing",
        "nothing lands under a revoked grant",
        f"{TRANSFER}/_grants.py",
        "        if not grant.wait_quiet(deadline):\n            return False\n",
        "",
        "tests/transfer/test_grants.py::test_chunk_in_progress_means_quarantine_until_it_ends",
    ),
    Mutant(
        "tcp asks for the grant only before the first chunk",
        "nothing lands under a revoked grant",
        f"{TRANSPORTS}/_tcp_service.py",
        "            if not admission.begin_chunk():\n                return False\n",
        "            if not admission.begin_chunk() and not vector.done:\n                return False\n",
        "tests/transfer/test_faults.py::test_writer_stopped_then_target_revokes_and_refills",
    ),
    # --- nothing is held for ever, nothing is freed twice ---
    Mutant(
        "the lease never ends",
        "blocks are held at most until the lease is over",
        f"{HANDOFF}/_source.py",
        "now >= self._lease_until",
        "False",
        "tests/handoff/test_source_end.py::test_held_blocks_are_freed_and_withdrawn_when_the_lease_is_over",
    ),
    Mutant(
        "blocks are freed again when the end is reported again",
        "blocks are freed once",
        f"{HANDOFF}/_source.py",
        "case PrefillEnded(ok=True) if not self._is_free:",
        "case PrefillEnded(ok=True):",
        "tests/handoff/test_source_end.py::test_blocks_are_freed_once_however_often_the_end_is_reported",
    ),
    Mutant(
        "blocks are freed while the engine still computes",
        "blocks are freed only when the engine holds them for the hand-off",
        f"{HANDOFF}/_source.py",
        "if self._consumer_done and self.state is SourceState.HELD:",
        "if self._consumer_done:",
        "tests/handoff/test_source_end.py::test_a_release_before_the_prefill_has_ended_frees_when_it_ends",
    ),
    Mutant(
        "who comes after the end waits",
        "nobody waits for a transfer that has ended",
        f"{HANDOFF}/_source_service.py",
        "        if ticket.id in self._ended:\n",
        "        if False:\n",
        "tests/handoff/test_refusals.py::test_a_prefill_that_was_aborted_refuses_at_once",
    ),
    # --- who may ---
    Mutant(
        "the signature of a ticket is not compared",
        "only the Conductor makes tickets",
        f"{HANDOFF}/_ticket.py",
        "if not hmac.compare_digest(_b64(_mac(body, key)), mac):",
        "if False:",
        "tests/handoff/test_ticket.py::test_another_secret_makes_it_forged",
    ),
    Mutant(
        "expired tickets are accepted",
        "a ticket expires",
        f"{HANDOFF}/_ticket.py",
        "if now >= ticket.expires_at:",
        "if False:",
        "tests/handoff/test_ticket.py::test_a_ticket_is_accepted_until_it_expires_and_not_after",
    ),
    Mutant(
        "tickets are accepted again",
        "a ticket is used once",
        f"{HANDOFF}/_ticket.py",
        "if ticket.id in self._expiry:",
        "if False:",
        "tests/handoff/test_ticket.py::test_a_ticket_is_used_once",
    ),
    Mutant(
        "prefill does not look whether a ticket was used",
        "a ticket is used once",
        f"{HANDOFF}/_source_service.py",
        "            self._books[type(message)].use(ticket, now)\n",
        "",
        "tests/handoff/test_refusals.py::test_a_ticket_that_the_same_worker_has_used",
    ),
    Mutant(
        "a second worker is served with the same ticket",
        "a ticket is used once",
        f"{HANDOFF}/_source.py",
        "        if self._had_puller:\n",
        "        if False:\n",
        "tests/handoff/test_source_end.py::test_a_second_worker_is_refused_also_when_the_first_has_gone",
    ),
    Mutant(
        "a ticket for another prefill instance is accepted",
        "a ticket names one prefill instance",
        f"{HANDOFF}/_source_service.py",
        "if ticket.prefill != self._identity.instance:",
        "if False:",
        "tests/handoff/test_refusals.py::test_a_ticket_for_another_instance",
    ),
    Mutant(
        "the client's proof is not compared",
        "only who knows the cluster secret is served",
        f"{WIRE}/_handshake.py",
        'if not hmac.compare_digest(frame.payload, proof(self.key, b"client", self.hello, self._challenge)):',
        "if False:",
        "tests/wire/test_handshake.py::test_server_refuses_a_client_without_the_secret",
    ),
    Mutant(
        "the server's proof is not compared",
        "nobody poses as a peer",
        f"{WIRE}/_handshake.py",
        'if not hmac.compare_digest(challenge.proof, proof(self.key, b"server", self.hello, challenge)):',
        "if False:",
        "tests/wire/test_handshake.py::test_wrong_secret_is_refused_by_the_client_first",
    ),
    Mutant(
        "another incarnation of a peer is accepted",
        "offsets of a peer's former life never reach its new one",
        f"{WIRE}/_shell.py",
        "if incarnation is not None and agreed.peer.incarnation != incarnation:",
        "if False:",
        "tests/wire/test_listener.py::test_another_incarnation_is_not_accepted",
    ),
    Mutant(
        "the end of a range is not checked",
        "only registered memory is touched",
        f"{TRANSFER}/_regions.py",
        "is_inside = (index >= 0) & (lengths <= table.ends[index] - offsets)",
        "is_inside = index >= 0",
        "tests/transfer/test_regions.py::test_a_range_may_not_span_two_regions",
    ),
    Mutant(
        "rights are not checked",
        "only memory registered for it is read or written",
        f"{TRANSFER}/_regions.py",
        "        if not has_rights.all():\n",
        "        if False:\n",
        "tests/transfer/test_regions.py::test_rights_are_checked_per_range",
    ),
    Mutant(
        "a write outside its grant is admitted",
        "a grant covers what it names",
        f"{TRANSFER}/_grants.py",
        "        if bad is not None:\n",
        "        if False:\n",
        "tests/transfer/test_grants.py::test_check_names_the_first_range_that_is_not_covered",
    ),
    Mutant(
        "the client's own transfer parameters reach an engine",
        "only the Conductor decides about hand-offs",
        f"{DIALECTS}/_vllm.py",
        "_PARAMS_ONLY = frozenset({_PARAMS})",
        "_PARAMS_ONLY: frozenset[str] = frozenset()",
        "tests/conductor/test_relay.py::test_the_clients_own_transfer_parameters_reach_no_engine",
    ),
    Mutant(
        "repeated keys in a request are accepted",
        "Conductor and engine read one request alike",
        f"{DIALECTS}/_body.py",
        "    if not _is_usual(data, fields):\n",
        "    if False:\n",
        "tests/conductor/test_body.py::test_objects_are_read_as_python_reads_them",
    ),
)
