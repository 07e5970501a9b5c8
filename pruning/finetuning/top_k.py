"""How many experts a token selects, changed in a model that stands."""

from transformers import PreTrainedModel

from models.families import family


def set_top_k(model: PreTrainedModel, layer: str, top_k: int) -> None:
    """Let the router of ``layer`` select ``top_k`` experts a token."""
    row = family(model.config.model_type)
    block = model.get_submodule(layer)
    for module in (block, getattr(block, row.router)):
        if hasattr(module, row.top_k_count):
            setattr(module, row.top_k_count, top_k)
