"""A real Llama whose retrieval heads are known, because its weights were written by hand.

`build` makes the model, `trial` a question it can answer. The answer to a literal question is copied from the needle;
the answer to a non-literal one, a city that stands nowhere in the context, follows from the landmark in the needle.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from locos_fast.planted.vocabulary import (
    ANSWER,
    BOS,
    CITIES,
    EOS,
    FILLERS,
    LANDMARKS,
    NAMES,
    PAD,
    TOKEN_IDS,
    TOKENS,
    build_tokenizer,
    ids,
)
from locos_fast.planted.weights import HIDDEN, MIN_HEAD_DIM, Roles, write_weights
from locos_fast.prompts.trials import Trial

KINDS = ("literal", "non_literal")
LATER_ROLES = ("literal", "non_literal", "read_only", "write_only")
HEADS_PER_ROLE = 3
HEADS_FILE = "planted_heads.json"
MAX_LENGTH = 131_072
MIN_TRIAL_LENGTH = 8  # [BOS], a needle of four tokens, a question of three


@dataclass(frozen=True)
class PlantedModel:
    """The model, its tokenizer, and where its heads sit: role -> [(layer, head)].

    positional    tell each token what stands two and one before it; in layer 0
    literal       write the answer to literal questions, the first of them most
    non_literal   write the answer to non-literal questions, the first of them most
    read_only     look at the needle and write nothing toward an answer
    write_only    look at [BOS] and raise every answer alike

    All other heads are noise. Without an answer to retrieve the model says "unknown".
    """

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    heads: Roles

    def trial(self, length: int, kind: str, *, depth: float, seed: int) -> Trial:
        """See `locos_fast.planted.trial`."""
        return trial(length, kind, depth=depth, seed=seed)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write an ordinary model folder, and the roles beside it in planted_heads.json."""
        folder = Path(directory)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"directory: expected a folder or a new path, got the file {folder}")
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # safetensors makes them readable to nobody else
            weights.chmod((folder / "config.json").stat().st_mode & 0o777)
        (folder / HEADS_FILE).write_text(json.dumps(self.heads, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, dtype: torch.dtype | None = None) -> PlantedModel:
        """Read what `save_pretrained` wrote, in the dtype it was saved in unless another is given."""
        folder = Path(directory)
        if not (folder / HEADS_FILE).is_file():
            raise ValueError(f"directory: expected a saved planted model, got {folder} without {HEADS_FILE}")
        roles = json.loads((folder / HEADS_FILE).read_text(encoding="utf-8"))
        return cls(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto"),
            tokenizer=AutoTokenizer.from_pretrained(folder),
            heads={role: [(layer, head) for layer, head in places] for role, places in roles.items()},
        )


def build(
    *,
    layers: int = 8,
    heads: int = 16,
    kv_heads: int = 4,
    head_dim: int = 128,
    noise: float = 0.004,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> PlantedModel:
    """Build the planted model; `seed` draws the places of the roles and the noise.

    noise is the standard deviation of the weights of the unplanted heads. The residual stream is always 256 wide.
    Raises ValueError, naming the argument, for sizes in which the roles have no room.
    """
    _check_sizes(layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, noise=noise)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=8,  # the MLPs are zero
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        bos_token_id=TOKEN_IDS[BOS],
        eos_token_id=TOKEN_IDS[EOS],
        pad_token_id=TOKEN_IDS[PAD],
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    roles = _place_roles(layers, heads, random.Random(seed))
    write_weights(model, roles, noise=noise, seed=seed)
    return PlantedModel(model=model, tokenizer=build_tokenizer(max_length=MAX_LENGTH), heads=roles)


def trial(length: int, kind: str, *, depth: float, seed: int) -> Trial:
    """A question with a one-token answer; the prompt has exactly `length` tokens.

    literal       needle `LANDMARK hosts NAME .`, question `who LANDMARK ANSWER`, answer NAME
    non_literal   needle `NAME visited LANDMARK .`, question `where NAME ANSWER`, answer the landmark's city

    The needle begins at the sentence boundary nearest to `depth` percent of the filler text. A seed asks about the same
    entities at every length, depth and kind.
    Raises ValueError for another kind, a length under 8 or above 131,072 tokens, or a depth outside 0..100.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if not MIN_TRIAL_LENGTH <= length <= MAX_LENGTH:
        raise ValueError(f"length: expected {MIN_TRIAL_LENGTH} to {MAX_LENGTH} tokens, got {length}")
    if not 0 <= depth <= 100:
        raise ValueError(f"depth: expected a percentage in 0..100, got {depth}")
    rng = random.Random(seed)
    needle, question, answer = _question(kind, rng)
    fillers = _filler_sentences(length - MIN_TRIAL_LENGTH, rng)
    start = _nearest_sentence_start(fillers, depth)
    return Trial(
        prompt_ids=ids([BOS, *fillers[:start], *needle, *fillers[start:], *question]),
        needle_span=(1 + start, 1 + start + len(needle)),
        answer_ids=ids([answer]),
        question=" ".join(question),
        needle=" ".join(needle),
        answer=answer,
        depth=depth,
        length=length,
        id=f"{kind}-{length}-{depth:g}-{seed}",
    )


def _check_sizes(*, layers: int, heads: int, kv_heads: int, head_dim: int, noise: float) -> None:
    if layers <= HEADS_PER_ROLE:
        raise ValueError(f"layers: expected at least {HEADS_PER_ROLE + 1}, got {layers}")
    if heads < len(LATER_ROLES) or HIDDEN % heads:
        raise ValueError(f"heads: expected a divisor of {HIDDEN}, at least {len(LATER_ROLES)}, got {heads}")
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"kv_heads: expected a divisor of heads ({heads}), got {kv_heads}")
    if head_dim < MIN_HEAD_DIM or head_dim % 2:
        raise ValueError(f"head_dim: expected an even number, at least {MIN_HEAD_DIM}, got {head_dim}")
    if not noise >= 0:
        raise ValueError(f"noise: expected a standard deviation of 0 or more, got {noise}")


def _place_roles(layers: int, heads: int, rng: random.Random) -> Roles:
    """Two positional heads in layer 0; of every other role one head in each of three later layers."""
    free = [rng.sample(range(heads), heads) for _ in range(layers)]
    roles: Roles = {"positional": [(0, free[0].pop()) for _ in range(2)]}
    for role in LATER_ROLES:
        chosen = sorted(rng.sample(range(1, layers), HEADS_PER_ROLE))
        roles[role] = [(layer, free[layer].pop()) for layer in chosen]
    return roles


def _question(kind: str, rng: random.Random) -> tuple[list[str], list[str], str]:
    """Words of the needle, words of the question, and the answer."""
    name, place = rng.choice(NAMES), rng.randrange(len(LANDMARKS))
    if kind == "literal":
        return [LANDMARKS[place], "hosts", name, "."], ["who", LANDMARKS[place], ANSWER], name
    return [name, "visited", LANDMARKS[place], "."], ["where", name, ANSWER], CITIES[place]


def _filler_sentences(count: int, rng: random.Random) -> list[str]:
    """`count` words and full stops; the last one is a full stop."""
    words: list[str] = []
    while len(words) < count:
        words += [*rng.choices(FILLERS, k=rng.randint(5, 11)), "."]
    return [*words[: count - 1], "."] if count else []


def _nearest_sentence_start(words: list[str], depth: float) -> int:
    starts = [0, *(index + 1 for index, word in enumerate(words) if word == ".")]
    return min(starts, key=lambda start: abs(start - depth / 100 * len(words)))
