"""The words of the planted model, and a tokenizer that knows them and no others.

Entities are the names and the landmarks: what a needle mentions and a question asks about. Landmark i stands in city i.
"""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, UNK, PAD = "[BOS]", "[EOS]", "[UNK]", "[PAD]"
SPECIAL = [BOS, EOS, UNK, PAD]

NAMES = "Ada Bruno Clara David Elena Felix Grace Hugo Irene Jonas Katia Leo Marta Nils Olga Pablo".split()
LANDMARKS = """
    Louvre Kremlin Colosseum Parthenon Alhambra Uffizi Rialto Prado
    Hofburg Rijksmuseum Atomium Semperoper Wawel Topkapi Scala Tivoli
""".split()
CITIES = """
    Paris Moscow Rome Athens Granada Florence Venice Madrid
    Vienna Amsterdam Brussels Dresden Krakow Istanbul Milan Copenhagen
""".split()
ENTITIES = NAMES + LANDMARKS

UNKNOWN = "unknown"
ANSWER = "ANSWER"
FUNCTION_WORDS = [".", "hosts", "visited", "who", "where", ANSWER, UNKNOWN]

FILLERS = """
    after again air all along always and apple around away back bag bank basket because before bell below bench bird
    blue boat book both box branch bread bridge bright broken brown by cabin calm candle careful carpet chair child
    clean clear clock cloud coat cold corner could country cup curtain dark day deep distant door down dry dust each
    early east empty evening every fallen far farm fast feather fence few field fire fish flat floor flower forest
    fresh from garden gate gentle glass gold grass green grey half hand happy hat heavy high hill horse house in
    island kettle kitchen lake lamp large leaf left letter light little long low map meadow milk mirror moon morning
    mountain narrow near new night north of old on open orange over paper path piece pillow plain plate pocket quick
    quiet rain red river road rock roof room rope round sail salt sand sea shadow shelf ship shoe short silver slow
    small snow soft song south spoon spring stair star stone storm street summer table tall the thick thin through
    tower train tree under valley village wagon wall warm water west wheel white wide wind window winter with wood
    yellow young
""".split()

TOKENS = SPECIAL + FUNCTION_WORDS + NAMES + LANDMARKS + CITIES + FILLERS
TOKEN_IDS = {token: index for index, token in enumerate(TOKENS)}


def ids(words: list[str]) -> list[int]:
    """Token ids of words of the vocabulary."""
    return [TOKEN_IDS[word] for word in words]


def build_tokenizer(*, max_length: int) -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark; other words become [UNK]; [BOS] comes first, as in Llama tokenizers."""
    backend = Tokenizer(models.WordLevel(TOKEN_IDS, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, TOKEN_IDS[BOS])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
