"""Invariants of text: padding, BOS, EOS, the chat template, the prompt/completion boundary, the contract.

Each function takes the subject and returns a finding; its docstring is the invariant.
"""

from __future__ import annotations

from typing import Any

from rlhf import contract as contracts
from rlhf import text
from rlhf.check_report import Finding, failed, noted, passed, skipped, within
from rlhf.check_subject import COMPLETIONS, Subject, TrainedReward
from rlhf.contract import Contract, check_same_template
from rlhf.model_files import token_ids
from rlhf.types import ContractError, Prompt

TRUNCATING = {
    "top_k": (0, None),
    "top_p": (1.0, None),
    "min_p": (0, None),
    "typical_p": (1.0, None),
    "epsilon_cutoff": (0, None),
    "eta_cutoff": (0, None),
    "repetition_penalty": (1.0, None),
    "no_repeat_ngram_size": (0, None),
    "min_length": (0, None),
    "min_new_tokens": (0, None),
    "bad_words_ids": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
}
"""Settings of a generation config that change the sampled distribution, with the values that do not."""
OTHER_TEXT = "go back to the tokenizer of SFT, or train again from SFT with this one"
"""What to do about a broken contract."""
CONVERSATION: Prompt = [{"role": "user", "content": "Name a colour, please."}]


def weights(subject: Subject) -> Finding:
    """Every weight of the model lies in its files: transformers draws a missing one at random, without an error."""
    if subject.source is None:
        return skipped("the model was given in memory")
    missing = subject.source.missing_weights()
    return within(
        len(missing),
        0,
        cause=f"{missing[0] if missing else ''} is not in the model's files ({len(missing)} such weights): "
        "transformers draws them at random, anew each time",
        advice="save the whole model again, or fetch its files again",
    )


def pad(subject: Subject) -> Finding:
    """Pad is no EOS, in the tokenizer and in the embedding, whose padding row gets no gradient."""
    ends, tokenizer = subject.eos_token_ids, subject.tokenizer
    embedding = subject.policy.get_input_embeddings().padding_idx
    advice = "load the tokenizer with rlhf.models.load_tokenizer and call models.fix_padding, or set another pad_token"
    if tokenizer.pad_token_id in ends:
        return failed(_is_eos("the tokenizer", tokenizer.pad_token_id, tokenizer), advice)
    if embedding in ends:
        return failed(_is_eos("the embedding's padding_idx", embedding, tokenizer), advice)
    raw = subject.source.tokenizer.pad_token_id if subject.source else tokenizer.pad_token_id
    if raw in ends:
        return noted(
            _is_eos("the source's tokenizer", raw, tokenizer),
            f"mended when loading: padding is {tokenizer.pad_token!r} ({tokenizer.pad_token_id}) here, and so it is "
            "saved. Code of your own that masks by `ids != pad` would hide every EOS of this source",
        )
    return passed(f"pad {tokenizer.pad_token_id}", f"not in {list(ends)}")


def bos(subject: Subject) -> Finding:
    """A prompt starts with exactly one BOS where the tokenizer uses one, and never with two."""
    tokenizer, token = subject.tokenizer, subject.tokenizer.bos_token_id
    if token is None:
        return skipped("the tokenizer has no BOS")
    wanted = int(text.adds_bos(tokenizer))
    counts = [_leading(text.encode_prompt(tokenizer, prompt), token) for prompt in _prompts(tokenizer)]
    if any(count > 1 or count < wanted for count in counts):
        return failed(
            f"a prompt starts with {max(counts)} BOS tokens ({tokenizer.bos_token!r}): the chat template writes more "
            "than one"
            if max(counts) > 1
            else "a prompt starts without BOS, although the tokenizer adds one",
            "take all but one bos_token out of the chat template",
            max(counts),
            "== 1" if wanted else "<= 1",
        )
    doubled = [_leading(tokenizer(_rendered(tokenizer, p)).input_ids, token) for p in _prompts(tokenizer)]
    if max(doubled) > 1:
        return noted(
            "the chat template writes a BOS and the tokenizer adds a second one to the rendered text",
            "mended: rendered text is tokenised without special tokens here. Code of your own that calls "
            "tokenizer(rendered) needs add_special_tokens=False",
            max(doubled),
        )
    return passed(max(counts), "== 1" if wanted else "<= 1")


def template(subject: Subject) -> Finding:
    """The chat template renders the same conversation to the same text, today and tomorrow."""
    tokenizer = subject.tokenizer
    if not tokenizer.chat_template:
        return skipped("the tokenizer has no chat template: prompts are plain text")
    if len({_rendered(tokenizer, CONVERSATION) for _ in range(5)}) > 1:
        return failed(
            "the chat template renders the same conversation differently each time",
            "take what is random out of the chat template: sampling and training would read different prompts",
        )
    if "strftime_now" in str(tokenizer.chat_template):
        return noted(
            "the chat template can write today's date into the prompt (strftime_now)",
            "give the template a fixed date before SFT: rankings, reward model and PPO would read other prompts",
        )
    return passed()


def end_of_turn(subject: Subject) -> Finding:
    """What ends an answer in the chat template also ends a completion."""
    tokenizer = subject.tokenizer
    if not tokenizer.chat_template:
        return skipped("the tokenizer has no chat template: prompts are plain text")
    answered = [*CONVERSATION, {"role": "assistant", "content": "blue"}]  # type: ignore[misc]
    rendered = tokenizer.apply_chat_template(answered, tokenize=False)
    ids = tokenizer(rendered.rpartition("blue")[2], add_special_tokens=False).input_ids
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {*tokenizer.all_special_ids}
    ending = next((i for i in ids if i in special), None)
    if ending is None or ending in subject.eos_token_ids:
        return passed(f"{ending}" if ending is not None else "", f"in {list(subject.eos_token_ids)}")
    return noted(
        f"the chat template ends an answer with {tokenizer.decode([ending])!r} ({ending}), which is no EOS: an "
        "instruction-tuned model would go on until max_completion_tokens",
        f"add {ending} to eos_token_id of generation_config.json, or fine-tune with `rlhf sft` first, which teaches "
        f"{tokenizer.eos_token!r}",
    )


def eos(subject: Subject) -> Finding:
    """Every EOS that the tokenizer or the generation config names ends a completion."""
    named = {subject.tokenizer.eos_token_id}
    if subject.source:
        named |= {subject.source.tokenizer.eos_token_id, *token_ids(subject.source.generation.get("eos_token_id"))}
    missing = sorted(named - {None} - set(subject.eos_token_ids))
    if missing:
        return failed(
            f"the source names {missing} as EOS, but only {list(subject.eos_token_ids)} end a completion",
            "keep the model's generation config when loading: set generation_config.eos_token_id to all of them",
        )
    return passed(f"{sorted(named)}", f"in {list(subject.eos_token_ids)}")


def boundary(subject: Subject) -> Finding:
    """A completion is the same text after encoding and decoding, ends with one EOS, and the prompt keeps its end."""
    tokenizer = subject.tokenizer
    for completion in (*COMPLETIONS, "", " naïve, 3 €"):
        ids = text.encode_completion(tokenizer, completion)
        again = text.decode_completion(tokenizer, ids)
        if again != completion:
            return failed(
                f"the completion {completion!r} comes back from the tokenizer as {again!r}",
                "use a tokenizer that loses nothing: annotators and reward model read the decoded text",
            )
        if ids[-1] != tokenizer.eos_token_id or ids.count(tokenizer.eos_token_id) != 1:
            return failed(
                f"the completion {completion!r} is encoded as {ids}, not with one EOS ({tokenizer.eos_token_id}) at "
                "its end",
                "the tokenizer must add no special tokens with add_special_tokens=False",
            )
    for prompt in _prompts(tokenizer):
        if text.encode_prompt(tokenizer, prompt)[-1] == tokenizer.eos_token_id and isinstance(prompt, str):
            return failed(
                f"the prompt {prompt!r} is encoded with an EOS at its end",
                "the tokenizer must not add EOS to a text: set add_eos_token to false",
            )
    return passed()


def contract(subject: Subject) -> Finding:
    """Tokenizer and template are those of training, and the reward model reads the policy's text as it was written."""
    mine = _contract(subject.tokenizer, subject.eos_token_ids)
    written = contracts.load(subject.source.folder) if subject.source else None
    if written and written.tokenizer_hash != mine.tokenizer_hash:
        return failed("the tokenizer is another one than when contract.json was written", OTHER_TEXT)
    try:
        if written:
            check_same_template(written, mine, mine_name="contract.json", theirs_name="the tokenizer's files")
        if isinstance(subject.reward, TrainedReward):
            theirs = subject.reward.contract or _contract(subject.reward.tokenizer, ())
            check_same_template(mine, theirs, mine_name="the policy", theirs_name="the reward model")
    except ContractError as error:
        return failed(str(error), OTHER_TEXT)
    return passed("the same", "the same")


def generation_config(subject: Subject) -> Finding:
    """Nothing but the temperature changes the distribution that is sampled from."""
    settings = subject.source.generation if subject.source else subject.policy.generation_config.to_diff_dict()
    left = {name: settings[name] for name, harmless in TRUNCATING.items() if settings.get(name) not in harmless}
    if settings.get("temperature") not in (None, subject.temperature):
        left["temperature"] = settings["temperature"]
    if not left:
        return passed()
    shown = ", ".join(f"{name} {value}" for name, value in left.items())
    return noted(
        f"the generation config sets {shown}: plain `generate` would sample from another distribution than the loss "
        "assumes",
        f"ignored here: completions are drawn from softmax(logits / {subject.temperature:g}) over all tokens. "
        "Take it out of generation_config.json if the trained model is to be used as it was trained",
    )


def _prompts(tokenizer: Any) -> list[Prompt]:
    return ["The film", *([CONVERSATION] if tokenizer.chat_template else [])]


def _rendered(tokenizer: Any, prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def _leading(ids: list[int], token: int) -> int:
    """How many times `token` stands at the start."""
    return next((i for i, each in enumerate(ids) if each != token), len(ids))


def _is_eos(what: str, token: int, tokenizer: Any) -> str:
    return (
        f"{what} pads with {tokenizer.convert_ids_to_tokens(token)!r} ({token}), which is EOS: the end of a completion "
        "could not be told from padding, and would not be learned"
    )


def _contract(tokenizer: Any, ends: tuple[int, ...]) -> Contract:
    return text.contract_of(tokenizer, eos_token_ids=ends, max_prompt_tokens=1, max_completion_tokens=1)
