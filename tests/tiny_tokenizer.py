"""A byte-level BPE tokenizer of a few hundred entries, built offline and the same every time.

Every byte is in its vocabulary, so it encodes any text and decodes any sequence of its token ids.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 320  # 3 special tokens, 256 bytes, 61 merges; a multiple of 64, so vLLM adds no padding rows
SPECIAL_TOKENS = ("<bos>", "<eos>", "<pad>")  # token ids 0, 1, 2
BOS_ID, EOS_ID, PAD_ID = range(3)

_TEXT = (
    "def split(self, hidden, expert_ids): return [self.worker(i) for i in expert_ids if i is not None]",
    "The router sends each token to the experts that it chose, and the sum of their outputs comes back.",
    "for layer in range(num_layers): hidden = hidden + self.layers[layer](hidden, positions)",
    "import json, class Worker, while True, with open(path) as file, print(value), else, try, except ValueError",
)
_CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json (with a chat template) and generation_config.json into `folder`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, "the text is too short for the merges"
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos, pad = SPECIAL_TOKENS
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
            "do_sample": False,
        },
    )


def add_tokens(folder: Path, *tokens: str) -> None:
    """Make `tokens` special tokens of the tokenizer in `folder`, in place of its last merges."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    model = content["model"]
    for token_id, token in enumerate(tokens, VOCAB_SIZE - len(tokens)):
        del model["vocab"][next(text for text, known in model["vocab"].items() if known == token_id)]
        model["vocab"][token] = token_id
        model["merges"].pop()
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        content["added_tokens"].append({"id": token_id, "content": token, **flags})
    path.write_text(json.dumps(content))


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
