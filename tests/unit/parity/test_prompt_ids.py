"""Prompt ids there and here, and the texts' own ids."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rpp.experience.types import Prompt, Rollout, VersionSpan
from megatron_rpp.parity.prompt_ids import check_prompt_ids

EOS = 1


class Letters:
    """One token a letter; a chat prompt begins with the token 9."""

    eos_token_ids: tuple[int, ...] = (EOS,)
    pad_token_id = 0
    vocab_size = 128

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_prompts(self, texts: Sequence[str], *, chat: bool) -> list[list[int]]:
        return [[9] * chat + self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        raise NotImplementedError

    def render_chat(self, text: str) -> str:
        raise NotImplementedError

    def apply_chat_template(self, text: str) -> list[int]:
        raise NotImplementedError


def rollout(engine_prompt_ids: tuple[int, ...] | None, *, text: str = "c", ids: tuple[int, ...] = (99, EOS)) -> Rollout:
    return Rollout(
        prompt=Prompt(id=3, text="ab", token_ids=(97, 98), answer=""),
        group_id=0,
        response_ids=ids,
        rollout_logprobs=(-1.0,) * len(ids),
        text=text,
        finish_reason="stop" if ids[-1] == EOS else "length",
        version_spans=(VersionSpan(0, 0, len(ids)),),
        engine_prompt_ids=engine_prompt_ids,
    )


FIRST = rollout(None)


def test_a_prompt_that_the_engine_got_otherwise_is_found_with_the_first_difference() -> None:
    rollouts = [rollout((97, 98)), rollout((97, 7, 98)), rollout((97, 98, 7))]
    found = check_prompt_ids(rollouts, [FIRST], Letters(), chat=False)
    assert (found.known, found.unknown, found.different) == (3, 0, 2)
    assert "prompt 3 has 2 tokens here and 3 there" in found.example
    assert "from token 1 on 98 here and 7 98 there" in found.example


def test_a_prompt_that_is_longer_there_differs_from_its_end_on() -> None:
    example = check_prompt_ids([rollout((97, 98, 7))], [FIRST], Letters(), chat=False).example
    assert "from token 2 on nothing here and 7 there" in example


def test_a_server_that_does_not_tell_is_no_proof_in_either_direction() -> None:
    found = check_prompt_ids([rollout(None), rollout((97, 98))], [FIRST], Letters(), chat=False)
    assert (found.known, found.unknown, found.different) == (1, 1, 0)


def test_texts_are_tokenized_as_the_prompts_were() -> None:
    plain = check_prompt_ids([rollout(None)], [FIRST], Letters(), chat=False)
    assert (plain.retokenized, plain.retokenized_otherwise) == (1, 0)
    chat = check_prompt_ids([rollout(None)], [FIRST], Letters(), chat=True)
    assert (chat.retokenized, chat.retokenized_otherwise) == (1, 1), "trained without the chat template"


def test_the_stop_token_is_not_part_of_a_responses_text() -> None:
    assert check_prompt_ids([rollout(None)], [FIRST], Letters(), chat=False).responses_otherwise == 0
    cut = rollout(None, ids=(99,))
    assert check_prompt_ids([cut], [cut], Letters(), chat=False).responses_otherwise == 0
    other = rollout(None, text="d")
    assert check_prompt_ids([other], [other], Letters(), chat=False).responses_otherwise == 1
