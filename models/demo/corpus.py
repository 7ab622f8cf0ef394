"""The demo model's text: the Python standard library's own source, its split, tokenizer and training windows.

Shape legend: B windows in a batch, T positions that the model is trained on in one window.
"""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD, USER, ASSISTANT = SPECIAL_TOKENS = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|user|>",
    "<|assistant|>",
)
"""The first ids of the vocabulary, in this order."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The model completes Python: a chat only wraps a beginning of source text, whatever role it comes from."""

LEFT_OUT = frozenset(
    {
        "site-packages",
        "test",
        "tests",
        "idle_test",
        "testmock",
        "encodings",
        "lib2to3",
        "pydoc_data",
        "turtledemo",
    }
)
"""Folders whose text is third-party, repetitive (tests) or tables (code pages, topic texts)."""

HOLD_OUT_EVERY = 20
"""Every 20th file of the sorted list, so 5 % of the files, is never trained on."""


@dataclass(frozen=True)
class Corpus:
    """Source files of the library, as (path relative to the library, text), in sorted order."""

    train: tuple[tuple[str, str], ...]
    held_out: tuple[tuple[str, str], ...]


def read_corpus() -> Corpus:
    """Read the running interpreter's standard library; the same interpreter gives the same corpus."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    kept = [path for path in paths if not LEFT_OUT.intersection(path.parts[:-1])]
    for index, path in enumerate(kept):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        (held_out if index % HOLD_OUT_EVERY == HOLD_OUT_EVERY // 2 else train).append((path.as_posix(), text))
    return Corpus(tuple(train), tuple(held_out))


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` entries, special tokens included, as transformers and vLLM load it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def encode_stream(tokenizer: PreTrainedTokenizerFast, files: tuple[tuple[str, str], ...]) -> torch.Tensor:
    """All files' tokens, each file closed by the end token: int64[N]."""
    ids: list[int] = []
    for _, text in files:
        ids.extend(tokenizer.encode(text, add_special_tokens=False))
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids, dtype=torch.int64)


class Windows:
    """Training windows of a token stream, addressed by step: a resumed run sees what the first would have.

    Each window is the begin token and T + 1 tokens of the stream: T inputs, targets one and two places on.
    An epoch cuts the stream at a random offset and shuffles the cuts. One window in eight has the chat form:
    a user mark before the text and an assistant mark at a random place within it.
    """

    def __init__(
        self, stream: torch.Tensor, length_T: int, seed: int, user_id: int, assistant_id: int, bos_id: int
    ):
        self._stream, self._length_T, self._seed = stream, length_T, seed
        self._user_id, self._assistant_id, self._bos_id = user_id, assistant_id, bos_id
        self._per_epoch = (len(stream) - 2 * length_T - 2) // length_T
        assert self._per_epoch > 0

    def batch(self, step: int, size_B: int) -> torch.Tensor:
        """The windows of one step: int64[B, T + 2]."""
        rows = [self._window(step * size_B + i) for i in range(size_B)]
        return torch.stack(rows)

    def _window(self, index: int) -> torch.Tensor:
        epoch, place = divmod(index, self._per_epoch)
        of_epoch = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        offset = int(torch.randint(self._length_T, (1,), generator=of_epoch))
        start = offset + self._length_T * int(torch.randperm(self._per_epoch, generator=of_epoch)[place])
        text = self._stream[start : start + self._length_T + 1]
        of_window = torch.Generator().manual_seed(self._seed * 7_000_003 + index)
        bos = torch.tensor([self._bos_id])
        if int(torch.randint(8, (1,), generator=of_window)):
            return torch.cat([bos, text])
        cut = int(torch.randint(8, self._length_T // 2, (1,), generator=of_window))
        user, assistant = torch.tensor([self._user_id]), torch.tensor([self._assistant_id])
        return torch.cat([bos, user, text[:cut], assistant, text[cut:-2]])
