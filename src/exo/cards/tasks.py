"""What a model is for, where no request says what is wanted of it."""

from exo.cards.card import ModelCard
from exo.worker.protocol.runners import Need


def needs_of(card: ModelCard) -> dict[Need, str]:
    """What every request for the model needs, as ``route`` takes it: nothing special where it generates text."""
    if "TextGeneration" in card.tasks:
        return {}
    if "TextEmbedding" in card.tasks:
        return {"embeddings": "model"}
    return {"rerank": "model"} if "TextRanking" in card.tasks else {}
