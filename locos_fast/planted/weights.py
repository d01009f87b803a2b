"""The algebra of the planted model: which numbers make a Llama answer needle questions, head by head.

The residual stream is cut into blocks (entities are names and landmarks; "one-hot" means 1 at the entity's index):

    SELF        this token's entity, one-hot
    TWO_BACK    entity of the token two back, one-hot       written by a positional head
    ONE_BACK    entity of the token one back, one-hot       written by a positional head
    OUTPUT      one slot per possible answer; the unembedding reads this and nothing else
    CONST       the same large number on every token
    IS_BOS      1 on the first token
    WORD        what tells ordinary words apart; no planted head reads it, so decoys may write there

Needles are `LANDMARK hosts NAME .` and `NAME visited LANDMARK .`; the questions are `who LANDMARK ANSWER` and
`where NAME ANSWER`. So on the last row ONE_BACK is the entity asked about, and only the needle's second entity has that
one TWO_BACK: a head whose query reads ONE_BACK and whose key reads TWO_BACK attends there. If nothing matches, the head
attends to [BOS], whose SELF is empty.

CONST dominates the norm of every token, so RMSNorm with weight CONST_VALUE / sqrt(HIDDEN) leaves a token almost as it
is. Scores below are in nats: after the softmax scale, hence the sqrt(head_dim) in every query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from locos_fast.planted.vocabulary import ANSWER, BOS, CITIES, ENTITIES, EOS, FILLERS, NAMES, TOKEN_IDS, UNKNOWN

Roles = dict[str, list[tuple[int, int]]]

NAME_RANGE, LANDMARK_RANGE = range(len(NAMES)), range(len(NAMES), len(ENTITIES))
OUTPUT_WORDS = [*NAMES, *CITIES, UNKNOWN, EOS]  # a landmark's index among the entities is its city's index here

# First index of each block; WORD takes the rest.
SELF, TWO_BACK, ONE_BACK, OUTPUT = 0, len(ENTITIES), 2 * len(ENTITIES), 3 * len(ENTITIES)
CONST = OUTPUT + len(OUTPUT_WORDS)
IS_BOS, WORD = CONST + 1, CONST + 2
HIDDEN = 256

CONST_VALUE = 32.0
WORD_NORM = 2.0
LOGIT_SCALE = 10.0  # logits per unit in OUTPUT
FALLBACK = 0.6  # OUTPUT of [EOS], or of "unknown" after ANSWER: beats the noise heads, loses to a retrieved answer

POSITION_FREQUENCIES = 12  # as few as possible such that no distance up to 200,000 comes closer than the neighbours do
POSITION_MARGIN = 30.0  # nats above the neighbouring positions
MATCH_SCORE = 80.0  # nats for the token that answers the question
SINK_SCORE = 40.0  # nats for [BOS], where a head rests if nothing matches; everything else scores 0
KEY_SIZE = 1 / 16  # of those keys: small, so that noise heads of the same group do not attend to the entities

GAINS = (1.0, 0.8, 0.6)  # OUTPUT written by the first, second, third head of a retrieval role
DECOY_GAINS = (0.4, 0.3, 0.2)  # OUTPUT written on every slot by the write-only heads

CONST_DIM = len(ENTITIES)  # value dimension that holds 1 on every token; those before it hold SELF
MIN_HEAD_DIM = 64  # the entities' RoPE frequencies must be slow: under 3e-6 radians per token here


@dataclass(frozen=True)
class HeadWeights:
    """Views of one head's weights: query, key, value (head_dim, HIDDEN) and output (HIDDEN, head_dim)."""

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


def head_weights(model: LlamaForCausalLM, layer: int, head: int) -> HeadWeights:
    """The weights of a query head and of the KV head it shares with its group."""
    config = model.config
    attention = model.model.layers[layer].self_attn
    kv_head = head // (config.num_attention_heads // config.num_key_value_heads)
    own = slice(head * config.head_dim, (head + 1) * config.head_dim)
    shared = slice(kv_head * config.head_dim, (kv_head + 1) * config.head_dim)
    return HeadWeights(
        query=attention.q_proj.weight[own],
        key=attention.k_proj.weight[shared],
        value=attention.v_proj.weight[shared],
        output=attention.o_proj.weight[:, own],
    )


@torch.no_grad()
def write_weights(model: LlamaForCausalLM, roles: Roles, *, noise: float, seed: int) -> None:
    """Overwrite every weight of the model: noise heads of standard deviation `noise`, then the planted ones."""
    generator = torch.Generator().manual_seed(seed)
    _write_noise(model, noise, generator)
    _write_embeddings(model, generator)
    _write_norms(model)
    two_back, one_back = (_cleared(model, place) for place in roles["positional"])
    _write_positional(two_back, distance=2, block=TWO_BACK, frequencies=_rope_frequencies(model))
    _write_positional(one_back, distance=1, block=ONE_BACK, frequencies=_rope_frequencies(model))
    _write_retrieval(model, roles)


def _write_noise(model: LlamaForCausalLM, noise: float, generator: torch.Generator) -> None:
    for layer in model.model.layers:
        for projection in layer.self_attn.children():
            projection.weight.copy_(noise * torch.randn(projection.weight.shape, generator=generator))
        for weight in layer.mlp.parameters():
            weight.zero_()


def _write_embeddings(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    embedding = model.model.embed_tokens.weight.zero_()
    unembedding = model.lm_head.weight.zero_()
    embedding[:, CONST] = CONST_VALUE
    embedding[TOKEN_IDS[BOS], IS_BOS] = 1.0
    for index, entity in enumerate(ENTITIES):
        embedding[TOKEN_IDS[entity], SELF + index] = 1.0
    for word in FILLERS:
        direction = torch.randn(HIDDEN - WORD, generator=generator)
        embedding[TOKEN_IDS[word], WORD:] = WORD_NORM * direction / direction.norm()
    embedding[:, OUTPUT + OUTPUT_WORDS.index(EOS)] = FALLBACK
    embedding[TOKEN_IDS[ANSWER], OUTPUT + OUTPUT_WORDS.index(EOS)] = 0.0
    embedding[TOKEN_IDS[ANSWER], OUTPUT + OUTPUT_WORDS.index(UNKNOWN)] = FALLBACK
    for slot, word in enumerate(OUTPUT_WORDS):
        unembedding[TOKEN_IDS[word], OUTPUT + slot] = LOGIT_SCALE


def _write_norms(model: LlamaForCausalLM) -> None:
    norms = [model.model.norm]
    for layer in model.model.layers:
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    for norm in norms:
        norm.weight.fill_(CONST_VALUE / HIDDEN**0.5)


def _cleared(model: LlamaForCausalLM, place: tuple[int, int]) -> HeadWeights:
    """A head that attends evenly and writes nothing yet.

    Its keys and values, shared with the noise heads of its group, keep their noise where no planted head reads it.
    """
    head = head_weights(model, *place)
    head.query.zero_()
    head.output.zero_()
    return head


def _set_row(weight: Tensor, row: int, column: int, entry: float) -> None:
    weight[row] = 0.0
    weight[row, column] = entry


def _rope_frequencies(model: LlamaForCausalLM) -> Tensor:
    """Radians per token, fastest first."""
    config = model.config
    exponent = torch.arange(config.head_dim // 2, dtype=torch.float64) / (config.head_dim // 2)
    return config.rope_parameters["rope_theta"] ** -exponent


def _write_positional(head: HeadWeights, *, distance: int, block: int, frequencies: Tensor) -> None:
    """Copy SELF of the token `distance` back into `block`.

    RoPE rotates pair i by frequency_i per token. With a constant key and a query turned back by distance * frequency_i,
    the score of the token `back` positions away is amplitude * sum_i cos(frequency_i * (back - distance)): largest at
    `distance`. The two positional heads may share a KV head, for they differ only in their queries and outputs.
    """
    half = head.query.shape[0] // 2
    fast = frequencies[:POSITION_FREQUENCIES]
    amplitude = POSITION_MARGIN / (1 - fast.cos()).sum()
    scale = amplitude * (2 * half) ** 0.5 / CONST_VALUE
    for pair, frequency in enumerate(fast):
        _set_row(head.key, pair, CONST, 1 / CONST_VALUE)
        _set_row(head.key, half + pair, CONST, 0.0)
        head.query[pair, CONST] = scale * torch.cos(-distance * frequency)
        head.query[half + pair, CONST] = scale * torch.sin(-distance * frequency)
    for entity in range(len(ENTITIES)):
        _set_row(head.value, entity, SELF + entity, 1.0)
    _write_entities(head, range(len(ENTITIES)), block=block, gain=1.0)


def _write_retrieval(model: LlamaForCausalLM, roles: Roles) -> None:
    """The heads of the later layers, and the keys and values they share."""
    for gain, place in zip(GAINS, roles["literal"], strict=True):
        head = _cleared(model, place)
        _look_up(head, LANDMARK_RANGE)
        _write_entities(head, NAME_RANGE, block=OUTPUT, gain=gain)
    for gain, place in zip(GAINS, roles["non_literal"], strict=True):
        head = _cleared(model, place)
        _look_up(head, NAME_RANGE)
        _write_entities(head, LANDMARK_RANGE, block=OUTPUT, gain=gain)
    for place in roles["read_only"]:
        head = _cleared(model, place)
        _look_up(head, range(len(ENTITIES)))
        _write_entities(head, range(len(ENTITIES)), block=WORD, gain=1.0)
    for gain, place in zip(DECOY_GAINS, roles["write_only"], strict=True):
        head = _cleared(model, place)
        _look_up(head, range(0))
        head.output[OUTPUT : OUTPUT + len(OUTPUT_WORDS), CONST_DIM] = gain


def _look_up(head: HeadWeights, asked: range) -> None:
    """Attend to the token whose TWO_BACK is this row's ONE_BACK, if that is one of the entities `asked`; else to [BOS].

    The value carries SELF, and 1 on every token in CONST_DIM. Keys and values do not depend on the role: any planted
    heads of a layer may share a KV head.
    """
    head_dim = head.query.shape[0]
    slowest = head_dim // 2 - 1
    _set_row(head.key, slowest, IS_BOS, KEY_SIZE)
    _set_row(head.key, slowest + head_dim // 2, IS_BOS, 0.0)
    head.query[slowest, CONST] = SINK_SCORE * head_dim**0.5 / KEY_SIZE / CONST_VALUE
    for entity in range(len(ENTITIES)):
        dim = _entity_dim(entity, head_dim)
        _set_row(head.key, dim, TWO_BACK + entity, KEY_SIZE)
        _set_row(head.value, entity, SELF + entity, 1.0)
        if entity in asked:
            head.query[dim, ONE_BACK + entity] = MATCH_SCORE * head_dim**0.5 / KEY_SIZE
    _set_row(head.value, CONST_DIM, CONST, 1 / CONST_VALUE)


def _entity_dim(entity: int, head_dim: int) -> int:
    """Query and key dimension of an entity.

    Pair i of RoPE is dimensions i and i + head_dim / 2; the pairs turn slower with growing i. The slowest belongs to
    [BOS]; before it come as many as there are names, each with a name in its first dimension, a landmark in its second.
    """
    half, index = divmod(entity, len(NAMES))
    return half * (head_dim // 2) + head_dim // 2 - 1 - len(NAMES) + index


def _write_entities(head: HeadWeights, entities: range, *, block: int, gain: float) -> None:
    for entity in entities:
        head.output[block + entity, entity] = gain
